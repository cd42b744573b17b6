"""Timing of artifacts, each in a process of its own, side by side."""
