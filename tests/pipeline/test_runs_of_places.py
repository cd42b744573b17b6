"""Tests of complete runs of detectors and segmenters: metrics and size of the INT8 model against the float model."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from rotation import todays
from tiny_places import SIDE, write_all
from tiny_run import Notes, load

from compress.pipeline.run import Run, run
from compress.results.report import BASELINE, FINAL

pytestmark = pytest.mark.slow

TRAINED = {"batch_size": 8, "learning_rate": 3e-3, "precision": "fp32"}
STAGES = [
    {"finetune": {"epochs": 2, **TRAINED}},
    {"prune": {"feed_forward": 0.25, "importance_examples": 8}},
    {"distill": {"teacher": "finetune", "epochs": 1, "labels_weight": 0.5, **TRAINED}},
    {"onnx": {}},
    {"onnx_int8": {"method": "static", "calibration_examples": 8}},
]
SLICES = [{"name": "with red", "column": "objects", "contains": "red"}]
METRICS = {"detr": ("map", "map_50"), "rt_detr": ("map", "map_50"), "segformer": ("mean_iou", "pixel_accuracy")}
AXES = {
    "detr": {"logits": ["batch_size", 5, 3], "pred_boxes": ["batch_size", 5, 4]},
    "rt_detr": {"logits": ["batch_size", 5, 2], "pred_boxes": ["batch_size", 5, 4]},
    "segformer": {"logits": ["batch_size", 3, 8, 8]},
}


TODAY = [*todays(("detr", "rt_detr"), 2, str), "segformer"]
"""The segmenter and one of the two detectors, which alternate by day."""


@pytest.fixture(scope="module", params=TODAY)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Run]:
    """Return the model's name and its finished run."""
    name: str = request.param
    folder: Path = tmp_path_factory.mktemp(name)
    stages = STAGES if name == "segformer" else [stage for stage in STAGES if "prune" not in stage]
    if name == "rt_detr":  # one export of RT-DETR takes as long as the whole run of DETR
        stages = [{"finetune": {"epochs": 1, **TRAINED}}, *STAGES[-2:]]
    changes = {"baseline": "onnx"} if name == "rt_detr" else {}
    recipe = load(write_all(folder, name, stages, slices=SLICES, **changes))
    return name, run(recipe, folder, folder / "artifacts", Notes())


def test_quantized_model_is_evaluated_like_float_model(finished: tuple[str, Run]) -> None:
    name, done = finished
    for metric in METRICS[name]:
        before, after = (done.report.find(model, metric, "cpu") for model in (BASELINE, FINAL))
        assert before is not None and after is not None and before.raw is not None and after.raw is not None
        assert before.low is not None and before.low <= before.value
        assert len(before.raw) == len(after.raw) == 24
        assert abs(sum(after.raw) / len(after.raw) - after.value) < 1e-6, "outcomes are what pairs are made of"
        part = done.report.find(FINAL, f"{metric}[with red]", "cpu")
        assert part is not None and 0 < part.n < 24
    sizes = [done.report.find(model, "size_bytes", "cpu") for model in (BASELINE, FINAL)]
    assert sizes[0] is not None and sizes[1] is not None and sizes[1].value < 0.8 * sizes[0].value
    agreement = done.report.find(FINAL, "agreement", "cpu")
    assert agreement is not None and 0 <= agreement.value <= 1


def test_graph_has_dynamic_batch_axis_and_only_prediction_outputs(finished: tuple[str, Run]) -> None:
    name, done = finished
    (file,) = (done.folder / "model").rglob("*.onnx")
    graph = onnx.load(file).graph
    axes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert axes == {"pixel_values": ["batch_size", 3, SIDE, SIDE], **AXES[name]}
