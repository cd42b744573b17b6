"""What a model is shipped with: its licences, its card, its bill of materials, and where it came from."""
