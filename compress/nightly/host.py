"""Which machine a night ran on, and which commit it was of."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from compress.compare.baseline import git
from compress.compare.hosts import host_words
from compress.nightly.record import Host

_IDENTITY = (
    *("processor", "features", "cores", "cores_granted", "cores_quota"),
    *("memory_bytes", "memory_limit_bytes", "governor", "platform"),
)


def host_of(environment: dict[str, Any]) -> Host:
    """The machine of `compress.environment.environment()`, without the software that runs on it.

    Memory counts in whole gigabytes, since a kernel update changes what it reports by a little.
    """
    kept = {name: environment.get(name) for name in _IDENTITY}
    for name in ("memory_bytes", "memory_limit_bytes"):
        reported = environment.get(name)
        kept[name] = None if reported is None else round(reported / 1e9)
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    return Host(digest=digest[:16], words=host_words(environment))


def software_of(environment: dict[str, Any]) -> dict[str, Any]:
    """What may explain a change on one machine: kernel, Python, packages."""
    flat = {name: environment.get(name) for name in ("kernel", "python")}
    return flat | dict(environment.get("packages", {}))


def commit_of(folder: Path) -> str | None:
    """The commit of the repository around ``folder``, with `+changes` if files differ from it; None without one."""
    commit = git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit + ("+changes" if changed else "")
