"""A toy image classification task (is the upper or the lower half brighter?) and tiny models with random weights."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tiny
import torch
from PIL import Image
from stage_context import stage_context
from tiny import label_maps
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from compress.data.dataset import Dataset
from compress.data.media import media, media_type
from compress.models.model import TorchModel
from compress.stages.base import Context
from compress.tasks.registry import TASKS

TASK = "image-classification"
LABELS = ("above", "below")
SIDE = 16


def pixels(label: int, generator: np.random.Generator, side: int = SIDE) -> np.ndarray:
    """Return a noise image [side, side, 3] uint8 with one brighter half."""
    image = generator.integers(0, 120, (side, side, 3))
    half = slice(0, side // 2) if label == 0 else slice(side // 2, side)
    image[half] += 90
    return image.astype(np.uint8)


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def table(count: int, seed: int = 0, side: int = SIDE) -> pa.Table:
    """Return ``count`` rows of image and label."""
    generator = np.random.default_rng(seed)
    images = [media(png(pixels(row % 2, generator, side)), None) for row in range(count)]
    labels = [LABELS[row % 2] for row in range(count)]
    return pa.table({"image": pa.array(images, media_type()), "label": labels})


def write_class_folders(folder: Path) -> None:
    """Write PNG files of three splits, with one folder for each class."""
    for seed, (split, count) in enumerate({"train": 40, "validation": 16, "test": 16}.items()):
        generator = np.random.default_rng(seed)
        for row in range(count):
            class_folder = folder / split / LABELS[row % 2]
            class_folder.mkdir(parents=True, exist_ok=True)
            (class_folder / f"{row}.png").write_bytes(png(pixels(row % 2, generator)))


def dataset(train: int = 64) -> Dataset:
    """Return train and test splits of the toy task."""
    return Dataset(TASKS[TASK].columns, {"train": table(train, 1), "test": table(32, 2)}, LABELS)


def context(data: Dataset | None = None) -> Context:
    """Return a stage context for the toy task."""
    return stage_context(TASK, data or dataset())


def processor(side: int = SIDE, **changes: Any) -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": side, "width": side}, **changes)


def vit(seed: int = 0, **changes: Any) -> TorchModel:
    """Return a two-layer ViT with random weights large enough for outputs to differ between inputs."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = ViTConfig(image_size=SIDE, patch_size=8, **{**shape, **names(), **changes})
    torch.manual_seed(seed)
    return TorchModel(shaken(ViTForImageClassification(config)), processor())


def mobile_net(seed: int = 0) -> TorchModel:
    """Return a narrow MobileNetV2 whose batch normalization statistics were updated; its export takes seconds."""
    config = MobileNetV2Config(image_size=SIDE, depth_multiplier=0.1, min_depth=8, **names())
    torch.manual_seed(seed)
    return _used(shaken(MobileNetV2ForImageClassification(config)))


def res_net(seed: int = 0) -> TorchModel:
    """Return a ResNet of two blocks with updated batch normalization statistics.

    It has a seventh of the layers of `mobile_net` and five sixths of its parameters.
    """
    config = ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic", **names())
    torch.manual_seed(seed)
    return _used(shaken(ResNetForImageClassification(config)))


def _used(module: Any) -> TorchModel:
    module.train()
    with torch.no_grad():
        for _ in range(4):
            module(pixel_values=torch.randn(16, 3, 32, 32))
    return TorchModel(module.eval(), processor())


def names() -> dict[str, Any]:
    """Return the class names as fields of a config."""
    return label_maps(LABELS)


def shaken(module: Any) -> Any:
    """Return the module in eval mode, with noise on its matrices."""
    return tiny.shaken(module, 0.1)


def write_rows(folder: Path, table: Callable[[int, int], pa.Table], counts: dict[str, int]) -> dict[str, str]:
    """Write rows of each split as JSONL with image files; return the splits as a recipe names them."""
    for seed, (split, count) in enumerate(counts.items()):
        rows = table(count, seed).to_pylist()
        for number, row in enumerate(rows):
            name = f"{split}-{number}.png"
            (folder / name).write_bytes(row["image"]["bytes"])
            row["image"] = name
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return {split: f"{split}.jsonl" for split in counts}
