"""MLflow tracking of runs, searches and registered versions, on a server or in an SQLite file.

MLflow is an extra, so it is imported inside the functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from compress.report.run_folder import RECIPE
from compress.results.report import FINAL, Report
from compress.utils.errors import InputError, MissingExtraError, first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

_MOST = 500
"""Largest number of characters of a parameter that MLflow stores."""
_REFERENCE = "compress.reference"
_UNNAMEABLE = re.compile(r"[^\w\-. /:]")


@dataclass(frozen=True)
class TrackedRun:
    """Run with its metrics. ``spread`` are 95% intervals, stored as metrics `NAME.low` and `NAME.high`.

    ``files`` are small and copied. Large files are named in ``tags``.
    """

    name: str
    metrics: Mapping[str, float]
    spread: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    parts: tuple[TrackedRun, ...] = ()
    """Nested runs, such as the trials of a search."""
    failed: bool = False


@dataclass(frozen=True)
class TrackedVersion:
    """Version of a model in the registry, by its ``reference`` there, with the run that made it."""

    reference: str
    run: TrackedRun
    tags: Mapping[str, str]


def tracked_run(report: Report, folder: Path) -> TrackedRun:
    """Return a run's report as a run of MLflow.

    It has the final model's metrics on each target, `accuracy/cpu`, with their intervals, and the model's folder.
    """
    rows = [row for row in report.measurements if row.model == FINAL]
    limits = {f"limit {limit.metric} {limit.limit}": limit.verdict or str(limit.passed) for limit in report.limits}
    return TrackedRun(
        name=f"{report.recipe} {report.started or ''}".strip(),
        metrics={f"{row.metric}/{row.target}": row.value for row in rows},
        spread={
            f"{row.metric}/{row.target}": (row.low, row.high)
            for row in rows
            if row.low is not None and row.high is not None
        },
        parameters={"recipe": report.recipe, "baseline": report.baseline, **limits},
        tags={"compress.folder": str(folder.resolve()), "compress.model": str((folder / "model").resolve())},
        files=tuple(path for path in (folder / RECIPE, folder / "report.html") if path.is_file()),
    )


def track(run: TrackedRun, uri: str, experiment: str) -> str:
    """Write a run and its nested runs to MLflow, and return its id.

    Args:
        run: Run that is written.
        uri: Address of MLflow: `http://host:5000` or `sqlite:///file.db`.
        experiment: Name of the experiment.

    Raises:
        InputError: MLflow cannot be reached.
        MissingExtraError: The package is not installed.
    """
    with _client(uri, "--track") as client:
        return _written(client, run, _experiment(client, experiment), None)


def mirror(versions: Sequence[TrackedVersion], aliases: Mapping[str, str], uri: str, name: str) -> dict[str, str]:
    """Copy versions and aliases to the model ``name`` in MLflow's registry.

    Args:
        versions: Versions of the model. Those that MLflow has already are not written again.
        aliases: Alias -> reference of a version.
        uri: Address of MLflow.
        name: Name of the model.

    Returns:
        Reference -> version number in MLflow.

    Raises:
        InputError: MLflow cannot be reached.
        MissingExtraError: The package is not installed.
    """
    with _client(uri, "a mirror in MLflow") as client:
        if not client.search_registered_models(f"name='{name}'"):
            client.create_registered_model(name)
        mlflow_versions = {
            registered.tags[_REFERENCE]: str(registered.version)
            for registered in client.search_model_versions(f"name='{name}'")
            if _REFERENCE in registered.tags
        }
        for version in versions:
            if version.reference not in mlflow_versions:
                run = _written(client, version.run, _experiment(client, name), None)
                tags = {**version.tags, _REFERENCE: version.reference}
                created = client.create_model_version(name, f"runs:/{run}/model", run_id=run, tags=tags)
                mlflow_versions[version.reference] = str(created.version)
            for tag, value in version.tags.items():
                client.set_model_version_tag(name, mlflow_versions[version.reference], tag, value)
        for alias, reference in aliases.items():
            client.set_registered_model_alias(name, alias, mlflow_versions[reference])
    return mlflow_versions


@contextmanager
def _client(uri: str, needed_by: str) -> Iterator[MlflowClient]:
    """Yield a client whose errors state how to fix them."""
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
    experiment = client.get_experiment_by_name(name)
    return str(client.create_experiment(name) if experiment is None else experiment.experiment_id)


def _written(client: MlflowClient, run: TrackedRun, experiment: str, parent: str | None) -> str:
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.utils.time import get_current_time_millis

    tags = {**run.tags, **({"mlflow.parentRunId": parent} if parent else {})}
    run_id = client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
    now = get_current_time_millis()
    ends = {f"{name}.{end}": value for name, pair in run.spread.items()
            for end, value in zip(("low", "high"), pair, strict=True)}  # fmt: skip
    metrics = [Metric(_named(name), value, now, 0) for name, value in {**run.metrics, **ends}.items()]
    parameters = [Param(_named(name), value[:_MOST]) for name, value in run.parameters.items()]
    client.log_batch(run_id, metrics=metrics, params=parameters, tags=list[RunTag]())
    for file in run.files:
        client.log_artifact(run_id, str(file))
    for part in run.parts:
        _written(client, part, experiment, run_id)
    client.set_terminated(run_id, status="FAILED" if run.failed else "FINISHED")
    return str(run_id)


def _named(name: str) -> str:
    """Return a name that MLflow accepts: `accuracy[label=good]` -> `accuracy_label_good_`."""
    return _UNNAMEABLE.sub("_", name)
