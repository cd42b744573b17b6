"""A folder whose graph is not whole is refused with its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel
from compress.utils.errors import ModelError


def graph() -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, 1, ["n", 8]) for name in ("x", "y")]
    stored = [numpy_helper.from_array(np.eye(8, dtype=np.float32), "w")]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    return helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], stored))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _without_weights(path: Path) -> None:
    onnx.save_model(graph(), path, save_as_external_data=True, location=f"{path.name}_data", size_threshold=0)
    path.with_name(f"{path.name}_data").unlink()


@pytest.mark.parametrize("spoil", [_cut, _without_weights])
def test_a_graph_that_is_not_whole_is_refused_by_name(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    OnnxModel(graph(), FLOAT_GRAPH, {"config.json": b"{}"}).save(tmp_path)
    assert OnnxModel.load(tmp_path, "any").graph == graph()
    spoil(tmp_path / "onnx" / FLOAT_GRAPH)
    with pytest.raises(ModelError, match="cannot be read") as raised:
        OnnxModel.load(tmp_path, "any")
    assert raised.value.where == str(tmp_path / "onnx" / FLOAT_GRAPH)
    assert "model.onnx_data beside it" in (raised.value.expected or "")
