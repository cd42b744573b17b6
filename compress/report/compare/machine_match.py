"""Comparability of two machines: whether times of two reports may be compared, and their other differences."""

from __future__ import annotations

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
    software = [
        f"{name}: {baseline[key]} and {candidate[key]}"
        for key, name in SOFTWARE.items()
        if key != "packages" and key in baseline and key in candidate and baseline[key] != candidate[key]
    ]
    given = (side.get("packages") for side in (baseline, candidate))
    packages = [side if isinstance(side, dict) else {} for side in given]
    for package in sorted(packages[0].keys() | packages[1].keys()) if all(packages) else ():
        versions = [side.get(package, "not installed") for side in packages]
        if versions[0] != versions[1]:
            software.append(f"{package}: {versions[0]} and {versions[1]}")
    return MachineDifferences(tuple(unknown + machine), tuple(software))


def fingerprint(environment: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a report's environment that identify machine and software."""
    parts = {key: environment[key] for key in (*MACHINE, *SOFTWARE) if key in environment}
    # The execution provider that the runtime used comes before the one of the target.
    settings, target = environment.get("runtime_settings"), environment.get("target")
    used = {
        str(settings_of_model["provider"])
        for settings_of_model in (settings.values() if isinstance(settings, dict) else ())
        if isinstance(settings_of_model, dict) and "provider" in settings_of_model
    }
    requested = target.get("provider") if isinstance(target, dict) else environment.get("provider")
    provider = ", ".join(sorted(used)) or requested
    return parts if provider is None else {**parts, "provider": str(provider)}


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
