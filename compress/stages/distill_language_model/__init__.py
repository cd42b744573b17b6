"""Knowledge distillation of language models, token by token."""
