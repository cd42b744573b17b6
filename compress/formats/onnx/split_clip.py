"""The two towers of a model of images and texts, each as a graph of its own."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx.utils import Extractor

from compress.utils.errors import StageError

TOWERS = {"text_model": ("input_ids", "text_embeds"), "vision_model": ("pixel_values", "image_embeds")}
"""What transformers.js and Optimum call the files, an input that a tower reads, and what it gives."""
_MASK = "attention_mask"


def split_towers(graph: onnx.ModelProto) -> Mapping[str, onnx.ModelProto]:
    """`text_model` and `vision_model`, float or quantized as ``graph`` is. Raises `StageError` for another model."""
    inputs, outputs = ({value.name for value in values} for values in (graph.graph.input, graph.graph.output))
    if any(given not in inputs or made not in outputs for given, made in TOWERS.values()):
        raise StageError(
            f"The graph has the inputs {', '.join(sorted(inputs))} and the outputs {', '.join(sorted(outputs))}.",
            expected="input_ids, pixel_values, text_embeds and image_embeds",
        )
    found = {}
    for name, (given, made) in TOWERS.items():
        read = [given, _MASK] if given == "input_ids" and _MASK in inputs else [given]
        found[name] = Extractor(graph).extract_model(read, [made])
    return found
