"""Model folders in Hugging Face layout: weights, configs, tokenizers, and the models read from them."""
