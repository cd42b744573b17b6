"""Tests of image classification: preprocessing compared with the model's config, metrics with values by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pytest
import tiny_images
import torch
from PIL import Image

from compress.data.media import media, media_type
from compress.formats.onnx.export import export_onnx, verify_parity
from compress.models.model import TorchModel
from compress.models.processor import load_processor
from compress.tasks import image_inputs
from compress.tasks.image_classification import TASK
from compress.tasks.registry import TASKS
from compress.utils.errors import DataError, ModelError


def rows(*images: np.ndarray | Image.Image, labels: tuple[str, ...] = tiny_images.LABELS) -> pa.Table:
    values = [media(tiny_images.png(np.asarray(image)), None) for image in images]
    return pa.table(
        {"image": pa.array(values, media_type()), "label": [labels[i % len(labels)] for i in range(len(images))]}
    )


def encode(table: pa.Table, processor: object) -> list[np.ndarray]:
    return [example["pixel_values"] for example in TASK.encode(table, processor, tiny_images.LABELS, 128).inputs]


def test_preprocessing_follows_model_config(tmp_path: Path) -> None:
    mean, std = [0.25, 0.5, 0.75], [0.5, 0.25, 0.125]
    tiny_images.processor(4, image_mean=mean, image_std=std, rescale_factor=1 / 128).save_pretrained(tmp_path)
    image = np.random.default_rng(0).integers(0, 255, (4, 4, 3), np.uint8)
    (encoded,) = encode(rows(image), load_processor(tmp_path))
    expected = (image / 128 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(encoded, expected.transpose(2, 0, 1), atol=1e-5)
    assert encoded.dtype == np.float32


def test_images_of_any_size_are_resized() -> None:
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 255, (height, width, 3), np.uint8) for height, width in ((5, 9), (40, 7))]
    encoded = encode(rows(*images), tiny_images.processor(8))
    expected = np.asarray(Image.fromarray(images[0]).resize((8, 8), Image.Resampling.BILINEAR)) / 255 * 2 - 1
    np.testing.assert_allclose(encoded[0], expected.transpose(2, 0, 1), atol=1e-5)
    assert encoded[1].shape == (3, 8, 8)


def test_grayscale_processor_gets_one_channel() -> None:
    (encoded,) = encode(
        rows(np.full((4, 4), 51, np.uint8)), tiny_images.processor(4, image_mean=[0.0], image_std=[1.0])
    )
    np.testing.assert_allclose(encoded, np.full((1, 4, 4), 0.2), atol=1e-6)


def test_broken_image_is_reported_with_its_path(tmp_path: Path) -> None:
    noise = tiny_images.pixels(0, np.random.default_rng(0), 64)
    (tmp_path / "bad.png").write_bytes(tiny_images.png(noise)[:900])
    table = pa.table({"image": pa.array([media("bad.png", tmp_path)], media_type())})
    with pytest.raises(DataError, match=r"bad\.png is broken"):
        encode(table, tiny_images.processor(4))


def test_many_images_are_decoded_lazily(monkeypatch: pytest.MonkeyPatch) -> None:
    table, processor = tiny_images.table(6), tiny_images.processor()
    whole = TASK.encode(table, processor, tiny_images.LABELS, 128)
    monkeypatch.setattr(image_inputs, "_IN_MEMORY_BYTES", 0)
    lazy = TASK.encode(table, processor, tiny_images.LABELS, 128)
    assert not isinstance(lazy.inputs, list)
    for name, array in whole.batch([5, 1, 3]).items():
        np.testing.assert_array_equal(lazy.batch([5, 1, 3])[name], array)
    assert lazy.lengths().tolist() == whole.lengths().tolist() == [tiny_images.SIDE] * 6
    np.testing.assert_array_equal(lazy.inputs[2:4][1]["pixel_values"], whole.inputs[3]["pixel_values"])


def test_metrics_match_values_by_hand() -> None:
    # The right class is 1st, 2nd, 5th and 6th of seven.
    logits = np.array([[7, 6, 5, 4, 3, 2, 1]] * 4, np.float32)
    measured = {row.metric: row for row in TASK.measure({"logits": logits}, np.array([0, 1, 4, 5]), "final", "cpu")}
    assert measured["accuracy"].raw == (1, 0, 0, 0)
    assert measured["top_5_accuracy"].raw == (1, 1, 1, 0)
    assert measured["top_5_accuracy"].value == 0.75
    few = TASK.measure({"logits": logits[:, :5]}, np.zeros(4, np.int64), "final", "cpu")
    assert "top_5_accuracy" not in {row.metric for row in few}


def test_saved_model_loads_with_processor_and_equal_logits(tmp_path: Path) -> None:
    model = tiny_images.vit()
    model.save(tmp_path)
    again = TorchModel.load(tmp_path, TASKS[tiny_images.TASK])
    examples = TASK.encode(tiny_images.table(4), again.processor, again.labels(), 128)
    pixels = torch.from_numpy(examples.batch(range(4))["pixel_values"])
    with torch.no_grad():
        torch.testing.assert_close(again.module(pixels).logits, model.module(pixels).logits, rtol=0, atol=0)
    assert "preprocessor_config.json" in again.companions()


def test_new_head_uses_labels_of_data(tmp_path: Path) -> None:
    tiny_images.vit().module.vit.save_pretrained(tmp_path)
    tiny_images.processor().save_pretrained(tmp_path)
    loaded = TASK.load(tmp_path, ("a", "b", "c"), trust_remote_code=False)
    assert loaded.labels() == ("a", "b", "c") and loaded.module.classifier.out_features == 3
    tiny_images.vit().save(tmp_path)
    with pytest.raises(DataError, match="label 'c', which the model lacks"):
        TASK.load(tmp_path, ("above", "c"), trust_remote_code=False)


def test_text_model_is_rejected(tmp_path: Path) -> None:
    import tiny

    tiny.encoder().save(tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded for image-classification"):
        TASK.load(tmp_path, None, trust_remote_code=False)


def test_export_has_dynamic_batch_and_fixed_image_size() -> None:
    model = tiny_images.vit()
    examples = TASK.encode(tiny_images.table(12), model.processor, None, 128)
    graph = export_onnx(model, examples, None, fusions=True).graph
    (entry,) = graph.graph.input
    assert entry.name == "pixel_values"
    axes = [axis.dim_param or axis.dim_value for axis in entry.type.tensor_type.shape.dim]
    assert axes == ["batch_size", 3, tiny_images.SIDE, tiny_images.SIDE]
    assert [output.name for output in graph.graph.output] == ["logits"]
    assert verify_parity(graph, model, examples, 1e-3) < 1e-4
    # Many tools start with shape inference, which fails on contradictory shapes.
    onnx.shape_inference.infer_shapes(graph)
