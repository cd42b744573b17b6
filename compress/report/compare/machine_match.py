"""Comparability of two machines: whether times of two reports may be compared, and their other differences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from compress.results.formatting import format_bytes, format_number

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
"""Keys of a report's environment that affect times, and their names. `provider` is the one that the runtime used."""
SOFTWARE = {"kernel": "kernel", "python": "Python", "packages": "versions of packages"}
_SAME_MEMORY = 0.01
"""Relative difference of memory that is the same machine, since a kernel update changes the reported size."""


class MachineDifferences(NamedTuple):
    """Differences of two machines.

    Those of ``machine`` make times incomparable. Those of ``software`` may be the thing under test.
    """

    machine: tuple[str, ...]
    software: tuple[str, ...]


def machine_differences(baseline: dict[str, Any], candidate: dict[str, Any]) -> MachineDifferences:
    """Return the differences of two environments, as sentences with the baseline's value first.

    A key that either lacks, as in older reports, is ignored. An environment without a processor is of an unknown
    machine, which is a difference.
    """
    unknown = [
        f"the {side} does not say which machine it was measured on"
        for side, environment in (("baseline", baseline), ("candidate", candidate))
        if not environment.get("processor")
    ]
    baseline_parts, candidate_parts = fingerprint(baseline), fingerprint(candidate)
    machine = [
        f"{name}: {_written(key, baseline_parts[key])} and {_written(key, candidate_parts[key])}"
        for key, name in MACHINE.items()
        if key in baseline_parts and key in candidate_parts and _differ(key, baseline_parts[key], candidate_parts[key])
    ]
    return MachineDifferences(tuple(unknown + machine), tuple(_software(baseline_parts, candidate_parts)))


def fingerprint(environment: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a report's environment that identify machine and software."""
    parts = {key: environment[key] for key in (*MACHINE, *SOFTWARE) if key in environment}
    provider = _provider(environment)
    return parts if provider is None else {**parts, "provider": provider}


def machine_summary(environment: dict[str, Any]) -> str:
    """Return `AMD EPYC, 2 of 2 cores, 25.3 GB, Linux x86_64`."""
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
    """Return the execution provider that the runtime used, else the one of the target."""
    settings = environment.get("runtime_settings")
    providers = {
        str(settings_of_model["provider"])
        for settings_of_model in (settings.values() if isinstance(settings, dict) else ())
        if isinstance(settings_of_model, dict) and "provider" in settings_of_model
    }
    if providers:
        return ", ".join(sorted(providers))
    target = environment.get("target")
    requested = target.get("provider") if isinstance(target, dict) else environment.get("provider")
    return None if requested is None else str(requested)


def _differ(key: str, baseline: Any, candidate: Any) -> bool:
    if key == "memory_bytes" and baseline and candidate:
        return abs(float(candidate) / float(baseline) - 1) > _SAME_MEMORY
    if key == "features":
        return set(baseline) != set(candidate)
    return bool(baseline != candidate)


def _written(key: str, value: Any) -> str:
    if value is None:
        return "none"
    if key.endswith("_bytes"):
        return format_bytes(float(value))
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return format_number(value) if isinstance(value, float) else str(value)


def _software(baseline: dict[str, Any], candidate: dict[str, Any]) -> Iterator[str]:
    for key, name in SOFTWARE.items():
        if key == "packages" or key not in baseline or key not in candidate or baseline[key] == candidate[key]:
            continue
        yield f"{name}: {baseline[key]} and {candidate[key]}"
    baseline_packages, candidate_packages = baseline.get("packages") or {}, candidate.get("packages") or {}
    for package in (
        sorted(baseline_packages.keys() | candidate_packages.keys()) if baseline_packages and candidate_packages else ()
    ):
        if baseline_packages.get(package) != candidate_packages.get(package):
            versions = [packages.get(package, "not installed") for packages in (baseline_packages, candidate_packages)]
            yield f"{package}: {' and '.join(versions)}"
