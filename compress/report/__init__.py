"""Views of reports, comparisons of models and the gate."""
