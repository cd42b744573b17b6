"""onnxruntime-genai's builder: a 4-bit folder for its own runtime, straight from the checkpoint.

    PY peers/genai_builder.py ORDER.json ANSWER.json            ORDER as in `optimum_gptq.py`

As `python -m onnxruntime_genai.models.builder -i MODEL -o OUTPUT -p int4 -e cpu`, with the order's groups.
"""

from __future__ import annotations

import json
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

from quantizing import answer

MODULE = "onnxruntime_genai.models.builder"


def run(order: dict[str, Any]) -> None:
    """Build the folder."""
    with tempfile.TemporaryDirectory() as cache:
        places = ["-i", order["model"], "-o", order["output"], "-c", cache]
        options = [f"block_size={order['group_size']}", "accuracy_level=4"]
        arguments = sys.argv
        sys.argv = [MODULE, *places, "-p", "int4", "-e", "cpu", "--extra_options", *options]
        try:
            runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
        finally:
            sys.argv = arguments
    _fix_head_size(Path(order["output"]))


def _fix_head_size(folder: Path) -> None:
    """Write the size of a head into the graph's cache, which leaves it open; nothing else is changed.

    What the builder says in genai_config.json, a client that only has the graph must read there.
    """
    import onnx

    size = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["head_size"]
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    for value in (*graph.graph.input, *graph.graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.shape.dim[3].dim_value = size
    onnx.save(graph, folder / "model.onnx")


if __name__ == "__main__":
    answer(run, ("onnxruntime-genai", "transformers", "torch"), ("torch", "transformers"))
