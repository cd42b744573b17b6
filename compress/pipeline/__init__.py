"""The road from a recipe to a measured artifact."""
