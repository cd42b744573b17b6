"""Tests of whole searches of a tiny recipe: results, resuming, a lost worker and refused input."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import yaml
from rotation import is_todays
from typer.testing import CliRunner

from compress.cli import app
from compress.plugins.search.run import SearchRun
from compress.plugins.search.search_folder import MODEL
from compress.plugins.search.trial import TrialRunner
from compress.recipe.document import read_document
from compress.recipe.recipe import Recipe
from compress.results.report import load_report
from compress.utils.errors import InputError, StageError
from compress.utils.progress import SilentProgress
from compress.utils.storage import digest_directory

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning:torch", "ignore::DeprecationWarning")]

STAGES = (
    {"finetune": {"epochs": 1, "batch_size": 8, "learning_rate": 2e-3}},
    {"distill": {"teacher": "finetune", "student": {"layers": [0, 1]}, "epochs": 1, "batch_size": 8,
                 "learning_rate": 2e-3, "keep_best": False}},
    {"onnx": {}},
    {"onnx_int8": {}},
)  # fmt: skip
SEARCH = {"minimize": "size_bytes", "budget": "10m", "select": {"rows": 60}, "rungs": [0.5], "seeds": 1,
    "choices": {"stages.1.distill.student.layers": [[0, 1], [0]], "stages.3.onnx_int8.embedding_bits": [8, 4]},
}  # fmt: skip
LIMITS = [
    {"metric": "accuracy", "at_least": 0.6, "of": "baseline"},
    {"metric": "size_bytes", "at_most": 0.6, "of": "baseline"},
]


def write(folder: Path, **changes: Any) -> Path:
    search = {**SEARCH, **changes.pop("search", {})}
    return tiny_run.write_all(folder, stages=list(STAGES), search=search, limits=LIMITS, **changes)


def latest(artifacts: Path) -> Path:
    return (artifacts / "searches" / "tiny" / "latest").resolve()


def trials(artifacts: Path) -> list[dict[str, Any]]:
    """Return the ledger's record of each trial without times."""
    lines = (latest(artifacts) / "ledger.jsonl").read_text().splitlines()[1:]
    records = [json.loads(line) for line in lines]
    for trial in records:
        trial.pop("elapsed"), trial["outcome"].pop("seconds")
        for stage in trial["outcome"]["stages"]:
            stage.pop("seconds"), stage.pop("cached")
    return records


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run a search and return its folder, with its artifacts in `artifacts`."""
    folder = tmp_path_factory.mktemp("searched")
    path = write(folder)
    done = tiny_run.compress("search", path, "--artifacts", folder / "artifacts", "--json")
    assert done.returncode == 0, done.stderr
    (folder / "said.json").write_text(done.stdout)
    return folder


def test_smallest_feasible_model_wins_and_is_evaluated_on_test_rows(searched: Path) -> None:
    record = json.loads((searched / "said.json").read_text())
    full = [trial for trial in record["trials"] if trial["share"] == 1 and trial["status"] != "missed"]
    best = next(trial for trial in record["trials"] if trial["status"] == "best")
    assert best["final"]["size_bytes"] == min(trial["final"]["size_bytes"] for trial in full)
    judged = {trial["name"]: trial for trial in record["final"]["judged"]}
    assert judged["winner"]["words"] == best["words"]
    assert set(judged) >= {"winner", "as chosen", "trial 0"}
    assert judged["as chosen"]["words"] == best["words"]
    # The confidence is Bonferroni-corrected for the number of evaluated models.
    assert record["final"]["confidence"] == pytest.approx(1 - 0.05 / len(judged))
    assert [trial["seed"] for trial in record["final"]["seeds"]] == [1]
    assert record["stages_shared"] > 0
    # The page shows every trial and loads no external resources.
    page = (latest(searched / "artifacts") / "search.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    for trial in record["trials"]:
        assert f'<th scope="row">{trial["number"]}</th>' in page


def test_best_recipe_runs_from_the_cache_with_the_same_bytes(searched: Path) -> None:
    artifacts, newest_run = searched / "artifacts", latest(searched / "artifacts")
    text = (newest_run / "best.yaml").read_text()
    values = yaml.safe_load(text)
    assert "search" not in values
    # The refit also trains on the selection rows, so that its weights differ from the chosen model's.
    assert "hold_out" not in values["data"]
    record = json.loads((searched / "said.json").read_text())
    assert record["final"]["refit"]
    winner, chosen = record["final"]["judged"][:2]
    assert digest_directory(Path(winner["folder"])) != digest_directory(Path(chosen["folder"]))
    assert text.startswith("# Found by `compress search`")
    done = CliRunner().invoke(app, ["run", str(newest_run / "best.yaml"), "--artifacts", str(artifacts), "--json"])
    assert done.exit_code == 0, done.output
    report = load_report(artifacts / "runs" / "tiny" / "latest" / "report.json")
    assert all(stage.cached for stage in report.stages)
    ran = artifacts / "runs" / "tiny" / "latest" / "model"
    assert digest_directory(ran) == digest_directory(newest_run / "model")


def test_failed_refit_keeps_the_chosen_model(searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(searched, tmp_path / "again", symlinks=True)
    answers = TrialRunner.evaluate_all

    def failing_first(self: TrialRunner, recipes: Iterable[Recipe], split: str) -> Iterator[Any]:
        whole, *seeds = recipes
        assert not whole.data.hold_out
        yield StageError("a loss that is no number")
        yield from answers(self, seeds, split)

    monkeypatch.setattr(TrialRunner, "evaluate_all", failing_first)
    recipe = folder / "tiny.yaml"
    done = SearchRun(read_document(recipe), folder, folder / "artifacts", SilentProgress(), resume=True).run()
    final = done.record.final
    assert final is not None and not final.refit
    judged_before = json.loads((searched / "said.json").read_text())["final"]["judged"]
    chosen = next(candidate for candidate in judged_before if candidate["name"] == "as chosen")
    assert [candidate.name for candidate in final.judged][:2] == ["winner", "trial 0"]
    # The chosen model ships without seeds, which would have been trained on other rows.
    for metric in ("accuracy", "size_bytes"):
        assert final.winner.final[metric] == chosen["final"][metric]
    assert final.seeds == ()
    assert digest_directory(done.folder / MODEL) == digest_directory(Path(chosen["folder"]))


def test_resumed_search_has_the_ledger_of_an_uninterrupted_one(searched: Path, tmp_path: Path) -> None:
    artifacts = tmp_path / "artifacts"
    command = ["search", searched / "tiny.yaml", "--artifacts", artifacts]
    for _ in range(2):
        process = tiny_run.start(*command, "--trials", "3")
        time.sleep(random.uniform(1.0, 9.0))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        if (latest(artifacts) / "ledger.jsonl").is_file() and "--resume" not in command:
            command.append("--resume")
    done = tiny_run.compress(*command)
    assert done.returncode == 0, done.stderr
    assert trials(artifacts) == trials(searched / "artifacts")
    assert digest_directory(latest(artifacts) / MODEL) == digest_directory(latest(searched / "artifacts") / MODEL)


class Cluster:
    """A Ray cluster of two nodes with a folder each; the node that receives the third task is killed."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        from ray.cluster_utils import Cluster

        from compress.plugins.ray.ray_workers import RayWorkers

        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        self.cluster, self.folders = Cluster(), [folder / name for name in ("first", "second")]
        memory, submit = 80 * 2**20, RayWorkers._submit
        self.cluster.add_node(num_cpus=0, object_store_memory=memory, include_dashboard=False)
        environments = [{"COMPRESS_WORKER_FOLDER": str(worker_folder)} for worker_folder in self.folders]
        nodes = [
            self.cluster.add_node(num_cpus=1, object_store_memory=memory, env_vars=environment)
            for environment in environments
        ]
        given: list[str] = []

        def submitted(workers: RayWorkers, work: Any, node: Any, lacking: Any) -> None:
            submit(workers, work, node, lacking)
            given.append(node.id)
            if len(given) == 3:
                doomed = next(cluster_node for cluster_node in nodes if cluster_node.node_id == node.id)
                self.cluster.remove_node(doomed, allow_graceful=False)

        patch.setattr(RayWorkers, "_submit", submitted)


