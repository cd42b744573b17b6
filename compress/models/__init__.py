"""Models and their folders in Hugging Face layout: reading, checking, loading and writing them, and their structure."""

PRUNING_TESTED_TYPES = frozenset(
    {"bert", "deit", "distilbert", "electra", "gpt2", "llama", "roberta", "vit", "xlm-roberta"}
)
"""Values of `model_type` whose heads, neurons and layers the tests prune, so that `check` skips the dry run."""
