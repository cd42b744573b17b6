"""Whether two reports come from machines whose times may be compared, and what else differs between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from compress.results.formatting import format_bytes, significant

MACHINE = {
    "processor": "processor",
    "features": "processor features",
    "cores": "cores",
    "cores_granted": "cores granted",
    "cores_quota": "quota of cores",
    "governor": "frequency governor",
    "memory_bytes": "memory",
    "memory_limit_bytes": "memory limit",
    "platform": "platform",
    "threads": "threads of the runtime",
    "provider": "execution provider",
}
"""Keys of a report's environment that bear on times, and their names. `provider` is the one really taken."""
SOFTWARE = {"kernel": "kernel", "python": "Python", "packages": "versions of packages"}
_SAME_MEMORY = 0.01
"""A machine reports a little more or less memory after a kernel update."""


class HostDifferences(NamedTuple):
    """``machine``: what keeps times from being compared. ``software``: what may be the very thing under test."""

    machine: tuple[str, ...]
    software: tuple[str, ...]


def host_differences(baseline: dict[str, Any], candidate: dict[str, Any]) -> HostDifferences:
    """What differs between two environments, as sentences with the baseline's value first.

    A key that either lacks, as reports of older versions do, tells nothing; one without a processor is of an unknown
    machine, which is a difference.
    """
    unknown = [
        f"the {side} does not say which machine it was measured on"
        for side, environment in (("baseline", baseline), ("candidate", candidate))
        if not environment.get("processor")
    ]
    before, after = fingerprint(baseline), fingerprint(candidate)
    machine = [
        f"{name}: {_written(key, before[key])} and {_written(key, after[key])}"
        for key, name in MACHINE.items()
        if key in before and key in after and _differ(key, before[key], after[key])
    ]
    return HostDifferences(tuple(unknown + machine), tuple(_software(before, after)))


def fingerprint(environment: dict[str, Any]) -> dict[str, Any]:
    """The parts of a report's environment that tell machines and software apart."""
    kept = {key: environment[key] for key in (*MACHINE, *SOFTWARE) if key in environment}
    provider = _provider(environment)
    return kept if provider is None else {**kept, "provider": provider}


def host_words(environment: dict[str, Any]) -> str:
    """`AMD EPYC, 2 of 2 cores, 25.3 GB, Linux x86_64`."""
    cores, granted = environment.get("cores"), environment.get("cores_granted")
    memory = environment.get("memory_bytes")
    parts = [
        str(environment.get("processor") or "an unknown machine"),
        f"{granted} of {cores} cores" if cores and granted else "",
        format_bytes(memory) if memory else "",
        str(environment.get("platform") or ""),
    ]
    return ", ".join(part for part in parts if part)


def _provider(environment: dict[str, Any]) -> str | None:
    """What the runtime really took, else what the target asked for."""
    settings = environment.get("runtime_settings")
    taken = {
        str(found["provider"])
        for found in (settings.values() if isinstance(settings, dict) else ())
        if isinstance(found, dict) and "provider" in found
    }
    if taken:
        return ", ".join(sorted(taken))
    target = environment.get("target")
    asked = target.get("provider") if isinstance(target, dict) else environment.get("provider")
    return None if asked is None else str(asked)


def _differ(key: str, before: Any, after: Any) -> bool:
    if key == "memory_bytes" and before and after:
        return abs(float(after) / float(before) - 1) > _SAME_MEMORY
    if key == "features":
        return set(before) != set(after)
    return bool(before != after)


def _written(key: str, value: Any) -> str:
    if value is None:
        return "none"
    if key.endswith("_bytes"):
        return format_bytes(float(value))
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return significant(value) if isinstance(value, float) else str(value)


def _software(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    for key, name in SOFTWARE.items():
        if key == "packages" or key not in before or key not in after or before[key] == after[key]:
            continue
        yield f"{name}: {before[key]} and {after[key]}"
    old, new = before.get("packages") or {}, after.get("packages") or {}
    for package in sorted(old.keys() | new.keys()) if old and new else ():
        if old.get(package) != new.get(package):
            yield f"{package}: {old.get(package, 'not installed')} and {new.get(package, 'not installed')}"
