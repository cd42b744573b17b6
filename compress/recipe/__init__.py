"""The recipe, and what it is made of."""
