"""Finding the recipe: what may vary, what is tried next, what came of it, and one honest session at the end."""
