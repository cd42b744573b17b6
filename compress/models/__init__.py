"""Models: what a stage takes and gives."""
