"""ExecuTorch programs in bundles."""
