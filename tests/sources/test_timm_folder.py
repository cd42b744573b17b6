"""Tests of timm networks as starting models: predictions and preprocessing of timm, ONNX and INT8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_images
import torch
from PIL import Image

from compress.formats.onnx.export import export_onnx, verify_parity
from compress.formats.onnx.int8.observers import open_session
from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel
from compress.models.config_checks import check_config
from compress.models.model import TorchModel
from compress.pipeline.recipe_sources import read_shape
from compress.recipe.loading import read_recipe
from compress.sources.resolve import find_resolved, resolve_model
from compress.sources.timm_folder import preparation
from compress.stages.onnx_int8.stage import OnnxInt8
from compress.tasks.image_classification import TASK
from compress.tasks.registry import TASKS
from compress.utils.errors import MissingExtraError, ModelError

timm = pytest.importorskip("timm")

SIDE = 64
NETWORKS: dict[str, dict[str, Any]] = {
    "test_efficientnet": {},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64]},
    "vit_tiny_patch16_224": {"depth": 1, "img_size": SIDE},
}


def write(folder: Path, name: str, classes: int = 2, **pretrained_cfg: Any) -> Any:
    """Save a network with random weights as timm does; ``pretrained_cfg`` updates the config's `pretrained_cfg`."""
    torch.manual_seed(0)
    pretrained_cfg = {"input_size": (3, SIDE, SIDE), "crop_pct": 0.8, **pretrained_cfg}
    network = timm.create_model(name, num_classes=classes, pretrained_cfg_overlay=pretrained_cfg, **NETWORKS[name])
    tiny_images.shaken(network)
    for part in network.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = None  # so that one batch sets the statistics
    with torch.no_grad():
        network.train()(torch.randn(8, 3, SIDE, SIDE) + torch.randn(8, 3, 1, 1))
    timm.models.save_for_hf(network.eval(), folder, safe_serialization=True, model_args=NETWORKS[name] or None)
    config = json.loads((folder / "config.json").read_text())
    if classes == 2:
        config["label_names"] = list(tiny_images.LABELS)
    (folder / "config.json").write_text(json.dumps(config))
    return network


def start(folder: Path) -> Path:
    return resolve_model(str(folder), cache=folder.parent / "cache")


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_match_timm_also_in_int8(name: str, tmp_path: Path) -> None:
    network = write(tmp_path / "net", name)
    started = start(tmp_path / "net")
    assert started == start(tmp_path / "net") == find_resolved(str(tmp_path / "net"), tmp_path / "cache"), "made once"
    model = TASK.load(started, tiny_images.LABELS, trust_remote_code=False)
    assert model.labels() == tiny_images.LABELS
    examples = TASK.encode(tiny_images.table(16), model.processor, None, 128)
    pixels = torch.from_numpy(np.stack([examples.inputs[row]["pixel_values"] for row in range(16)]))
    with torch.no_grad():
        expected = network(pixels)
        torch.testing.assert_close(model.module(pixel_values=pixels).logits, expected, rtol=0, atol=0)

    graph = export_onnx(model, examples, None, fusions=True).graph
    assert verify_parity(graph, model, examples, 1e-3) < 1e-3
    stage = OnnxInt8(method="static", error_ceiling=0.1, damage_examples=16)
    int8 = stage.run(OnnxModel(graph, FLOAT_GRAPH, model.companions()), tiny_images.context())
    assert int8.graph.ByteSize() < 0.5 * graph.ByteSize()
    loaded = open_session(int8.graph).run(None, {"pixel_values": pixels.numpy()})[0]
    assert np.sqrt(np.square(loaded - expected.numpy()).mean()) < 0.15 * expected.std().item()


@pytest.mark.parametrize("told", [{}, {"crop_mode": "squash", "interpolation": "bilinear"}])
def test_image_preprocessing_matches_timm(told: dict[str, Any], tmp_path: Path) -> None:
    network = write(tmp_path / "net", "test_efficientnet", **told)
    timm_transform = timm.data.create_transform(
        **timm.data.resolve_data_config(network.pretrained_cfg), is_training=False
    )
    processor = TASK.load(start(tmp_path / "net"), None, trust_remote_code=False).processor
    chance = np.random.default_rng(0)
    # Of an odd rest torchvision rounds a half to even, and transformers down.
    for size in ((90, 120), (131, 77), (71, 71), (40, 300)):
        picture = Image.fromarray(chance.integers(0, 256, (*size, 3)).astype(np.uint8))
        np.testing.assert_allclose(processor([picture])["pixel_values"][0], timm_transform(picture).numpy(), atol=2e-6)


