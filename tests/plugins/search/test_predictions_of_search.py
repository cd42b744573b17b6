"""Tests of size and cost predictions and of the search space: predicted sizes against exported files."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from transformers import BertConfig, BertModel

from compress.plugins.ray.jobs import JobContext
from compress.plugins.search.costs import SIZE, CostEstimator
from compress.plugins.search.final_evaluation import Refit
from compress.plugins.search.observations import Observations
from compress.plugins.search.outcome import Goal, StageCost, TrialOutcome
from compress.plugins.search.size_estimator import SizeEstimator
from compress.plugins.search.space import Point, SearchSpace, shorten_training
from compress.plugins.search.trial import TrialRunner
from compress.recipe.document import read_document
from compress.recipe.recipe import Limit
from compress.utils.errors import InputError, RecipeError
from compress.utils.progress import SilentProgress
from compress.utils.storage import size_bytes

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning:torch", "ignore::DeprecationWarning")]

TRAINED = {"epochs": 0.2, "batch_size": 8}
STAGES = (
    {"finetune": TRAINED}, {"prune": {"heads": 0.25, "feed_forward": 0.25, "importance_examples": 8}},
    {"trim_vocabulary": {"characters": "seen"}},
    {"distill": {"teacher": "finetune", "student": {"layers": [0, 1]}, "keep_best": False, **TRAINED}},
    {"onnx": {}}, {"onnx_int8": {}},
)  # fmt: skip
CHOICES = {"stages.1.prune.heads": [0.25, 0.5], "stages.1.prune.feed_forward": [0.25, 0.75],
    "stages.2.trim_vocabulary.min_count": [1, 40], "stages.3.distill.student.layers": [[0, 1], [0]],
    "stages.5.onnx_int8.embedding_bits": [8, 4]}  # fmt: skip
SMALLEST: Point = (1, 1, 1, 1, 1)


class PredictedSearch:
    """A search space with its size and cost estimators, and one executed recipe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = tiny_run.write_all(folder, stages=list(STAGES), search={"choices": CHOICES, "select": {"rows": 20}})
        tokenizer = tiny_run.tokenizer()
        config = BertConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                            intermediate_size=128, max_position_embeddings=32)  # fmt: skip
        BertModel(config).save_pretrained(folder / "model")
        self.space = SearchSpace(read_document(path), folder)
        goal = Goal.from_recipe(self.space.base)
        self.trials = TrialRunner.in_process(goal, JobContext(folder, folder / "artifacts", SilentProgress()))
        self.size_estimator = SizeEstimator(self.space, lambda: self.trials.context.runner(self.space.base))
        self.costs = CostEstimator(self.space, self.size_estimator)
        runner = self.trials.run_recipe(self.space.recipe(SMALLEST))
        self.made = size_bytes(runner.folder_of("onnx_int8"))
        self.stages = tuple(
            StageCost(label=label, key=result.record.key, seconds=1.0, cached=False)
            for label, result in runner.results.items()
        )


@pytest.fixture(scope="module")
def predicted_search(tmp_path_factory: pytest.TempPathFactory) -> PredictedSearch:
    return PredictedSearch(tmp_path_factory.mktemp("foresight"))


def test_predicted_size_equals_exported_size(predicted_search: PredictedSearch) -> None:
    """The recipe has other heads, neurons, tokens and bits than the traced graphs."""
    costs, wide, bits = predicted_search.costs, (0, 0, 0, 1, 0), (0, 0, 0, 1, 1)
    assert costs.predict(wide, SIZE) is None, "nothing is known before a trial has made the baseline"
    costs.update(SMALLEST, 0.5, TrialOutcome(stages=predicted_search.stages, seconds=10.0))
    largest, *middle, least = (costs.predict(point, SIZE) for point in (wide, bits, (1, 1, 1, 1, 0), SMALLEST))
    assert least == predicted_search.made
    assert all(largest > size > least for size in middle)  # type: ignore[operator]
    costs.update(
        SMALLEST, 1.0, TrialOutcome(final={SIZE: predicted_search.made}, stages=predicted_search.stages, seconds=10.0)
    )
    assert costs.errors[SIZE] == [0.0]
    assert costs.tolerance(SMALLEST, SIZE) < 0.001 and not costs.imprecision_reasons()


