"""Runs and searches as MLflow's users keep them: on a server or in an SQLite file, artifacts by reference."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from compress.errors import InputError, MissingExtraError, first_line

_MOST = 500
"""Characters of a parameter that MLflow keeps."""
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


def track(run: TrackedRun, uri: str, experiment: str) -> str:
    """Write a run and those within it to MLflow at ``uri``, `http://host:5000` or `sqlite:///file.db`; gives its id.

    Raises `InputError` where that cannot be reached, `MissingExtraError` without the package.
    """
    try:
        import mlflow
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise MissingExtraError("mlflow-skinny", "mlflow", "--track") from error
    try:
        client = mlflow.MlflowClient(tracking_uri=uri)
        known = client.get_experiment_by_name(experiment)
        where = client.create_experiment(experiment) if known is None else known.experiment_id
        return _written(client, run, where, None)
    except (MlflowException, OSError) as error:
        raise InputError(
            f"MLflow could not be written to: {first_line(error)}",
            where=uri,
            expected="a server such as http://localhost:5000, or sqlite:///runs.db",
            mend="everything is in the folder of the run; see that the address is right, and run it again",
        ) from error


def _written(client: object, run: TrackedRun, experiment: str, parent: str | None) -> str:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.utils.time import get_current_time_millis

    assert isinstance(client, MlflowClient)
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
