"""What changed from one measured model to another, and whether it matters."""