def test_embedding_bits_need_no_trace_for_each_layer_count(predicted_search: PredictedSearch) -> None:
    """Three traced graphs suffice to predict all combinations of layers and embedding bits exactly."""
    few = size_estimator_for(predicted_search, predicted_search.space, 3)
    for point in ((1, 1, 1, 1, 0), (1, 1, 1, 0, 1), SMALLEST):
        assert few.size_bytes(point) is not None, point
    assert few.size_bytes(SMALLEST) == predicted_search.made and not few.unavailable_reason


def test_size_after_refit_is_predicted(predicted_search: PredictedSearch) -> None:
    """A refit also has the words of the selection rows; a limit between the two sizes excludes the recipe."""
    predicted_search.size_estimator.start(TrialOutcome(stages=predicted_search.stages))
    recipe = predicted_search.space.recipe(SMALLEST, refit=True)
    predicted_bytes = predicted_search.size_estimator.with_data_of(
        predicted_search.trials.context.runner(recipe)
    ).size_bytes(SMALLEST)
    actual_bytes = size_bytes(predicted_search.trials.run_recipe(recipe).folder_of("onnx_int8"))
    assert predicted_bytes == actual_bytes != predicted_search.made
    refit = Refit(predicted_search.space, predicted_search.trials, predicted_search.size_estimator)
    for most, may_ship in ((actual_bytes, True), (actual_bytes - 1, False)):
        goal = Goal((SIZE,), (Limit(metric=SIZE, at_most=most),), 0.95)
        known = Observations(goal, 2, SMALLEST, finished={SMALLEST: TrialOutcome(baseline={SIZE: 1e6})})
        assert refit.fits_limits(SMALLEST, known) == may_ship


def size_estimator_for(predicted_search: PredictedSearch, space: SearchSpace, most: int) -> SizeEstimator:
    """Return a size estimator for another space of the same model, with a limit on traced structures."""
    estimator = SizeEstimator(space, lambda: predicted_search.trials.context.runner(predicted_search.space.base))
    estimator.max_structures = most
    estimator.start(TrialOutcome(stages=predicted_search.stages))
    return estimator


def other_space(predicted_search: PredictedSearch, folder: Path, **block: object) -> SearchSpace:
    """Return a search space of the same recipe with other choices."""
    path = tiny_run.write_all(folder, stages=list(STAGES), search={**block, "select": {"rows": 20}})
    return SearchSpace(read_document(path), predicted_search.folder)


LAYERS = {"stages.3.distill.student.layers": [[0, 1], [0]]}


def test_size_of_untraced_graph_is_predicted_from_its_weights(
    predicted_search: PredictedSearch, tmp_path: Path
) -> None:
    """The first trial calibrates the bytes that a model has beside its weights."""
    choices = {**LAYERS, "stages.5.onnx_int8.per_channel": [True, False], "stages.1.prune.heads": [0.25, 0.5]}
    space = other_space(predicted_search, tmp_path, choices=choices)
    few, all_ = size_estimator_for(predicted_search, space, 3), size_estimator_for(predicted_search, space, 9)
    first = all_.size_bytes(space.origin)
    costs = CostEstimator(space, few)
    costs.update(space.origin, 1.0, TrialOutcome(stages=predicted_search.stages, final={SIZE: float(first or 0)}))
    for point in ((1, 0, 0), (0, 0, 0), (0, 1, 0)):
        assert few.size_bytes(point) is not None
    assert few.size_bytes((1, 1, 1)) is None and "beyond the traced structures" in few.unavailable_reason
    weights, whole = few.weight_counts((1, 1, 1)), few.weight_counts((0, 0, 0))
    assert weights is not None and whole is not None and weights.layers == 1 and whole.layers == 2
    assert costs.predict((1, 1, 1), SIZE) == pytest.approx(all_.size_bytes((1, 1, 1)), rel=0.1)
    assert costs.tolerance((1, 1, 1), SIZE) > costs.tolerance((1, 0, 1), SIZE)


