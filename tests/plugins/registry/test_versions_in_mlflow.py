"""Versions of a registry that are mirrored into MLflow, read with MLflow's own client."""

from __future__ import annotations

from pathlib import Path

import pytest
from registry import made_run

from compress.plugins.registry.promotion import PromotionRequest, promote
from compress.plugins.registry.promotion import tracked_versions as tracked_versions
from compress.plugins.registry.registry import Registry
from compress.report.tracking import mirror

# MLflow's own warnings, about its database and its dependencies.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of a database, which MLflow creates at its first use."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/runs.db"


def test_a_registry_has_the_same_versions_aliases_and_figures_there(uri: str, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    registry = Registry(tmp_path / "registry")
    for number, accuracy in enumerate((0.9, 0.5)):
        registry.register(made_run(tmp_path / f"run-{number}", bytes([number]), accuracy), "reviews")
    promote(registry, PromotionRequest("reviews@1"))
    both = {"reviews@1": "1", "reviews@2": "2"}
    assert mirror(*tracked_versions(registry, "reviews"), uri, "reviews") == both
    registry.retire("reviews@2")
    promote(registry, PromotionRequest("reviews@1", alias="canary"))
    assert mirror(*tracked_versions(registry, "reviews"), uri, "reviews") == both
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    assert len(client.search_model_versions("name='reviews'")) == 2
    for alias in ("champion", "canary"):
        found = client.get_model_version_by_alias("reviews", alias)
        assert found.tags["compress.reference"] == "reviews@1"
    assert found.tags["compress.registry"] == str(registry.root)
    metrics = client.get_run(found.run_id).data.metrics
    assert metrics["accuracy/cpu"] == 0.9 and metrics["accuracy/cpu.low"] == pytest.approx(0.85)
    assert client.get_model_version("reviews", "2").tags["compress.retired"] == "true"
