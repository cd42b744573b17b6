"""Recipes: schema, loading with positions, overrides, validation and starter recipes."""