def test_resumed_search_keeps_its_limit_on_traced_structures(predicted_search: PredictedSearch, tmp_path: Path) -> None:
    """The limit is kept although tracing takes no time with cached graphs."""
    choices = {**LAYERS, "stages.5.onnx_int8.per_channel": [True, False], "stages.1.prune.heads": [0.25, 0.5]}
    hasty = size_estimator_for(predicted_search, other_space(predicted_search, tmp_path, choices=choices), 9)
    hasty.use_snapshot(tmp_path)
    hasty._spent = 1e9
    assert hasty.size_bytes((0, 0, 0)) is not None and hasty.max_structures == 1
    later = SizeEstimator(hasty.space, lambda: pytest.fail("no data is read"))
    later.use_snapshot(tmp_path)
    assert later.max_structures == 1


def test_small_search_space_is_not_traced(predicted_search: PredictedSearch) -> None:
    few = SizeEstimator(predicted_search.space, lambda: pytest.fail("no data is read"))
    predicted_search.space.__dict__["_listed"], listed = [SMALLEST], predicted_search.space._listed
    try:
        few.start(TrialOutcome(stages=predicted_search.stages))
    finally:
        predicted_search.space.__dict__["_listed"] = listed
    assert not few.is_ready and few.size_bytes(SMALLEST) is None


COST_STAGES = (
    {"finetune": {"epochs": 1}}, {"prune": {"feed_forward": 0.5}},
    {"distill": {"teacher": "finetune", "student": {"layers": [0, 1]}, "epochs": 1}}, {"onnx": {}}, {"onnx_int8": {}},
)  # fmt: skip
COST_CHOICES = {
    "stages.1.prune.feed_forward": [0.25, 0.5, 0.75],
    "stages.2.distill.student.layers": [[0], [0, 1]],
    "stages.4.onnx_int8.embedding_bits": [8, 4],
}


@pytest.fixture
def costs(folder: Path) -> CostEstimator:
    return CostEstimator(space(folder, COST_STAGES, choices=COST_CHOICES))


def made(costs: CostEstimator, point: Point, size: float, seconds: float = 10.0) -> TrialOutcome:
    """Return a trial outcome in which every stage took ``seconds``."""
    steps = costs.predicted_stages(point)
    stages = tuple(StageCost(label=step.kind, key=step.key, seconds=seconds, cached=False) for step in steps)
    return TrialOutcome(final={"size_bytes": size}, stages=stages, seconds=seconds * len(stages) + 2)


def test_size_predictions_learn_a_factor_for_each_choice(costs: CostEstimator) -> None:
    """The sizes are the stages' predictions times one factor for each choice, which a few trials determine."""
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


def test_finished_stages_have_no_remaining_cost(costs: CostEstimator) -> None:
    origin, bits, width = (0, 0, 0), (0, 0, 1), (1, 0, 0)
    costs.update(origin, 1.0, made(costs, origin, 1000.0))
    beside = costs.corrected_remaining_seconds(origin)
    assert beside == pytest.approx(1.0), "judging alone is left, and of the first trial the baseline was judged too"
    assert costs.corrected_remaining_seconds(bits) == pytest.approx(beside + 10, rel=0.01), "quantize alone"
    kinds = [step.kind for step in costs.predicted_stages(width)]
    assert costs.corrected_remaining_seconds(width) > beside + 10 * (len(kinds) - 2) * 0.5, "all behind the baseline"
    assert costs.corrected_remaining_seconds(origin, share=1 / 3) > beside, "less training is another model"


def test_recipes_with_equal_layers_and_stages_are_one_family(costs: CostEstimator) -> None:
    assert costs.family((0, 0, 0)) == costs.family((1, 0, 1))
    assert costs.family((0, 0, 0)) != costs.family((0, 1, 0))


