"""The text and image encoders of a CLIP model as separate graphs."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx.utils import Extractor

from compress.utils.errors import StageError

TOWERS = {"text_model": ("input_ids", "text_embeds"), "vision_model": ("pixel_values", "image_embeds")}
"""Encoder by the file name that transformers.js and optimum use: the input that it reads, and its output."""
_MASK = "attention_mask"


def split_towers(graph: onnx.ModelProto) -> Mapping[str, onnx.ModelProto]:
    """Return the graphs `text_model` and `vision_model`, float or quantized as ``graph`` is.

    Raises:
        StageError: The graph has other inputs or outputs.
    """
    inputs, outputs = ({value.name for value in values} for values in (graph.graph.input, graph.graph.output))
    if any(input_name not in inputs or output_name not in outputs for input_name, output_name in TOWERS.values()):
        raise StageError(
            f"The graph has the inputs {', '.join(sorted(inputs))} and the outputs {', '.join(sorted(outputs))}.",
            expected="input_ids, pixel_values, text_embeds and image_embeds",
        )
    encoders = {}
    for name, (input_name, output_name) in TOWERS.items():
        read = [input_name, _MASK] if input_name == "input_ids" and _MASK in inputs else [input_name]
        encoders[name] = Extractor(graph).extract_model(read, [output_name])
    return encoders