@pytest.mark.skipif(not is_todays("ray"), reason="a real cluster is begun every fourth day")
def test_search_survives_the_loss_of_one_of_two_nodes(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    cluster, notes = Cluster(tmp_path, monkeypatch), tiny_run.Notes()
    try:
        document = read_document(searched / "tiny.yaml")
        document.values["search"] |= {"trials": 4, "seeds": 0}
        address = f"ray:{cluster.cluster.address}"
        done = SearchRun(document, searched, tmp_path / "artifacts", notes, workers=address).run()
    finally:
        cluster.cluster.shutdown()
    assert any("was lost" in note for note in notes.said), notes.said
    assert trials(tmp_path / "artifacts") == trials(searched / "artifacts")[:4]
    # The remaining node did the refit on all rows.
    assert digest_directory(done.folder / MODEL) == digest_directory(latest(searched / "artifacts") / MODEL)
    assert any((folder / "cache").is_dir() for folder in cluster.folders)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "There is neither a recipe nor a model"),
        (["--model", "model"], "--model needs --data"),
        (["--model", "model", "--data", "train.csv", "--task", "text-clasification"], "text-classification"),
        (["--model", "model", "--data", "none.csv", "--task", "text-classification"], "does not exist"),
        (["tiny.yaml", "--model", "model"], "both a recipe and a model"),
        (["tiny.yaml", "--set", "search.select.rows=70", "--set", "limits.0.at_least=0.999"], "about 270,555"),
        (["tiny.yaml", "--resume", "--artifacts", "none"], "no search to resume"),
        (["tiny.yaml", "--resume", "--set", "search.confidence=0.9"], "its recipe (search) has changed"),
        (["tiny.yaml", "--set", "search.minimize=accuracy"], "cannot be minimized"),
        (["tiny.yaml", "--set", "targets=[gpu]", "--set", "limits=[]"], "cannot be measured on gpu"),
        (["tiny.yaml", "--set", "search.choices={}"], "the space has the recipe alone"),
    ],
)
def test_bad_input_is_refused(searched: Path, arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(searched)
    with pytest.raises(InputError, match=re.escape(says)):
        CliRunner().invoke(app, ["search", *arguments], catch_exceptions=False)
    assert not (searched / "none").exists()


def test_dry_run_shows_the_choices_and_writes_no_files(searched: Path) -> None:
    command = ("search", "tiny.yaml", "--dry-run", "--artifacts", "none", "--set", "search.optional=[onnx]")
    answer = tiny_run.compress(*command, folder=searched)
    assert answer.returncode == 0, answer.stderr
    assert "starts from tiny.yaml: finetune -> distill -> onnx -> onnx_int8, compared with finetune" in answer.stdout
    assert "  stages.1.distill.student.layers: [0, 1]; or [0]" in answer.stdout
    assert "left out: without onnx:" in answer.stdout, "onnx_int8 takes a graph"
    record = json.loads(tiny_run.compress(*command, "--json", folder=searched).stdout)
    assert (record["size"], len(record["choices"]), record["rows"]) == (4, 2, 60)
    assert not (searched / "none").exists()


@pytest.mark.slow
def test_search_needs_only_a_model_one_data_file_and_limits(tmp_path: Path) -> None:
    """The stages and choices are the defaults for the task, and test and validation rows are split off."""
    tiny_run.ROWS, rows = {**tiny_run.ROWS, "train": 400}, tiny_run.ROWS
    try:
        tiny_run.write_all(tmp_path)
    finally:
        tiny_run.ROWS = rows
    (tmp_path / "test.csv").unlink(), (tmp_path / "validation.csv").unlink()
    options = ["--task", "text-classification", "--keep", "0.5", "--max-size", "1MB", "--trials", "1", "--json"]
    brief = ("benchmark.launches=2", "benchmark.budget_seconds=0.1")
    for change in ("search.seeds=0", "search.rungs=[]", "stages.0.finetune.epochs=0.2", *brief):
        options += ["--set", change]
    done = tiny_run.compress("search", "--model", "model", "--data", "train.csv", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert {parameter["name"] for parameter in record["knobs"]} >= {
        "stages.1.prune.feed_forward", "stages.2.distill.student.layers", "stages.5.onnx_int8.embedding_bits",
        "trim_vocabulary",
    }  # fmt: skip
    best_recipe = yaml.safe_load(
        (tmp_path / "artifacts" / "searches" / record["name"] / "latest" / "best.yaml").read_text()
    )
    assert best_recipe["data"]["source"] == str(tmp_path / "train.csv")
    assert not best_recipe["data"].get("hold_out"), "selection rows are for training once the search is over"
