"""NNCF's weight compression of an fp32 ONNX decoder: 4 bits with AWQ and scale estimation.

    PY peers/nncf_run.py ORDER.json ANSWER.json

ORDER as in `optimum_gptq.py`, with `source`, the folder of the graph. The graph takes a cache, which is empty while
NNCF looks at activations. NNCF keeps embedding and output layer at 8 bits by default.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from quantizing import answer


def run(order: dict[str, Any]) -> None:
    """Compress and save, with the files that lie beside the graph."""
    import nncf
    import numpy as np
    import onnx

    source, output = Path(order["source"]), Path(order["output"])
    (file,) = source.rglob("*.onnx")
    model = onnx.load(file)
    empty = {
        value.name: np.zeros((1, _size(value, 1), 0, _size(value, 3)), np.float32)
        for value in model.graph.input
        if value.name.startswith("past_key_values.")
    }
    feeds = [
        {"input_ids": window[None], "attention_mask": np.ones_like(window[None]), **empty}
        for window in np.load(order["calibration"])
    ]
    compressed = nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT4_SYM,
        ratio=1.0,
        group_size=order["group_size"],
        dataset=nncf.Dataset(feeds),
        awq=True,
        scale_estimation=True,
        subset_size=len(feeds),
    )
    shutil.copytree(source, output, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.onnx", "*.data"))
    target = output / file.relative_to(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(compressed, target)


def _size(value: Any, axis: int) -> int:
    return int(value.type.tensor_type.shape.dim[axis].dim_value)


if __name__ == "__main__":
    answer(run, ("nncf", "onnx", "onnxruntime"), ("nncf", "onnx"))
