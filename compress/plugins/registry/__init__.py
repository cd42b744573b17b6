"""Which versions of a model there are, which one is in use, who decided it and why, and the way back."""
