"""Predictions before a recipe runs: sizes corrected by what was made, seconds of what nobody has done yet."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_run

from compress.plugins.search.costs import CostEstimator
from compress.plugins.search.outcome import StageCost, TrialOutcome
from compress.plugins.search.space import Point, SearchSpace
from compress.recipe.document import read_document

STAGES = (
    {"finetune": {"epochs": 1}},
    {"prune": {"feed_forward": 0.5}},
    {"distill": {"teacher": "finetune", "student": {"layers": [0, 1]}, "epochs": 1}},
    {"onnx": {}},
    {"onnx_int8": {}},
)
CHOICES = {
    "stages.1.prune.feed_forward": [0.25, 0.5, 0.75],
    "stages.2.distill.student.layers": [[0], [0, 1]],
    "stages.4.onnx_int8.embedding_bits": [8, 4],
}


@pytest.fixture
def costs(tmp_path: Path) -> CostEstimator:
    path = tiny_run.write_all(tmp_path, stages=list(STAGES), search={"choices": CHOICES, "select": {"rows": 20}})
    return CostEstimator(SearchSpace(read_document(path), tmp_path))


def made(costs: CostEstimator, point: Point, size: float, seconds: float = 10.0) -> TrialOutcome:
    """A trial each of whose stages took as long."""
    stages = tuple(
        StageCost(label=step.kind, key=step.key, seconds=seconds, cached=False)
        for step in costs.predicted_stages(point)
    )
    return TrialOutcome(final={"size_bytes": size}, stages=stages, seconds=seconds * len(stages) + 2)


def test_nothing_is_foretold_before_anything_was_made(costs: CostEstimator) -> None:
    assert costs.predict(costs.space.origin, "size_bytes") is None
    assert costs.predict(costs.space.origin, "accuracy") is None


def test_sizes_follow_the_stages_own_arithmetic_and_what_was_made(costs: CostEstimator) -> None:
    """Were sizes what the stages foretell times a factor for each choice, all would be known after a few trials."""
    factors = {0: (1.1, 1.2, 1.3), 1: (1.0, 0.9), 2: (1.0, 1.05)}
    points = list(costs.space.points(0))

    def size(point: Point) -> float:
        predicted_bytes = costs.predicted_stages(point)[-1].disk
        assert predicted_bytes is not None
        for parameter, choice in enumerate(point):
            predicted_bytes *= factors[parameter][choice]
        return predicted_bytes

    tried = [point for point in points if sum(point) % 2 == 0]
    for point in tried:
        costs.update(point, 1.0, made(costs, point, size(point)))
    off = [abs((costs.predict(point, "size_bytes") or 0) / size(point) - 1) for point in {*points} - {*tried}]
    assert max(off) < 0.01
    assert len(costs.errors["size_bytes"]) == len(tried) - 1


def test_stages_that_were_done_cost_nothing_again(costs: CostEstimator) -> None:
    origin, bits, width = (0, 0, 0), (0, 0, 1), (1, 0, 0)
    costs.update(origin, 1.0, made(costs, origin, 1000.0))
    beside = costs.corrected_remaining_seconds(origin)
    assert beside == pytest.approx(1.0), "judging alone is left, and of the first trial the baseline was judged too"
    assert costs.corrected_remaining_seconds(bits) == pytest.approx(beside + 10, rel=0.01), "quantize alone"
    kinds = [step.kind for step in costs.predicted_stages(width)]
    assert costs.corrected_remaining_seconds(width) > beside + 10 * (len(kinds) - 2) * 0.5, "all behind the baseline"
    assert costs.corrected_remaining_seconds(origin, share=1 / 3) > beside, "less training is another model"


def test_recipes_of_as_many_layers_and_the_same_stages_are_a_family(costs: CostEstimator) -> None:
    assert costs.family((0, 0, 0)) == costs.family((1, 0, 1))
    assert costs.family((0, 0, 0)) != costs.family((0, 1, 0))
