"""What is tested on some days alone, since all of it every time would take too long: as much each day, in turn.

With `ROTATION=all` in the environment all of it is, as should be done before what these tests look at is changed.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import TypeVar

Item = TypeVar("Item")


def todays(items: Iterable[Item], days: int, name: Callable[[Item], str]) -> list[Item]:
    """One item in ``days``, another one each day; items of a kind, which lie together, are spread."""
    spread = sorted(items, key=lambda item: zlib.crc32(name(item).encode()))
    if os.environ.get("ROTATION") == "all":
        return spread
    return spread[datetime.now(UTC).toordinal() % days :: days]


OTHERS = ("ray", "gptqmodel", "s3", "optimum-intel")
"""Programs of others that take half a minute to install, or to begin and to end."""


def is_todays(other: str) -> bool:
    """Whether it is this one's day: they take turns."""
    return other in todays(OTHERS, len(OTHERS), str)
