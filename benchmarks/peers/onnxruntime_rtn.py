"""ONNX Runtime's 4-bit quantizer (round to nearest) on an fp32 ONNX decoder; embeddings stay in fp32.

PY peers/onnxruntime_rtn.py ORDER.json ANSWER.json          ORDER as in `nncf_run.py`
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from quantizing import run_order


def run(order: dict[str, Any]) -> None:
    """Quantize the graph and copy the other files of its folder."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    source, output = Path(order["source"]), Path(order["output"])
    (file,) = source.rglob("*.onnx")
    quantizer = MatMulNBitsQuantizer(
        onnx.load(file), bits=order["bits"], block_size=order["group_size"], is_symmetric=True, accuracy_level=4
    )
    quantizer.process()
    shutil.copytree(source, output, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.onnx", "*.data"))
    target = output / file.relative_to(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(quantizer.model.model, target)


if __name__ == "__main__":
    run_order(run, ("onnxruntime", "onnx"), ("onnx", "onnxruntime"))
