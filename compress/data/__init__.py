"""Data: splits of examples, read from files, samples or the Hugging Face hub."""