def test_classification_head_is_removed_and_added(tmp_path: Path) -> None:
    network = write(tmp_path / "net", "test_efficientnet")
    loaded = TASKS["image-feature-extraction"].load(start(tmp_path / "net"), None, trust_remote_code=False)
    pixels = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        embedded = network.forward_head(network.forward_features(pixels), pre_logits=True)
        torch.testing.assert_close(loaded.module(pixel_values=pixels).pooler_output, embedded)

    write(tmp_path / "bare", "test_efficientnet", classes=0)
    torch.manual_seed(0)
    model = TASK.load(start(tmp_path / "bare"), ("a", "b", "c"), trust_remote_code=False)
    (tmp_path / "saved").mkdir()
    model.save(tmp_path / "saved")
    again = TorchModel.load(tmp_path / "saved", TASK)
    assert again.labels() == ("a", "b", "c")
    with torch.no_grad():
        logits = again.module(pixel_values=pixels).logits
        torch.testing.assert_close(logits, model.module(pixel_values=pixels).logits, rtol=0, atol=0)
    assert logits.shape == (2, 3)


def test_task_is_inferred_from_the_timm_config(tmp_path: Path) -> None:
    network = write(tmp_path / "net", "test_efficientnet")
    tensors = [
        *network.parameters(),
        *(buffer for name, buffer in network.named_buffers() if buffer.is_floating_point()),
    ]
    assert read_shape(tmp_path / "net").parameters >= sum(tensor.numel() for tensor in tensors), (
        "before it is made ready"
    )
    check_config(tmp_path / "net", trust_remote_code=False)
    tiny_images.write_class_folders(tmp_path / "photos")
    splits = {split: f"photos/{split}" for split in ("train", "test")}
    recipe = {"name": "small", "model": "net", "data": {"splits": splits}, "stages": ["onnx"]}
    (tmp_path / "small.yaml").write_text(json.dumps(recipe))
    assert read_recipe(tmp_path / "small.yaml").task == "image-classification"


def test_imagenet_classes_have_names_and_others_have_numbers(tmp_path: Path) -> None:
    for classes, names in ((1000, ("tench", "goldfish")), (7, ("LABEL_0", "LABEL_1"))):
        write(tmp_path / str(classes), "test_efficientnet", classes)
        config = json.loads((start(tmp_path / str(classes)) / "config.json").read_text())
        assert tuple(config["id2label"][index] for index in "01") == tuple(
            next(name for name in config["id2label"].values() if name.startswith(expected)) for expected in names
        )
        assert len(set(config["id2label"].values())) == classes


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architecture": "no_such_net"}, "has no architecture 'no_such_net'"),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "checkpoint_path is no part of an architecture"),
        ({"model_args": {"pretrained": True}}, "pretrained is no part of an architecture"),
        ({"label_names": ["one"]}, "2 classes and 1 names"),
    ],
)
def test_invalid_timm_config_is_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    write(tmp_path / "net", "test_efficientnet")
    config = json.loads((tmp_path / "net/config.json").read_text())
    (tmp_path / "net/config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=says):
        TASK.load(start(tmp_path / "net"), None, trust_remote_code=False)


def test_missing_timm_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "net", "test_efficientnet")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"'timm'.*\n.*compress-models\[timm\]"):
        check_config(tmp_path / "net", trust_remote_code=False)


def test_unsupported_preprocessing_is_refused(tmp_path: Path) -> None:
    for pretrained_cfg in ({"crop_mode": "border"}, {"input_size": (3, 64, 96)}, {"interpolation": "random"}):
        with pytest.raises(ModelError, match="No image processor prepares pictures as the model wants"):
            preparation(pretrained_cfg, tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "net", "test_efficientnet")
    (tmp_path / "net/model.safetensors").rename(tmp_path / "net/pytorch_model.bin")
    with pytest.raises(ModelError, match="no weights that a recipe can start from"):
        start(tmp_path / "net")
