"""Core ML packages in bundles."""
