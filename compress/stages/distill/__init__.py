"""Knowledge distillation of encoders, classifiers and embedding models."""
