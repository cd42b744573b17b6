"""Saturation as a processor without VNNI has it: ONNX Runtime itself on an emulated Haswell, bit for bit.

Needs `qemu-x86_64` (Debian: qemu-user).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.numerics.saturation import pairwise_saturating

ROWS, INNER, COLUMNS = 7, 90, 33
RUN = """
import sys
import numpy as np
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
np.save(sys.argv[3], session.run(None, {"x": np.load(sys.argv[2])})[0])
"""


@pytest.mark.slow
def test_products_are_cut_off_as_an_emulated_haswell_cuts_them_off(tmp_path: Path):
    emulator = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
    if emulator is None:
        pytest.skip("no qemu-x86_64 on PATH")
    generator = np.random.default_rng(0)
    weight = generator.integers(-128, 128, (INNER, COLUMNS)).astype(np.int8)
    rows = generator.integers(0, 256, (ROWS, INNER)).astype(np.uint8)
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [ROWS, INNER])
    y = helper.make_tensor_value_info("y", TensorProto.INT32, [ROWS, COLUMNS])
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "product", [x], [y], [numpy_helper.from_array(weight, "w")])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "model.onnx"
    )
    np.save(tmp_path / "x.npy", rows)
    files = [str(tmp_path / name) for name in ("model.onnx", "x.npy", "y.npy")]
    command = [emulator, "-cpu", "Haswell", sys.executable, "-c", RUN, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "y.npy")
    expected, cut = pairwise_saturating(rows, weight)
    assert cut > 0 and (expected != rows.astype(int) @ weight.astype(int)).any()
    np.testing.assert_array_equal(found, expected)
