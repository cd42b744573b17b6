"""Inspection of models: size budget, weight statistics, operators, and errors and saturation by layer."""
