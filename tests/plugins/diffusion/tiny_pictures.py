"""Captioned images of random pixels, and a classifier with random weights that evaluates generated images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny_pipelines import WORDS
from transformers import RegNetConfig, RegNetForImageClassification

CLASSES = WORDS[3:5]


def write_rows(folder: Path, train: int = 12, test: int = 6, side: int = 16) -> dict[str, str]:
    """Write gray images [side, side] with a caption and a class each, and return the file of each split."""
    random = np.random.default_rng(0)
    for split, count in {"train": train, "test": test}.items():
        lines = []
        for row in range(count):
            name, kind = f"{split}-{row}.png", CLASSES[row % 2]
            Image.fromarray(random.integers(0, 255, (side, side), dtype=np.uint8)).save(folder / name)
            lines.append(json.dumps({"image": name, "text": f"a {WORDS[9 + row % 4]} {kind}", "label": kind}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return {"train": "train.jsonl", "test": "test.jsonl"}


def write_judge(
    folder: Path,
    names: Sequence[str] = CLASSES,
    widths: tuple[int, int] = (8, 6),
    mean: float = 0.5,
    deviation: float = 0.5,
) -> None:
    """Write a two-stage RegNet classifier of gray 16x16 images."""
    torch.manual_seed(0)
    config = RegNetConfig(
        num_channels=1, embedding_size=widths[0], hidden_sizes=list(widths), depths=[1, 1], groups_width=2,
        layer_type="x", id2label=dict(enumerate(names)), label2id={name: index for index, name in enumerate(names)},
    )  # fmt: skip
    RegNetForImageClassification(config).eval().save_pretrained(folder)
    write_preparation(folder, mean, deviation)


def write_preparation(folder: Path, mean: float, deviation: float) -> None:
    """Write the image processor config for gray 16x16 images."""
    prepared = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 16, "width": 16},
        "do_resize": False,
        "image_mean": [mean],
        "image_std": [deviation],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(prepared))
