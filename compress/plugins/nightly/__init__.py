"""Nights: a suite of recipes run unattended, gated against baselines, and watched over weeks."""
