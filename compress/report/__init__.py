"""Reports: `report.json` and its views."""
