"""Real models and data that package registries hold, as recipes name them: `sample:NAME`."""
