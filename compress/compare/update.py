"""Setting the bar: who does it, and whether it comes down."""

from __future__ import annotations

import getpass
import subprocess
from datetime import UTC, datetime

from compress.compare.baseline import Origin
from compress.compare.change import Change, Comparison
from compress.metrics import describe_metric
from compress.recipe.policy import Policy

_GIT_SECONDS = 5.0


def origin(why: str) -> Origin:
    """The origin of a baseline that is written now: the name that git knows, else the user's."""
    when = datetime.now(UTC).astimezone().isoformat(timespec="seconds")
    return Origin(who=_git_name() or getpass.getuser(), when=when, why=why)


def _git_name() -> str:
    try:
        command = ["git", "config", "user.name"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def lowered(comparison: Comparison, policy: Policy) -> tuple[Change, ...]:
    """The gated changes by which a new baseline would ask less than the old one.

    Of figures that repeat exactly, such as bytes and accuracy, any loss counts: small ones add up from update to
    update. Times and memory count only where the verdict is *worse*.
    """
    return tuple(
        change for change in comparison.changes if policy.rule(change.metric) is not None and _asks_less(change)
    )


def _asks_less(change: Change) -> bool:
    known = describe_metric(change.metric, change.unit)
    if change.verdict == "worse":
        return True
    if not (known.quality or change.metric == "size_bytes"):
        return False
    return change.effect < 0 if known.better == "higher" else change.effect > 0
