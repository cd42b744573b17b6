"""Mathematics on arrays and tensors: no files, no configuration, no logging."""
