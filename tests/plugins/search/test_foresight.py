"""Bytes foretold of recipes that nobody has made, against the bytes of the files once they are made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_run
from transformers import BertConfig, BertModel

from compress.plugins.search.costs import SIZE, CostEstimator
from compress.plugins.search.goal import Goal
from compress.plugins.search.kernel_table import KernelTable
from compress.plugins.search.latency_estimator import LatencyEstimator
from compress.plugins.search.observations import Observations
from compress.plugins.search.outcome import StageCost, TrialOutcome
from compress.plugins.search.refit import Refit
from compress.plugins.search.size_estimator import SizeEstimator
from compress.plugins.search.space import Point, SearchSpace
from compress.plugins.search.trial import TrialRunner
from compress.recipe.document import read_document
from compress.recipe.recipe import Limit
from compress.utils.digests import size_bytes
from compress.utils.progress import SilentProgress

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torch", "ignore::DeprecationWarning")

TRAINED = {"epochs": 0.2, "batch_size": 8}
STAGES = (
    {"finetune": TRAINED},
    {"prune": {"heads": 0.25, "feed_forward": 0.25, "importance_examples": 8}},
    {"trim_vocabulary": {"characters": "seen"}},
    {"distill": {"teacher": "finetune", "student": {"layers": [0, 1]}, "keep_best": False, **TRAINED}},
    {"onnx": {}},
    {"onnx_int8": {}},
)
CHOICES = {
    "stages.1.prune.heads": [0.25, 0.5],
    "stages.1.prune.feed_forward": [0.25, 0.75],
    "stages.2.trim_vocabulary.min_count": [1, 40],
    "stages.3.distill.student.layers": [[0, 1], [0]],
    "stages.5.onnx_int8.embedding_bits": [8, 4],
}


SMALLEST: Point = (1, 1, 1, 1, 1)


class Watched:
    """A search's forecasts, and the one recipe that was made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = tiny_run.write_all(folder, stages=list(STAGES), search={"choices": CHOICES, "select": {"rows": 20}})
        tokenizer = tiny_run.tokenizer()
        config = BertConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                            intermediate_size=128, max_position_embeddings=32)  # fmt: skip
        BertModel(config).save_pretrained(folder / "model")
        self.space = SearchSpace(read_document(path), folder)
        goal = Goal.from_recipe(self.space.base, self.space.search)
        self.trials = TrialRunner.in_process(goal, folder, folder / "artifacts", SilentProgress())
        self.size_estimator = SizeEstimator(self.space, lambda: self.trials.context.runner(self.space.base))
        self.latency_estimator = LatencyEstimator(
            self.size_estimator, KernelTable(1, folder / "kernels", noisy_too=True)
        )
        self.costs = CostEstimator(self.space)
        self.costs.use_estimators(self.size_estimator, self.latency_estimator)
        runner = self.trials.run_recipe(self.space.recipe(SMALLEST))
        self.made = size_bytes(runner.folder_of("onnx_int8"))
        self.stages = tuple(
            StageCost(label=label, key=result.record.key, seconds=1.0, cached=False)
            for label, result in runner.results.items()
        )


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    return Watched(tmp_path_factory.mktemp("foresight"))


def test_bytes_foretold_are_the_bytes_made(watched: Watched) -> None:
    """Of a recipe with other heads, neurons, tokens and bits than those whose graphs are traced."""
    costs, wide, bits = watched.costs, (0, 0, 0, 1, 0), (0, 0, 0, 1, 1)
    assert costs.predict(wide, SIZE) is None, "nothing is known before a trial has made the baseline"
    costs.update(SMALLEST, 0.5, TrialOutcome(stages=watched.stages, seconds=10.0))
    predictions = [costs.predict(point, SIZE) for point in (wide, bits, (1, 1, 1, 1, 0), SMALLEST)]
    assert predictions[3] == watched.made
    assert predictions[0] > predictions[1] > predictions[3] and predictions[0] > predictions[2] > predictions[3]  # type: ignore[operator]
    costs.update(SMALLEST, 1.0, TrialOutcome(final={SIZE: watched.made}, stages=watched.stages, seconds=10.0))
    assert costs.errors[SIZE] == [0.0]
    assert costs.tolerance(SMALLEST, SIZE) < 0.001 and not costs.imprecision_reasons()


def test_bits_of_tables_are_traced_once_whatever_the_layers(watched: Watched) -> None:
    """As many layers with usual tables, and with other layers both: the same to the byte, and no graph more."""
    few = foreseen(watched, watched.space, 3)
    for point in ((1, 1, 1, 1, 0), (1, 1, 1, 0, 1), SMALLEST):
        assert few.size_bytes(point) is not None, point
    assert few.size_bytes(SMALLEST) == watched.made and not few.unavailable_reason
    latency_estimator = LatencyEstimator(few, watched.latency_estimator.table)
    whole, summed = watched.latency_estimator.kernel_sum(SMALLEST), latency_estimator.kernel_sum(SMALLEST)
    assert whole is not None and summed is not None
    assert summed.megabytes == pytest.approx(whole.megabytes) and summed.milliseconds == pytest.approx(
        whole.milliseconds, rel=0.02
    )


