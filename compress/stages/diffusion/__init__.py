"""Stages of text-to-image models: pruned denoisers, step distillation, small autoencoders and schedulers."""
