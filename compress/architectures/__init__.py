"""Where architectures keep their layers, heads, channels and vocabulary, and how these are cut."""
