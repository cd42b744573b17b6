"""`prune` in recipes of language models: what it is asked, what it predicts, and who reads what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_generation import write_all

from compress.models.checkpoint import Checkpoint
from compress.models.torch_model import TorchModel
from compress.pipeline.runner import StageRunner
from compress.recipe.loading import read_recipe
from compress.stages.blockwise.cost import pruning_flops
from compress.stages.cost_model import PlanContext, Shape
from compress.stages.prune.stage import Prune
from compress.tasks.registry import get_task
from compress.utils.progress import SilentProgress

LANGUAGE, CLASSES, SPEECH = (
    get_task(name).capabilities for name in ("text-generation", "text-classification", "automatic-speech-recognition")
)
SHAPE = Shape(embeddings=1000, attention=80, feed_forward=160, other=10, layers=4, hidden=10, intermediate=32, heads=4)
PLAN = PlanContext(64, True, {}, {}, lambda name, random: None, lambda: 1e9, generates=True)


def test_fields_of_the_other_kind_of_task_mean_nothing() -> None:
    assert Prune.supports(LANGUAGE) and Prune.supports(CLASSES) and not Prune.supports(SPEECH)
    assert (Prune(layers=1).preferred_input(LANGUAGE), Prune(layers=1).preferred_input(CLASSES)) == (Checkpoint, TorchModel)
    mixed = Prune(layers=1, learning_rate=1e-3, importance="magnitude", samples=3, layer_importance="greedy")
    assert mixed.idle_fields(LANGUAGE) == ("learning_rate", "importance")
    assert mixed.idle_fields(CLASSES) == ("layer_importance", "samples")
    assert not Prune(heads=0.5, feed_forward=0.5, multiple=64).idle_fields(CLASSES)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"layers": 1, "method": "wanda"}, "sparsity or a pattern"),
        ({"sparsity": 0.5, "method": "wanda", "scope": "global"}, "scope: layer"),
        ({"sparsity": 0.5, "pattern": "4x1", "method": "sparsegpt"}, "not blocks"),
        ({"sparsity": 0.5, "experts": 0.5}, "either sparsity or a pattern"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Prune(**fields)


def test_predictions_count_every_trial() -> None:
    greedy = Prune(layers=2, layer_importance="greedy", bridge=False, samples=2, sequence_length=50)
    total = 0.0
    for left in (4, 3):
        for place in range(left):
            total += left - place - 1  # blocks of this trial's tail, of 60 weights each
            total += 1 + 1000 / 60  # its part of the whole pass, and the head
    assert pruning_flops(greedy, SHAPE) == pytest.approx(2 * 100 * 60 * total)
    plain = Prune(layers=2, samples=2, sequence_length=50, bridge=False)
    fitted = plain.model_copy(update={"bridge": True})
    # Another pass, and what enters the layer that is solved multiplied with itself.
    assert pruning_flops(fitted, SHAPE) == 2 * (2 * 100 * 240 + 100 * SHAPE.intermediate**2)
    assert pruning_flops(plain, SHAPE) == 2 * 100 * 240
    found = plain.predict(SHAPE, PLAN)
    assert found.shape is not None and found.shape.layers == 2 and found.disk_bytes.value == 4 * (1000 + 10 + 120)
    assert found.seconds.value == pytest.approx(2 * 100 * 240 / 1e9) and found.peak_memory_bytes.value
    sized = Prune(sparsity=0.5).predict(SHAPE, PLAN)
    assert sized.seconds.flops is None and (sized.seconds.value or 0) < 1
    assert plain.search_values(SHAPE)["layers"] == (1, 2, 3)


def test_what_it_leaves_goes_down_the_road(tmp_path: Path) -> None:
    few = {"samples": 4, "sequence_length": 16}
    stages = [
        {"prune": {"layers": 1, **few}},
        {"prune": {"feed_forward": 0.4, **few}},
        {"gptq": {"method": "rtn", "group_size": 32}},
    ]
    runner = StageRunner(
        read_recipe(write_all(tmp_path, stages=stages)), tmp_path, tmp_path / "artifacts", SilentProgress()
    )
    for label in runner.recipe.labels():
        record = runner.run_stage(label)
        assert {"predictions", "saved and loaded"} <= {one.check for one in record.integrity}
    assert Checkpoint(runner.folder_of("prune-2")).config["intermediate_size"] == 64
    assert isinstance(runner.load("prune"), TorchModel)
