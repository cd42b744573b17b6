"""Runs, searches and versions as MLflow's users keep them: on a server or in an SQLite file, artifacts by reference."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from compress.utils.errors import InputError, MissingExtraError, first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

_MOST = 500
"""Characters of a parameter that MLflow keeps."""
_REFERENCE = "compress.reference"
_UNNAMEABLE = re.compile(r"[^\w\-. /:]")


@dataclass(frozen=True)
class TrackedRun:
    """One run with its figures; ``spread`` are 95% intervals, kept as metrics `NAME.low` and `NAME.high`.

    ``files`` are small and copied; what is large is named in ``tags``.
    """

    name: str
    metrics: Mapping[str, float]
    spread: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    parts: tuple[TrackedRun, ...] = ()
    """Runs within it: the trials of a search."""
    failed: bool = False


@dataclass(frozen=True)
class TrackedVersion:
    """A version of a model in a registry of ours, by its ``reference`` there, with the run that it is from."""

    reference: str
    run: TrackedRun
    tags: Mapping[str, str]


def track(run: TrackedRun, uri: str, experiment: str) -> str:
    """Write a run and those within it to MLflow at ``uri``, `http://host:5000` or `sqlite:///file.db`; gives its id.

    Raises `InputError` where that cannot be reached, `MissingExtraError` without the package.
    """
    with _client(uri, "--track") as client:
        return _written(client, run, _experiment(client, experiment), None)


def mirror(versions: Sequence[TrackedVersion], aliases: Mapping[str, str], uri: str, name: str) -> dict[str, str]:
    """Give MLflow's registry the model ``name``: versions that it lacks, then what each alias stands for.

    ``aliases`` and what is returned name ours by reference; MLflow counts its own numbers. Raises as `track` does.
    """
    with _client(uri, "a mirror in MLflow") as client:
        if not client.search_registered_models(f"name='{name}'"):
            client.create_registered_model(name)
        known = {
            found.tags[_REFERENCE]: str(found.version)
            for found in client.search_model_versions(f"name='{name}'")
            if _REFERENCE in found.tags
        }
        for version in versions:
            if version.reference not in known:
                run = _written(client, version.run, _experiment(client, name), None)
                tags = {**version.tags, _REFERENCE: version.reference}
                made = client.create_model_version(name, f"runs:/{run}/model", run_id=run, tags=tags)
                known[version.reference] = str(made.version)
            for tag, value in version.tags.items():
                client.set_model_version_tag(name, known[version.reference], tag, value)
        for alias, reference in aliases.items():
            client.set_registered_model_alias(name, alias, known[reference])
    return known


@contextmanager
def _client(uri: str, needed_by: str) -> Iterator[MlflowClient]:
    """A client whose errors say what to do."""
    try:
        import mlflow
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise MissingExtraError("mlflow-skinny", "mlflow", needed_by) from error
    try:
        yield mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    except (MlflowException, OSError) as error:
        raise InputError(
            f"MLflow could not be written to: {first_line(error)}",
            where=uri,
            expected="a server such as http://localhost:5000, or sqlite:///runs.db",
            hint="everything is in our own folder; see that the address is right, and give the command again",
        ) from error


def _experiment(client: MlflowClient, name: str) -> str:
    known = client.get_experiment_by_name(name)
    return str(client.create_experiment(name) if known is None else known.experiment_id)


def _written(client: MlflowClient, run: TrackedRun, experiment: str, parent: str | None) -> str:
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.utils.time import get_current_time_millis

    tags = {**run.tags, **({"mlflow.parentRunId": parent} if parent else {})}
    made = client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
    now = get_current_time_millis()
    ends = {f"{name}.{end}": value for name, pair in run.spread.items()
            for end, value in zip(("low", "high"), pair, strict=True)}  # fmt: skip
    metrics = [Metric(_named(name), value, now, 0) for name, value in {**run.metrics, **ends}.items()]
    parameters = [Param(_named(name), value[:_MOST]) for name, value in run.parameters.items()]
    client.log_batch(made, metrics=metrics, params=parameters, tags=list[RunTag]())
    for file in run.files:
        client.log_artifact(made, str(file))
    for part in run.parts:
        _written(client, part, experiment, made)
    client.set_terminated(made, status="FAILED" if run.failed else "FINISHED")
    return str(made)


def _named(name: str) -> str:
    """A name that MLflow takes: `accuracy[label=good]` -> `accuracy_label_good_`."""
    return _UNNAMEABLE.sub("_", name)
