"""Tests of Ray workers: results equal those of one process, also when workers, disks or transfers fail.

Ray is replaced by `fake_ray`; a search on a real cluster is in `tests/plugins/search/test_search_run.py`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import tiny_run
import torch
from fake_ray import FakeRay, Machine

from compress.models.model import TorchModel
from compress.pipeline.cache import Cache
from compress.pipeline.keys import CachedStages
from compress.pipeline.runner import StageRunner
from compress.plugins.nightly.run import prefetch_stages
from compress.plugins.nightly.suite import SuiteEntry
from compress.plugins.ray.cluster import Cluster
from compress.plugins.ray.jobs import InProcessWorkers, Job, JobContext, JobResult
from compress.plugins.ray.ray_workers import RayWorkers, open_workers
from compress.plugins.ray.task import WorkOrder, pack, unpack_verified
from compress.recipe.recipe import Recipe
from compress.stages.base import Context, Requirements, Stage
from compress.utils.errors import DeviceError, InputError, MissingExtraError, StageError, StorageError


class Nudge(Stage[TorchModel, TorchModel]):
    """A stage that adds ``by`` plus the number of training rows to one tensor, and fails if ``by`` is negative."""

    required_data = Requirements(splits=("train",))
    kind: Literal["nudge"] = "nudge"
    by: float = 1.0

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        if self.by < 0:
            raise StageError(f"It cannot be moved by {self.by:g}.")
        with torch.no_grad():
            next(iter(model.module.parameters())).add_(self.by + len(context.data.split("train")))
        return model


@dataclass(frozen=True)
class Sum:
    """An evaluation that returns the sum of the final model's first tensor."""

    def __call__(self, runner: StageRunner) -> float:
        model = runner.load(runner.recipe.labels()[-1])
        assert isinstance(model, TorchModel)
        return float(next(iter(model.module.parameters())).detach().double().sum())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model, data and a recipe, and return their folder."""
    folder = tmp_path_factory.mktemp("journeys")
    tiny_run.write_all(folder)
    return folder


def recipe(base: Path, *steps: float) -> Recipe:
    read = tiny_run.load(base / "tiny.yaml")
    return read.model_copy(update={"stages": tuple(Nudge(by=by) for by in steps), "baseline": "start"})


def jobs(base: Path) -> list[Job]:
    """Return four jobs with shared first stages, one of which fails at its last stage."""
    paths = ((0.5, 1), (0.5, 2), (0.5, 1, -3), (0.25,))
    return [Job(recipe(base, *steps), evaluate=Sum(), seconds=len(steps)) for steps in paths]


@pytest.fixture(scope="module")
def here(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[JobResult]:
    """Return the results of the same jobs in one process."""
    context = JobContext(base, tmp_path_factory.mktemp("here"), tiny_run.Notes())
    return list(InProcessWorkers(context).run_all(jobs(base)))


def without_times(results: Sequence[JobResult]) -> list[Any]:
    """Return the parts of the results that do not depend on time."""
    stages = ([(stage.name, stage.key, stage.cached) for stage in result.stages] for result in results)
    errors = (result.error and result.error.what for result in results)
    return list(zip((result.evaluation for result in results), stages, errors, strict=True))


class FakeCluster:
    """Workers on two fake machines, and their notes."""

    def __init__(self, base: Path, folder: Path, patch: pytest.MonkeyPatch, seed: int = 0, **more: Machine) -> None:
        self.a, self.b = (Machine(folder / name, host=name) for name in "ab")
        self.ray = FakeRay({"a": self.a, "b": self.b, **more}, seed)
        self.ray.install(patch)
        self.notes, self.context = tiny_run.Notes(), JobContext(base, folder / "driver", tiny_run.Notes())

    def workers(self) -> RayWorkers:
        return RayWorkers(Cluster("", "cpu", (), 1, self.notes), self.context)

    @property
    def said(self) -> str:
        return "\n".join(self.notes.said)


@pytest.fixture
def fake_cluster(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeCluster]:
    return lambda **more: FakeCluster(base, tmp_path, monkeypatch, **more)


@pytest.mark.parametrize("seed", range(3))
def test_results_equal_those_of_one_process(
    base: Path, here: list[JobResult], fake_cluster: Callable[..., FakeCluster], seed: int
) -> None:
    cast = fake_cluster(seed=seed)
    results = list(cast.workers().run_all(jobs(base)))
    assert without_times(results) == without_times(here)
    assert cast.a.ran and cast.b.ran
    # Each shared stage ran once, and all stage outputs are in the driver's cache.
    entries = {entry.name for entry in (cast.context.artifacts / "cache").iterdir() if len(entry.name) == 64}
    assert entries == {stage.key for result in here for stage in result.stages}


def test_only_missing_and_damaged_entries_are_sent(base: Path, fake_cluster: Callable[..., FakeCluster]) -> None:
    cast = fake_cluster()
    cast.b.alive = False
    workers = cast.workers()
    first = list(workers.run_all(jobs(base)[:1]))
    # The model and the data are sent; the machine already has its own outputs.
    assert cast.ray.puts == 2
    key = first[0].stages[-1].key
    weights = next((cast.a.folder / "cache" / key).rglob("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    again = list(workers.run_all([Job(recipe(base, 0.5, 1, 4), evaluate=Sum())]))
    assert cast.ray.puts == 3
    assert again[0].evaluation == pytest.approx((first[0].evaluation or 0) + _moved(base, 4))


def _moved(base: Path, by: float) -> float:
    from safetensors.torch import load_file

    tensors = load_file(base / "model" / "model.safetensors")
    count = tensors["embeddings.word_embeddings.weight"].numel()
    return count * (by + tiny_run.ROWS["train"])


def test_work_of_a_lost_worker_is_repeated(
    base: Path, here: list[JobResult], fake_cluster: Callable[..., FakeCluster]
) -> None:
    cast = fake_cluster()
    cast.a.deaths = 1
    cast.b.when_run = lambda: setattr(cast.b, "alive", len(cast.b.ran) < 2)
    assert without_times(list(cast.workers().run_all(jobs(base)))) == without_times(here)
    assert "worker a (a) was lost" in cast.said
    assert "worker b (b) has disconnected" in cast.said


def test_task_that_kills_three_workers_fails_alone(base: Path, fake_cluster: Callable[..., FakeCluster]) -> None:
    cast = fake_cluster()
    cast.a.deaths = cast.b.deaths = 2
    results = cast.workers().run_all([Job(recipe(base, 0.5)), Job(recipe(base, 0.25), evaluate=Sum())])
    errors = [result.error.what for result in results if result.error]
    assert len(errors) <= 1
    assert all("3 workers were lost" in what for what in errors)


def test_error_without_remaining_workers_suggests_resume(base: Path, fake_cluster: Callable[..., FakeCluster]) -> None:
    cast = fake_cluster()
    for machine in (cast.a, cast.b):
        machine.when_run = lambda machine=machine: setattr(machine, "alive", False)  # type: ignore[misc]
    with pytest.raises(DeviceError, match="No worker is left") as caught:
        list(cast.workers().run_all(jobs(base)))
    assert "--resume" in str(caught.value)


def test_machine_with_full_disk_gets_no_more_tasks(
    base: Path, here: list[JobResult], fake_cluster: Callable[..., FakeCluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    cast, store = fake_cluster(), Cache.store

    def full(self: Cache, key: str, write: Any) -> Any:
        if self.root.parent == cast.a.folder:
            raise StorageError("The disk is full.", where=str(self.root))
        return store(self, key, write)

    monkeypatch.setattr(Cache, "store", full)
    assert without_times(list(cast.workers().run_all(jobs(base)))) == without_times(here)
    assert "worker a (a) is no longer used: The disk is full." in cast.said
    assert len(cast.a.ran) <= 4, "what it lacked, and once more"


def test_machines_with_other_software_or_processor_are_excluded(
    base: Path, tmp_path: Path, fake_cluster: Callable[..., FakeCluster]
) -> None:
    other, old = {"code": "other"}, {"python": "3.9.1"}
    cast = fake_cluster(c=Machine(tmp_path / "c", told=other), d=Machine(tmp_path / "d", told=old))
    cast.a.told = {"processor": "Another 9000", "processor_class": "arm64"}
    cast.b.told = {"packages": {"torch": "1.0"}}
    cast.a.resources = {"target:cpu": 1}
    with pytest.raises(DeviceError, match="No worker can evaluate"):
        list(cast.workers().run_all(jobs(base)))
    assert "worker b (b) is not used: it has accelerate None" in cast.said
    assert "another version of compress itself" in cast.said and "Python 3.9.1" in cast.said
    assert (
        "no times are measured there, its processor differs (Another 9000), and no evaluations run there" in cast.said
    )
    assert not cast.b.ran and "look" not in cast.a.ran and cast.a.ran


@pytest.mark.parametrize("elsewhere", [False, True])
def test_timings_run_alone_on_an_idle_machine(
    base: Path, fake_cluster: Callable[..., FakeCluster], monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    cast = fake_cluster(t=Machine(Path("unused"), processors=0))
    cast.a.host = cast.b.host = None  # on the driver's own machine
    target = cast.ray.machines["t"]
    target.folder, target.host = cast.a.folder.with_name("t"), "t"
    target.resources = {"target:cpu": 1} if elsewhere else {}
    beside: list[int] = []

    def alone(runner: StageRunner) -> int:
        beside.append(sum((pending.node is target) == elsewhere for pending in cast.ray.pending))
        return len(beside)

    monkeypatch.setattr(sys.modules[__name__], "alone", alone, raising=False)
    monkeypatch.setattr("pickle.dumps", lambda one: one), monkeypatch.setattr("pickle.loads", lambda one: one)
    asked = [Job(job.recipe, job.evaluate, alone, job.seconds) for job in jobs(base)]
    results = list(cast.workers().run_all(asked))
    assert beside == [0, 0, 0]
    assert [result.timings is None for result in results] == [False, False, True, False]
    assert (len(target.ran) > 0) == elsewhere


def test_idle_workers_prefetch_expected_jobs(
    base: Path, here: list[JobResult], fake_cluster: Callable[..., FakeCluster]
) -> None:
    cast = fake_cluster()
    workers = cast.workers()
    workers.prefetch([Job(recipe(base, 7.0))])
    guessed = Job(recipe(base, 8.0), evaluate=Sum(), seconds=1)
    results = list(workers.run_all(jobs(base)[:1], lambda arrived: [guessed]))
    assert without_times(results) == without_times(here[:1])
    ran = len(cast.a.ran + cast.b.ran)
    later = list(workers.run_all([Job(recipe(base, 7.0)), guessed]))
    assert [stage.cached for result in later for stage in result.stages] == [False, False], "whoever asks first pays"
    assert len(cast.a.ran + cast.b.ran) <= ran + 2, "nothing was done again"


def test_closed_workers_leave_no_pending_tasks(base: Path, fake_cluster: Callable[..., FakeCluster]) -> None:
    cast = fake_cluster()
    workers = cast.workers()
    results = workers.run_all(jobs(base))
    next(results)
    workers.close()
    assert not cast.ray.pending


@pytest.mark.parametrize(
    ("workers", "says"),
    [("slurm", "no workers 'slurm'"), ("ray:somewhere", "no address"), ("ray:127.0.0.1:1", "cannot be reached")],
)
def test_invalid_and_unreachable_addresses_are_refused(base: Path, workers: str, says: str) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    with pytest.raises(InputError, match=says):
        open_workers(workers, JobContext(base, base / "artifacts", tiny_run.Notes()), "cpu", (), tiny_run.Notes())


def test_error_without_ray_names_the_extra(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'compress-models[ray]'")):
        open_workers("ray", JobContext(base, base / "artifacts", tiny_run.Notes()), "cpu", (), tiny_run.Notes())


def test_order_requests_only_the_inputs_of_the_stage(base: Path) -> None:
    """Outputs of earlier stages that the stage does not read are not needed on the machine."""
    fields = dict.fromkeys(WorkOrder.__dataclass_fields__)
    order = WorkOrder(**{**fields, "earlier": (("a", "1", {}), ("b", "2", {})), "needs": frozenset("b"),
                     "baseline_entries": (("5", {}),), "models": {"m": ("3", "")}, "folders": {}, "data": "4"})  # type: ignore[arg-type]  # fmt: skip
    assert order.digests() == {"2", "3", "4", "5"}


@dataclass(frozen=True)
class CountedEvaluation:
    """An evaluation of the baseline that appends a line to a file on each execution."""

    times: Path

    def __call__(self, runner: StageRunner) -> bool:
        """Return whether the evaluation was cached."""

        def measure(folder: Path) -> dict[str, Any]:
            with self.times.open("a") as file:
                file.write("judged\n")
            (folder / "answers").write_text("all")
            return {"name": "evaluation of baseline"}

        entry, cached = runner.cache.obtain("judged", measure, runner.progress.note, lambda: None)
        runner.measurement_entries.append((entry, cached))
        return cached


@pytest.mark.parametrize("seed", range(3))
def test_baseline_is_evaluated_once(
    base: Path, fake_cluster: Callable[..., FakeCluster], tmp_path: Path, seed: int
) -> None:
    look = CountedEvaluation(tmp_path / "times")
    asked = [Job(recipe(base, step), evaluate=look, evaluate_baseline=look, seconds=1) for step in (0.5, 1, 2, 3)]
    cast = fake_cluster(seed=seed)
    results = list(cast.workers().run_all(asked))
    assert [result.evaluation for result in results] == [True] * 4
    assert look.times.read_text().splitlines() == ["judged"]
    assert Cache(cast.context.artifacts / "cache").find("judged") is not None
    one = InProcessWorkers(JobContext(base, tmp_path / "one", tiny_run.Notes()))
    assert [result.evaluation for result in one.run_all(asked[:2])] == [False, True]


def test_stages_run_before_evaluations_that_can_wait(
    base: Path, fake_cluster: Callable[..., FakeCluster], tmp_path: Path
) -> None:
    look, cast = CountedEvaluation(tmp_path / "times"), fake_cluster()
    asked = [Job(recipe(base, by), evaluate=look, evaluate_baseline=look, seconds=1) for by in (1, 2)]
    list(cast.workers().run_all(asked))
    assert [cast.a.ran[0], cast.b.ran[0]] == ["nudge", "nudge"]


def test_prefetch_waits_until_a_machine_is_idle(base: Path, fake_cluster: Callable[..., FakeCluster]) -> None:
    known: list[int] = []

    def guess(arrived: Mapping[int, JobResult]) -> list[Job]:
        known.append(len(arrived))
        return []

    # The second job waits for the first one's stage and then needs the other machine.
    list(
        fake_cluster().workers().run_all([Job(recipe(base, 1, by), evaluate=Sum(), seconds=1) for by in (2, 3)], guess)
    )
    assert known and min(known) == 1


def test_incomplete_transfer_is_no_cache_entry(tmp_path: Path) -> None:
    def write(folder: Path, text: str = "weights") -> dict[str, Any]:
        (folder / "model").write_text(text)
        return {"name": "stage"}

    sender, receiver = (Cache(tmp_path / name) for name in ("sender", "receiver"))
    entry = sender.store("key", write)
    for fill in (lambda folder: write(folder, "weighty"), lambda folder: None):
        with pytest.raises(StorageError, match="is incomplete"):
            receiver.admit("key", entry.record, fill)
        assert receiver.peek("key") is None
    assert receiver.admit("key", entry.record, write).record == entry.record
    assert receiver.find("key") is not None
    with pytest.raises(StorageError):
        unpack_verified(pack(entry.folder), "another digest", tmp_path / "source")
    assert not (tmp_path / "source").exists()


def test_workers_run_suite_stages_in_advance(
    base: Path, tmp_path: Path, fake_cluster: Callable[..., FakeCluster]
) -> None:
    stages = [{"prune": {"feed_forward": 0.5, "importance_examples": 32}}, {"trim_vocabulary": {}}]
    tiny_run.write_recipe(base, "one", stages=stages, baseline="start")
    tiny_run.write_recipe(base, "two", stages=stages[1:], baseline="start")
    entries = [SuiteEntry(recipe=f"{name}.yaml") for name in ("one", "two", "none")]
    cast = fake_cluster()
    prefetch_stages(entries, base, tmp_path / "driver", "ray", 60, cast.notes)
    for name in ("one", "two"):
        is_cached = CachedStages(tiny_run.load(base / f"{name}.yaml"), base, tmp_path / "driver")
        assert all(map(is_cached, is_cached.recipe.labels()))
    assert "one: 2 stages run by the workers" in cast.said
