"""Charts as SVG within a page: scales with round ticks, marks with tooltips, labels that cover nothing."""
