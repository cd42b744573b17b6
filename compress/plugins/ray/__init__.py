"""Who takes recipes down the road: this process, or the machines of a Ray cluster."""
