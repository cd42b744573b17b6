"""When two texts count as the same: whatever their case and spacing."""

from __future__ import annotations


def normalised(text: str) -> str:
    """``text`` casefolded, with every run of white space as one space."""
    return " ".join(text.casefold().split())
