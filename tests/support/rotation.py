"""Rotation of expensive tests: each run executes a part of them, and the next run another part.

`ROTATION=slow` in the environment runs all slow tests; `ROTATION=all` also runs everything that rotates daily.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import TypeVar

Item = TypeVar("Item")
SLOW_PARTS = 8
"""`make test` runs one eighth of the files of slow and browser tests, and rotates to another eighth each hour."""


def todays(items: Iterable[Item], days: int, name: Callable[[Item], str]) -> list[Item]:
    """Return one in ``days`` items, with a different selection each day.

    Items are ordered by a hash of their names, so that neighboring, similar items run on different days.
    """
    spread = sorted(items, key=lambda item: zlib.crc32(name(item).encode()))
    if os.environ.get("ROTATION") == "all":
        return spread
    return spread[datetime.now(UTC).toordinal() % days :: days]


def slow_part(files: Mapping[str, float], hour: int) -> set[str]:
    """Return the files whose slow tests run in this hour; the parts take about the same time."""
    by_duration = sorted(files, key=lambda file: (-files[file], file))
    return set(by_duration[hour % SLOW_PARTS :: SLOW_PARTS])


OTHERS = ("ray", "gptqmodel", "s3", "optimum-intel")
"""External programs that take half a minute to install or to start."""


def is_todays(other: str) -> bool:
    """Return whether this external program is tested today."""
    return other in todays(OTHERS, len(OTHERS), str)
