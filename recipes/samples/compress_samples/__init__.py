"""Sample models and data sets from package registries, which recipes refer to as `sample:NAME`."""
