"""Tests of image embeddings: embeddings compared with transformers' pipeline, retrieval metrics with values by hand."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny_images
import torch
from PIL import Image
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    SegformerConfig,
    SegformerModel,
    ViTConfig,
    ViTModel,
    pipeline,
)

from compress.formats.onnx.export import export_onnx, verify_parity
from compress.formats.onnx.runtimes.onnxruntime import session_of
from compress.models.model import TorchModel
from compress.numerics.losses import supervised_contrastive
from compress.tasks.evaluation import Evaluation
from compress.tasks.image_feature_extraction import TASK
from compress.utils.errors import DataError, ModelError

SHAPE: dict[str, Any] = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2}
MODELS: dict[str, Callable[[], Any]] = {
    "vit": lambda: ViTModel(ViTConfig(**SHAPE, num_attention_heads=2, intermediate_size=48)),
    "vit without a pooler": lambda: ViTModel(
        ViTConfig(**SHAPE, num_attention_heads=2, intermediate_size=48), add_pooling_layer=False
    ),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SHAPE, num_attention_heads=2, mlp_ratio=2)),
    "convnext": lambda: ConvNextModel(ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)),
}
COUNT = 200


def write(folder: Path, module: Any) -> None:
    tiny_images.shaken(module).save_pretrained(folder)
    tiny_images.processor().save_pretrained(folder)


@pytest.mark.parametrize("name", MODELS)
def test_graph_outputs_equal_transformers_pipeline(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    write(tmp_path, MODELS[name]())
    model = TASK.load(tmp_path, None, trust_remote_code=False)
    rows = tiny_images.table(COUNT)
    examples = TASK.encode(rows, model.processor, None, 128)
    graph = export_onnx(model, examples.subset(range(8)), None, fusions=True).graph
    assert verify_parity(graph, model, examples.subset(range(8)), 1e-3) < 1e-4
    outputs = session_of(graph).predict(examples.batch(range(COUNT)))
    embeddings = TASK.collect(outputs, examples, range(COUNT))["embedding"]

    images = [Image.open(io.BytesIO(value["bytes"])) for value in rows["image"].to_pylist()]
    known = pipeline("image-feature-extraction", str(tmp_path), use_fast=False)
    expected = torch.cat(known(images, batch_size=50, return_tensors=True))
    np.testing.assert_allclose(outputs["last_hidden_state"], expected.numpy(), atol=1e-4)
    if name == "vit without a pooler":
        # The pipeline would add a pooler with random weights.
        np.testing.assert_allclose(embeddings, expected[:, 0].numpy(), atol=1e-4)
    else:
        pooled = torch.cat(known(images, batch_size=50, return_tensors=True, pool=True))
        np.testing.assert_allclose(embeddings, pooled.flatten(1).numpy(), atol=1e-4)


def test_model_without_pooler_is_saved_without_pooler(tmp_path: Path) -> None:
    write(tmp_path, MODELS["vit without a pooler"]())
    model = TASK.load(tmp_path, None, trust_remote_code=False)
    (tmp_path / "saved").mkdir()
    model.save(tmp_path / "saved")
    again = TorchModel.load(tmp_path / "saved", TASK)
    pixels = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        outputs = again.module(pixels)
        torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state[:, 0], rtol=0, atol=0)
    assert not any("pooler" in name for name in again.tensors())


def test_model_without_pooled_output_is_rejected(tmp_path: Path) -> None:
    write(
        tmp_path,
        SegformerModel(SegformerConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], sr_ratios=[1, 1, 1, 1])),
    )
    model = TASK.load(tmp_path, None, trust_remote_code=False)
    examples = TASK.encode(tiny_images.table(2), model.processor, None, 128)
    with pytest.raises(ModelError, match="no pooler_output"):
        export_onnx(model, examples, None, fusions=True)


def rows_of(kept: list[list[float]], labels: list[int]) -> dict[str, Any]:
    measured = TASK.measure({"embedding": np.array(kept, np.float32)}, np.array(labels), "m", "cpu")
    return {row.metric: row for row in measured}


def test_retrieval_metrics_match_values_by_hand() -> None:
    # Directions at 0, 10, 30, 70 and 90 degrees; nearest: 1, 0, 1, 4, 3.
    angles = np.radians([0, 10, 30, 70, 90])
    embeddings = np.stack([np.cos(angles), np.sin(angles)], axis=1) * [[1], [2], [3], [4], [5]]
    measured = rows_of(embeddings.tolist(), [0, 0, 1, 1, 1])
    assert next(iter(measured)) == "recall_at_1"
    assert measured["recall_at_1"].raw == (1, 1, 0, 1, 1)
    # Of four candidates, one shares the class of each of the first two images, and two that of each of the last three.
    assert measured["precision_at_10"].raw == pytest.approx((1 / 4, 1 / 4, 1 / 2, 1 / 2, 1 / 2))
    # From 30 degrees: 10, 0, then 70.
    assert measured["mean_reciprocal_rank"].raw == pytest.approx((1, 1, 1 / 3, 1, 1))
    assert measured["recall_at_10"].value == 1 and measured["embedding_bytes_binary"].value == 1


def test_labels_are_class_ids_and_loss_is_contrastive() -> None:
    model = tiny_images.vit()
    examples = TASK.encode(tiny_images.table(4), model.processor, None, 128)
    assert examples.labels is not None and examples.labels.tolist() == [0, 1, 0, 1]
    pooled = torch.randn(4, 6)
    outputs = type("Out", (), {"pooler_output": pooled[:, :, None, None]})
    labels = torch.tensor([0, 1, 0, -100])
    torch.testing.assert_close(TASK.loss(outputs, labels), supervised_contrastive(pooled[:3], labels[:3], 0.1))
    near = TASK.predicted_labels(type("Out", (), {"pooler_output": torch.tensor([[1.0, 0], [0, 1], [1, 0.1]])}), {})
    assert near[0] == near[2]


@pytest.mark.parametrize("labels", [["a", "b"], ["a", "a"], None])
def test_split_without_matching_images_is_rejected(labels: list[str] | None) -> None:
    table = tiny_images.table(2).select(["image"])
    rows = table if labels is None else pa.table({"image": table["image"], "label": labels})
    with pytest.raises(DataError, match="Retrieval needs two images"):
        TASK.eval_examples(rows, tiny_images.processor(), None, 128, Evaluation())
