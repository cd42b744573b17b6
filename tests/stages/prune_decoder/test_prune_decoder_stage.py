"""`prune` in recipes of language models: what it is asked, what it predicts, and who reads what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_generation import write_all

from compress.models.checkpoint import Checkpoint
from compress.models.model import TorchModel
from compress.pipeline.runner import StageRunner
from compress.recipe.loading import read_recipe
from compress.stages.cost_model import PlanContext, Shape
from compress.stages.prune.stage import Prune
from compress.stages.prune_decoder.settings import pruning_flops
from compress.stages.prune_decoder.stage import PruneDecoder
from compress.stages.sparsify.stages import SparsifyDecoder
from compress.tasks.registry import get_task
from compress.utils.progress import SilentProgress

LANGUAGE, CLASSES, SPEECH = (
    get_task(name).capabilities for name in ("text-generation", "text-classification", "automatic-speech-recognition")
)
SHAPE = Shape(embeddings=1000, attention=80, feed_forward=160, other=10, layers=4, hidden=10, intermediate=32, heads=4)
PLAN = PlanContext(64, True, {}, {}, lambda name, random: None, lambda: 1e9, generates=True)


def test_each_stage_is_for_its_kind_of_model() -> None:
    assert [stage.supports(LANGUAGE) for stage in (Prune, PruneDecoder, SparsifyDecoder)] == [False, True, True]
    assert [stage.supports(CLASSES) for stage in (Prune, PruneDecoder, SparsifyDecoder)] == [True, False, False]
    assert not Prune.supports(SPEECH) and not PruneDecoder.supports(SPEECH)
    assert (PruneDecoder.input_type(), Prune.input_type()) == (Checkpoint, TorchModel)


def test_fields_without_an_effect_are_refused() -> None:
    with pytest.raises(ValueError, match="layers, which layer_importance concerns"):
        PruneDecoder(heads=0.5, layer_importance="greedy")
    with pytest.raises(ValueError, match="heads or feed_forward, which multiple concerns"):
        PruneDecoder(layers=1, multiple=32)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"method": "wanda"}, "sparsity or a pattern"),
        ({"sparsity": 0.5, "samples": 4}, "method: wanda or sparsegpt"),
        ({"sparsity": 0.5, "method": "wanda", "damp_percent": 0.1}, "method: sparsegpt"),
        ({"sparsity": 0.5, "pattern": "4x1", "method": "sparsegpt"}, "not blocks"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SparsifyDecoder(**fields)


def test_predictions_count_every_trial() -> None:
    greedy = PruneDecoder(layers=2, layer_importance="greedy", compensate=False, samples=2, sequence_length=50)
    total = 0.0
    for left in (4, 3):
        for trial in range(left):
            total += left - trial - 1  # blocks of this trial's tail, of 60 weights each
            total += 1 + 1000 / 60  # its part of the whole pass, and the head
    assert pruning_flops(greedy, SHAPE) == pytest.approx(2 * 100 * 60 * total)
    plain = PruneDecoder(layers=2, samples=2, sequence_length=50, compensate=False)
    fitted = plain.model_copy(update={"compensate": True})
    # Another pass, and what enters the layer that is solved multiplied with itself.
    assert pruning_flops(fitted, SHAPE) == 2 * (2 * 100 * 240 + 100 * SHAPE.intermediate**2)
    assert pruning_flops(plain, SHAPE) == 2 * 100 * 240
    prediction = plain.predict(SHAPE, PLAN)
    assert (
        prediction.shape is not None
        and prediction.shape.layers == 2
        and prediction.disk_bytes.value == 4 * (1000 + 10 + 120)
    )
    assert prediction.seconds.value == pytest.approx(2 * 100 * 240 / 1e9) and prediction.peak_memory_bytes.value
    sized = SparsifyDecoder(sparsity=0.5).predict(SHAPE, PLAN)
    assert sized.seconds.flops is None and (sized.seconds.value or 0) < 1
    assert plain.search_values(SHAPE)["layers"] == (1, 2, 3)


def test_what_it_leaves_goes_down_the_road(tmp_path: Path) -> None:
    few = {"samples": 4, "sequence_length": 16}
    stages = [
        {"prune_decoder": {"layers": 1, **few}},
        {"prune_decoder": {"feed_forward": 0.4, **few}},
        {"gptq": {"method": "rtn", "group_size": 32}},
    ]
    runner = StageRunner(
        read_recipe(write_all(tmp_path, stages=stages)), tmp_path, tmp_path / "artifacts", SilentProgress()
    )
    for label in runner.recipe.labels():
        record = runner.run_stage(label)
        assert {"predictions", "saved and loaded"} <= {check.check for check in record.integrity}
    assert Checkpoint(runner.folder_of("prune_decoder-2")).config["intermediate_size"] == 64
    assert isinstance(runner.load("prune_decoder"), TorchModel)
