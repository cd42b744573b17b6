"""Versions of a model for MLflow's model registry."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from compress.plugins.registry.promotion import report_of
from compress.plugins.registry.registry import Registry
from compress.plugins.registry.state import Version
from compress.report.tracking import TrackedVersion, tracked_run


def tracked(registry: Registry, name: str) -> tuple[list[TrackedVersion], dict[str, str]]:
    """Return the versions of a model whose files exist, and the reference of every alias."""
    state = registry.state()
    versions = [_version(registry, version) for version in state.of(name) if not version.collected]
    return versions, {alias: f"{name}@{number}" for alias, number in state.aliases(name).items()}


def _version(registry: Registry, version: Version) -> TrackedVersion:
    contents = registry.contents(version)
    tags = {
        "compress.registry": str(registry.root.resolve()),
        "compress.record": version.record,
        "compress.model_digest": contents.model_digest,
        "compress.retired": str(version.retired).lower(),
    }
    run = tracked_run(report_of(registry, contents), Path(version.run))
    return TrackedVersion(version.reference, replace(run, tags={**run.tags, **tags}, files=()), tags)
