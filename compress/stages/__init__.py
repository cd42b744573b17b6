"""Steps of a recipe: one folder or file per algorithm, with its fields, its algorithm and its cost model."""
