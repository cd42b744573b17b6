"""What is asked of a model to judge it."""
