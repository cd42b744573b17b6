"""Formats that models are shipped in, one folder each."""
