"""Static models: one vector per token in place of an encoder."""