def test_what_all_rows_would_make_of_it_is_foretold_too(watched: Watched) -> None:
    """Its vocabulary has the words of the rows that chose; a limit between the two sizes lets none of both be tried."""
    watched.size_estimator.start(TrialOutcome(stages=watched.stages))
    recipe = watched.space.recipe(SMALLEST, refit=True)
    predicted_bytes = watched.size_estimator.with_data_of(watched.trials.context.runner(recipe)).size_bytes(SMALLEST)
    actual_bytes = size_bytes(watched.trials.run_recipe(recipe).folder_of("onnx_int8"))
    assert predicted_bytes == actual_bytes != watched.made
    refit = Refit(watched.space, watched.trials, watched.size_estimator)
    for most, may_ship in ((actual_bytes, True), (actual_bytes - 1, False)):
        goal = Goal((SIZE,), (Limit(metric=SIZE, at_most=most),), 0.95)
        known = Observations(goal, 2, SMALLEST, finished={SMALLEST: TrialOutcome(baseline={SIZE: 1e6})})
        assert refit.fits_limits(SMALLEST, known) == may_ship


def foreseen(watched: Watched, space: SearchSpace, most: int) -> SizeEstimator:
    """Of a space on the same start, in which so many structures are traced at most."""
    estimator = SizeEstimator(space, lambda: watched.trials.context.runner(watched.space.base))
    estimator.max_structures = most
    estimator.start(TrialOutcome(stages=watched.stages))
    return estimator


def other_space(watched: Watched, folder: Path, **block: object) -> SearchSpace:
    """The same recipe with other choices."""
    path = tiny_run.write_all(folder, stages=list(STAGES), search={**block, "select": {"rows": 20}})
    return SearchSpace(read_document(path), watched.folder)


LAYERS = {"stages.3.distill.student.layers": [[0, 1], [0]]}


def test_bytes_of_a_graph_that_is_not_traced_are_told_by_its_weights(watched: Watched, tmp_path: Path) -> None:
    """After the first trial, which says how many bytes a model has beside its weights in so many bits."""
    choices = {**LAYERS, "stages.5.onnx_int8.per_channel": [True, False], "stages.1.prune.heads": [0.25, 0.5]}
    space = other_space(watched, tmp_path, choices=choices)
    few, all_ = foreseen(watched, space, 3), foreseen(watched, space, 9)
    first = all_.size_bytes(space.origin)
    costs = CostEstimator(space)
    costs.use_estimators(few, watched.latency_estimator)
    costs.update(space.origin, 1.0, TrialOutcome(stages=watched.stages, final={SIZE: float(first or 0)}))
    for point in ((1, 0, 0), (0, 0, 0), (0, 1, 0)):
        assert few.size_bytes(point) is not None
    assert few.size_bytes((1, 1, 1)) is None and "more structures than are traced" in few.unavailable_reason
    weights, whole = few.weight_counts((1, 1, 1)), few.weight_counts((0, 0, 0))
    assert weights is not None and whole is not None and weights.layers == 1 and whole.layers == 2
    assert costs.predict((1, 1, 1), SIZE) == pytest.approx(all_.size_bytes((1, 1, 1)), rel=0.1)
    assert costs.tolerance((1, 1, 1), SIZE) > costs.tolerance((1, 0, 1), SIZE)


def test_a_time_is_that_of_its_kernels_with_rows_of_usual_length(watched: Watched) -> None:
    watched.size_estimator.start(TrialOutcome(stages=watched.stages))
    wide, narrow = (0, 0, 0, 1, 0), (1, 1, 0, 1, 0)
    batch = watched.size_estimator.typical_batch(wide)
    assert batch is not None and batch["input_ids"].shape[0] == 1
    rows = watched.trials.context.runner(watched.space.base).inputs.data.split("select")
    words = np.median([len(text.split()) for text in rows["text"].to_pylist()])
    assert words + 2 <= batch["input_ids"].shape[1] <= 16
    sums = [watched.latency_estimator.kernel_sum(point) for point in (wide, narrow)]
    assert None not in sums and sums[0] != sums[1]
    assert sums[0] is not None
    predicted_seconds = 0.005 + 1.1 * sums[0].milliseconds + 0.01 * sums[0].megabytes
    assert watched.latency_estimator.predict(wide) == pytest.approx(predicted_seconds, rel=1e-6)
    watched.latency_estimator.update(wide, 1.2 * predicted_seconds)
    assert watched.latency_estimator.predict(wide) == pytest.approx(1.2 * predicted_seconds, rel=0.03)


def test_sums_are_found_again_in_the_folder_of_the_search(watched: Watched, tmp_path: Path) -> None:
    """So that a search that goes on decides as before, whatever the user's table has by then."""
    watched.size_estimator.start(TrialOutcome(stages=watched.stages))
    watched.latency_estimator.use_snapshot(tmp_path)
    kernel_sum = watched.latency_estimator.kernel_sum((0, 1, 0, 1, 0))
    later = LatencyEstimator(watched.size_estimator, KernelTable(1, tmp_path / "none"))
    later.use_snapshot(tmp_path)
    assert kernel_sum is not None and later.kernel_sum((0, 1, 0, 1, 0)) == kernel_sum
    assert later.table is not None and not later.table.measured


def test_a_space_of_few_recipes_is_not_worth_tracing(watched: Watched) -> None:
    few = SizeEstimator(watched.space, lambda: pytest.fail("no data is read"))
    watched.space.__dict__["_listed"], listed = [SMALLEST], watched.space._listed
    try:
        few.start(TrialOutcome(stages=watched.stages))
    finally:
        watched.space.__dict__["_listed"] = listed
    assert not few.is_ready and few.size_bytes(SMALLEST) is None
