"""Tests of MLflow tracking: logged runs are read with MLflow's own client."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.report.tracking import TrackedRun, track, tracked_run
from compress.results.report import Measurement, Report
from compress.utils.errors import InputError

# MLflow's own, about its database and its dependencies.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the URI of a database, which MLflow creates at its first use (a few seconds)."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/runs.db"


def test_mlflow_client_reads_run_and_nested_runs(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("name: tiny\n")
    rows = (
        Measurement(model="final", metric="accuracy", target="cpu", value=0.9, unit="ratio", low=0.8, high=0.95),
        Measurement(model="final", metric="accuracy[label=good]", target="cpu", value=0.7, unit="ratio"),
        Measurement(model="baseline", metric="accuracy", target="cpu", value=0.92, unit="ratio"),
    )
    report = Report(recipe="tiny", measurements=rows, started="2026-01-01T00:00:00+00:00")
    trials = (
        TrackedRun("trial 0", {"size_bytes": 10.0}, parameters={"heads": "0.5"}),
        TrackedRun("trial 1", {}, failed=True),
    )
    tracked = tracked_run(report, tmp_path)
    run_id = track(
        TrackedRun(
            tracked.name, tracked.metrics, tracked.spread, tracked.parameters, tracked.tags, tracked.files, trials
        ),
        uri,
        "tiny",
    )
    client = mlflow.MlflowClient(tracking_uri=uri)
    run = client.get_run(run_id)
    assert run.data.metrics == {
        "accuracy/cpu": 0.9, "accuracy/cpu.low": 0.8, "accuracy/cpu.high": 0.95, "accuracy_label_good_/cpu": 0.7,
    }  # fmt: skip
    assert run.data.params["recipe"] == "tiny"
    assert run.data.tags["compress.model"] == str(tmp_path / "model")
    assert [artifact.path for artifact in client.list_artifacts(run_id)] == ["recipe.yaml"]
    within = client.search_runs(
        [run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'", order_by=["attributes.run_name"]
    )
    assert [(child.info.run_name, child.info.status) for child in within] == [
        ("trial 0", "FINISHED"),
        ("trial 1", "FAILED"),
    ]
    assert within[0].data.metrics == {"size_bytes": 10.0}


def test_invalid_tracking_uri_is_refused() -> None:
    pytest.importorskip("mlflow")
    with pytest.raises(InputError, match="MLflow could not be written to"):
        track(TrackedRun("x", {}), "carrier-pigeon://runs", "tiny")
