"""Starting models of a recipe: resolved, downloaded, converted or built."""
