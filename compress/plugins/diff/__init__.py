"""What differs between two models: their files and recipes, their weights, their answers."""
