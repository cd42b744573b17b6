"""Training shared by several stages: settings, loop, checkpoints, token sequences and synthetic data."""
