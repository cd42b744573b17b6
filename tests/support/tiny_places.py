"""Toy images with colored boxes and their masks, tiny detection and segmentation models, and a recipe for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import stage_context
import torch
import transformers
from tiny import label_maps, two_sides
from tiny_images import png
from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil
from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil
from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

from compress.data.columns import choose
from compress.data.files import Rows
from compress.tasks.registry import TASKS

DETECTION, SEGMENTATION = "object-detection", "image-segmentation"
LABELS = ("background", "green", "red")
SIDE = 32
ROWS = {"train": 48, "validation": 12, "test": 24}
Row = dict[str, Any]


def scene(chance: np.random.Generator) -> Row:
    """Return a noise image, 30 to 49 pixels on each side, with up to three green or red boxes.

    Where boxes overlap, the last one is visible.
    """
    height, width = chance.integers(30, 50, 2)
    picture = chance.integers(0, 90, (height, width, 3)).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    boxes, categories = [], []
    for _ in range(chance.integers(0, 4)):
        wide, high = chance.integers(8, 20, 2)
        left, top = chance.integers(0, width - wide + 1), chance.integers(0, height - high + 1)
        kind = int(chance.integers(1, 3))
        picture[top : top + high, left : left + wide, 2 - kind] = 255
        mask[top : top + high, left : left + wide] = kind
        boxes.append([float(number) for number in (left, top, wide, high)])
        categories.append(LABELS[kind])
    return {"image": png(picture), "objects": {"bbox": boxes, "category": categories}, "mask": png(mask)}


def scenes(count: int, seed: int = 0) -> list[Row]:
    chance = np.random.default_rng(seed)
    return [scene(chance) for _ in range(count)]


def table(task: str, rows: list[Row]) -> pa.Table:
    """Return ``rows`` as a table with the columns of a task."""
    names = tuple(rows[0])
    return choose(Rows("here", names, {name: [row[name] for row in rows] for name in names}), TASKS[task].columns, {})


def yolos(seed: int = 0, **changes: Any) -> tuple[Any, Any]:
    """Return a two-layer YOLOS and its image processor."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.YolosConfig(
        image_size=[SIDE, SIDE],
        patch_size=8,
        num_detection_tokens=5,
        use_mid_position_embeddings=False,
        initializer_range=0.2,
        **{**sizes, **label_maps(LABELS[1:]), **changes},
    )
    torch.manual_seed(seed)
    return transformers.YolosForObjectDetection(config).eval(), _processor(YolosImageProcessorPil)


def detr(seed: int = 0) -> tuple[Any, Any]:
    """Return a DETR with one encoder and one decoder layer on a ResNet backbone, and its image processor."""
    net = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    backbone = {"backbone": None, "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone_config": net}
    sizes = {**two_sides(32, layers=1, hidden=64), "num_queries": 5, "init_std": 0.2}
    config = transformers.DetrConfig(**backbone, **sizes, **label_maps(LABELS[1:]))
    torch.manual_seed(seed)
    return transformers.DetrForObjectDetection(config).eval(), _processor(DetrImageProcessorPil)


def rt_detr(seed: int = 0) -> tuple[Any, Any]:
    """Return an RT-DETR with one encoder and one decoder layer on a three-stage ResNet, and its image processor."""
    net = transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    channels = {f"{side}_in_channels": [16, 16, 16] for side in ("encoder", "decoder")}
    sizes = {**two_sides(16, layers=1, hidden=32), "encoder_hidden_dim": 16, "num_queries": 5, "num_denoising": 4}
    config = transformers.RTDetrConfig(
        backbone_config=net, freeze_backbone_batch_norms=False, **channels, **sizes, **label_maps(LABELS[1:])
    )
    torch.manual_seed(seed)
    made = transformers.RTDetrForObjectDetection(config).eval()
    norms: list[Any] = [part for part in made.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for parameter in made.parameters():
            wide = parameter.ndim > 1
            parameter.add_(torch.randn_like(parameter) * (parameter[0].numel() ** -0.5 if wide else 0.1))
        for norm in norms:
            norm.momentum = None
            norm.train()
        made(torch.randn(16, 3, SIDE, SIDE))
        for head in made.model.decoder.class_embed:
            head.bias.zero_()  # the initial bias suppresses nearly all detections
    return made.eval(), RTDetrImageProcessorPil(size={"height": SIDE, "width": SIDE})


def segformer(seed: int = 0) -> tuple[Any, Any]:
    """Return a SegFormer of two stages with one block each, and its image processor."""
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=32,
        initializer_range=0.2,
        **label_maps(LABELS),
    )
    torch.manual_seed(seed)
    made = transformers.SegformerForSemanticSegmentation(config).eval()
    return made, SegformerImageProcessorPil(size={"height": SIDE, "width": SIDE})


def _processor(kind: Any) -> Any:
    return kind(size={"height": SIDE, "width": SIDE}, do_pad=False)


MAKERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "yolos": yolos,
    "detr": detr,
    "rt_detr": rt_detr,
    "segformer": segformer,
}


def write_model(folder: Path, name: str) -> Path:
    module, processor = MAKERS[name]()
    module.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_all(folder: Path, name: str, stages: list[Any], **changes: Any) -> Path:
    """Write model, data and recipe into ``folder`` and return the path of the recipe."""
    task = SEGMENTATION if name == "segformer" else DETECTION
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model", name)
    for seed, (split, count) in enumerate(ROWS.items()):
        rows = scenes(count, seed)
        columns = {column: [row[column] for row in rows] for column in rows[0]}
        pa.parquet.write_table(pa.table(columns), folder / f"{split}.parquet")
    benchmark = {"threads": 1, "seconds": 0.05, "examples": 8, "batch_size": 4, "launches": 2, "every_stage": False}
    fields = {"baseline": "finetune", "benchmark": benchmark, **changes}
    fields |= {"labels": list(LABELS)} if task == SEGMENTATION else {}
    return stage_context.write_recipe(folder, task, {split: f"{split}.parquet" for split in ROWS}, stages, **fields)
