"""Training: one loop for every stage that updates weights."""
