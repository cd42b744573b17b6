"""The parameter budget of a model: what its bytes are spent on."""
