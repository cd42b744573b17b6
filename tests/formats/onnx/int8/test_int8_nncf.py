"""NNCF's quantization in a file that ONNX Runtime fuses: its answers, none of its float detours."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
from exports import exported, run

from compress.formats.onnx.int8.dynamic import quantize_embeddings
from compress.formats.onnx.int8.static import NncfQuantizer, run_nncf
from compress.inspection.integer_kernels import read_kernels
from compress.utils.errors import DataError


def feeds(count: int = 12) -> list[dict[str, np.ndarray]]:
    return [exported().examples.batch([index]) for index in range(count)]


@pytest.mark.slow
@pytest.mark.full_range
def test_answers_are_nncfs_own_and_every_product_is_an_integer_kernel(tmp_path: Path):
    quantizer = NncfQuantizer(exported().graph(), feeds())
    theirs, ours = run_nncf(quantizer.readable, feeds(), transformer=True), quantizer.quantize()
    batch = exported().examples.batch(list(range(20, 40)))
    exact = run(exported().graph(), **batch)
    # NNCF rounds the tables too; ours are still float here.
    np.testing.assert_allclose(run(ours, **batch), run(theirs, **batch), atol=0.1 * exact.std())
    assert 0 < np.sqrt(np.square(run(ours, **batch) - exact).mean()) < 0.3 * exact.std()
    quantize_embeddings(ours, 8)
    for graph, complete in ((theirs, False), (ours, True)):
        onnx.save(graph, tmp_path / "model.onnx")
        assert all(kernel.integer for kernel in read_kernels(tmp_path / "model.onnx")) is complete
    operators = Counter(node.op_type for node in ours.graph.node)
    assert operators["QAttention"] == tiny.LAYERS and not operators["DequantizeLinear"]

    float_layer = quantizer.layers[0].name
    operators = Counter(node.op_type for node in quantizer.quantize(float_layers=[float_layer]).graph.node)
    assert operators["Attention"] == 1 and operators["QAttention"] == tiny.LAYERS - 1


def test_without_an_example_nncf_is_not_asked():
    with pytest.raises(DataError, match="no calibration data"):
        NncfQuantizer(exported().graph(), [])
