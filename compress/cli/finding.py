"""What `compress doctor` says of one thing it looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``advice`` says how to mend what isn't ``ok``."""

    level: Literal["ok", "warning", "problem"]
    what: str
    advice: str | None = None
