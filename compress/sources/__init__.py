"""Starting models: found, converted or made."""
