"""Quantization with onnxruntime-genai's model builder: a 4-bit model folder for its own runtime.

    PY peers/genai_builder.py ORDER.json ANSWER.json            ORDER as in `optimum_gptq.py`

The same as `python -m onnxruntime_genai.models.builder -i MODEL -o OUTPUT -p int4 -e cpu`, with the order's group size.
"""

from __future__ import annotations

import json
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

from quantizing import run_order

MODULE = "onnxruntime_genai.models.builder"


def run(order: dict[str, Any]) -> None:
    """Build the model folder."""
    with tempfile.TemporaryDirectory() as cache:
        paths = ["-i", order["model"], "-o", order["output"], "-c", cache]
        options = [f"block_size={order['group_size']}", "accuracy_level=4"]
        arguments = sys.argv
        sys.argv = [MODULE, *paths, "-p", "int4", "-e", "cpu", "--extra_options", *options]
        try:
            runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
        finally:
            sys.argv = arguments
    _fix_head_size(Path(order["output"]))


def _fix_head_size(folder: Path) -> None:
    """Set the head size in the shapes of the KV cache, which the builder leaves dynamic.

    Clients that only have the graph do not read genai_config.json.
    """
    import onnx

    size = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["head_size"]
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    for value in (*graph.graph.input, *graph.graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.shape.dim[3].dim_value = size
    onnx.save(graph, folder / "model.onnx")


if __name__ == "__main__":
    run_order(run, ("onnxruntime-genai", "transformers", "torch"), ("torch", "transformers"))
