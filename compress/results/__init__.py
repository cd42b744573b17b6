"""Measurements, metrics and the report of a run: the records that all layers share."""
