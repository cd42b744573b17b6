"""Paired timing of artifacts, each in its own process, on this machine or another host."""
