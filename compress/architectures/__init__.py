"""Where architectures keep their layers, heads, channels and vocabulary, and how these are cut."""

ALWAYS_CUT = frozenset({"bert", "deit", "distilbert", "electra", "gpt2", "llama", "roberta", "vit", "xlm-roberta"})
"""Types of models (`model_type`) of which tests cut heads, neurons and layers, so that `check` need not try it."""
