"""Processing of a language model one transformer block at a time, which quantization and pruning share."""