SPACE_STAGES = (
    {"finetune": {"epochs": 2}}, {"prune": {"heads": 0.5, "feed_forward": 0.5}}, {"trim_vocabulary": {}},
    {"distill": {"teacher": "finetune", "student": {"layers": [0, 1]}, "epochs": 3}}, {"onnx": {}}, {"onnx_int8": {}},
)  # fmt: skip
SPACE_CHOICES = {
    "stages.1.prune.feed_forward": [0.25, 0.5],
    "stages.1.heads": [0, 0.5],
    "stages.3.distill.student.layers": [[0], [0, 1]],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models_folder = tmp_path_factory.mktemp("space")
    tiny_run.write_all(models_folder)
    return models_folder


def space(folder: Path, stages: Any = SPACE_STAGES, **block: Any) -> SearchSpace:
    search = {"choices": SPACE_CHOICES, "select": {"rows": 20}, **block}
    path = tiny_run.write_recipe(folder, "space", stages=list(stages), search=search)
    return SearchSpace(read_document(path), folder)


def test_parameters_list_the_value_of_the_recipe_first(folder: Path) -> None:
    search_space = space(folder, optional=["trim_vocabulary"])
    assert [(parameter.name, parameter.values) for parameter in search_space.parameters] == [
        ("trim_vocabulary", ("kept", "left out")),
        ("stages.1.prune.feed_forward", (0.5, 0.25)),
        ("stages.1.heads", (0.5, 0)),
        ("stages.3.distill.student.layers", ([0, 1], [0])),
    ]
    assert search_space.size == 16
    assert search_space.origin == (0, 0, 0, 0)
    assert search_space.describe(search_space.origin) == "the recipe as it stands"


def test_stages_of_a_point_equal_those_of_its_recipe(folder: Path) -> None:
    search_space = space(folder, optional=["trim_vocabulary"])
    for point in search_space.points(0):
        assert search_space.recipe(point).stages == search_space.stages(point)
    point = (1, 1, 0, 1)
    assert search_space.describe(point) == "no trim_vocabulary, prune.feed_forward 0.25, distill.student.layers [0]"
    assert search_space.recipe(point).labels() == ("finetune", "prune", "distill", "onnx", "onnx_int8")


def test_parameters_of_omitted_stages_are_ignored(folder: Path) -> None:
    search_space = space(folder, optional=["prune"])
    points = list(search_space.points(0))
    # With prune: 2 x 2 x 2; without it only the layers vary.
    assert len(points) == 8 + 2
    every = itertools.product(*(range(len(parameter.values)) for parameter in search_space.parameters))
    assert {search_space.identity(point) for point in every} == {search_space.identity(point) for point in points}
    assert len({search_space.identity(point) for point in points}) == len(points)


def test_only_stages_after_the_baseline_are_trained_for_a_share(folder: Path) -> None:
    search_space = space(folder)
    recipe = search_space.recipe(search_space.origin, share=1 / 3)
    assert [stage.epochs for stage in recipe.stages if stage.kind in ("finetune", "distill")] == [2, pytest.approx(1)]
    assert recipe.stages[1] == search_space.base.stages[1], "pruning at once trains nothing, so that rungs share it"
    assert shorten_training(recipe, 1.0) == recipe.stages


def test_selection_rows_are_held_out_of_every_recipe(folder: Path) -> None:
    search_space = space(folder)
    (held,) = search_space.base.data.hold_out or ()
    assert (held.rows, held.source, held.split) == (20, "train", "select")
    assert search_space.recipe((0, 1, 1)).data == search_space.base.data


def test_invalid_value_is_reported_and_omitted(folder: Path) -> None:
    search_space = space(folder, choices={**SPACE_CHOICES, "stages.1.prune.heads": [0.25, 2]})
    values = {parameter.name: parameter.values for parameter in search_space.parameters}
    assert values["stages.1.prune.heads"] == (0.5, 0.25)
    assert list(search_space.rejected) == ["stages.1.prune.heads=2"]


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"choices": {"stages.9.prune.heads": [0]}}, "a field of one of the stages finetune, prune"),
        ({"choices": {"seed": [1, 2]}}, "cannot vary"),
        ({"choices": {"stages.0.finetune.epochs": [1]}}, "would change the baseline 'finetune'"),
        ({"choices": {"stages.1.prune.heads": [7, 9]}}, "No value of stages.1.prune.heads can be tried"),
        ({"choices": {"stages.1.prune.heads": [0.5]}}, "nothing to search"),
        ({"optional": ["prun"]}, "Did you mean 'prune'"),
    ],
)
def test_invalid_search_spaces_are_refused(folder: Path, block: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        space(folder, **block)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [("budget", "soon", "90s, 60m or 1h30m"), ("rungs", [0.5, 0.2], "rising shares"), ("confidence", 0.4, "0.5")],
)
def test_errors_in_the_search_block_are_recipe_errors(folder: Path, field: str, value: Any, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        space(folder, **{field: value})
    assert f"search.{field}" in str(caught.value)
    assert expected in str(caught.value)
