"""LiteRT models in bundles."""
