"""Hand-written ONNX models of images: run folders of detectors, a segmenter and an encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper
from onnx_graphs import onnx_model
from toy_bundles import write_folder
from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

SIDE = 16
LABELS = ("cat", "dog", "tree")
QUERIES, CLASSES, GRID, DIMENSIONS = 5, len(LABELS), 4, 24
SIZE = {"height": SIDE, "width": SIDE}
_CHANCE = np.random.default_rng(0)
BOXES = {"logits": [QUERIES, len(LABELS)], "pred_boxes": [QUERIES, 4]}
TASKS: dict[str, tuple[Any, dict[str, list[int]]]] = {
    "object-detection": (YolosImageProcessorPil(size=SIZE, do_pad=False), BOXES | {"logits": [QUERIES, CLASSES + 1]}),
    "rt_detr": (RTDetrImageProcessorPil(size=SIZE), BOXES),
    "image-segmentation": (SegformerImageProcessorPil(size=SIZE), {"logits": [len(LABELS), GRID, GRID]}),
    "image-feature-extraction": (ViTImageProcessorPil(size=SIZE), {"pooler_output": [DIMENSIONS, 1, 1]}),
}
"""(processor, shapes of the outputs) by task, or by model type where a task has several kinds."""
TASK_OF = {"rt_detr": "object-detection"}
MATRICES = {
    (task, name): _CHANCE.normal(0, 0.15, (3 * SIDE * SIDE, int(np.prod(shape)))).astype(np.float32)
    for task, (_, shapes) in TASKS.items()
    for name, shape in shapes.items()
}


def outputs(task: str, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Return the graph's expected outputs for pixel values [n, 3, side, side]."""
    heads = {}
    for name, shape in TASKS[task][1].items():
        values = pixels.reshape(len(pixels), -1) @ MATRICES[task, name]
        values = 1 / (1 + np.exp(-values)) if name == "pred_boxes" else values
        heads[name] = values.reshape(len(pixels), *shape)
    return heads


def _graph(task: str) -> onnx.ModelProto:
    """Return a graph with flattened pixels times one matrix for each output, and a sigmoid on boxes."""
    nodes = [helper.make_node("Flatten", ["pixel_values"], ["flat"])]
    stored, heads = {}, {}
    for name, shape in TASKS[task][1].items():
        stored |= {f"{name}_matrix": MATRICES[task, name], f"{name}_shape": np.array([-1, *shape])}
        nodes.append(helper.make_node("MatMul", ["flat", f"{name}_matrix"], [f"{name}_flat"]))
        last = f"{name}_flat"
        if name == "pred_boxes":
            nodes.append(helper.make_node("Sigmoid", [last], [last := f"{name}_share"]))
        nodes.append(helper.make_node("Reshape", [last, f"{name}_shape"], [name]))
        heads[name] = ["batch", *shape]
    return onnx_model(nodes, {"pixel_values": ["batch", 3, SIDE, SIDE]}, heads, stored, opset=18, ir_version=9)


def write_places_run(folder: Path, task: str) -> Path:
    """Write the parts of a run folder that a bundle reads; ``task`` is a key of `TASKS`."""
    labels = "" if "pred_boxes" in TASKS[task][1] else ", labels: [cat, dog, tree]" if "segment" in task else ""
    recipe = f"name: toy\ntask: {TASK_OF.get(task, task)}\nmodel: ./nowhere\nstages: [onnx]\n"
    recipe += f"data: {{splits: {{train: train.csv, test: test.csv}}{labels}}}\n"
    config = {"model_type": task if task in TASK_OF else "toy", "id2label": dict(enumerate(LABELS))}
    return write_folder(folder, recipe, _graph(task), TASKS[task][0], config)
