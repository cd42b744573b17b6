"""A comparison, and what a gate made of it, for people and for build servers."""
