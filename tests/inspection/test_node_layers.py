from __future__ import annotations

from pathlib import Path

import exports
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.formats.onnx.int8.dynamic import quantize_products
from compress.formats.onnx.runtimes.profile import original_name, write_optimized
from compress.inspection.node_layers import UNNAMED, node_layers, node_modules, origins_in


def layers(proto: onnx.ModelProto, folder: Path) -> list[tuple[str, str]]:
    """(operator, layer) of each node of the graph that ONNX Runtime makes of ``proto``."""
    onnx.save(proto, folder / "source.onnx")
    path = write_optimized(folder / "source.onnx", folder, threads=1)
    layers_by_node = node_layers(path)
    return [(node.op_type, layers_by_node[node.name]) for node in onnx.load(path, load_external_data=False).graph.node]


@pytest.mark.parametrize("quantized", [False, True])
def test_an_encoder_by_its_layers(tmp_path: Path, quantized: bool) -> None:
    """Embeddings, then attention and feed-forward of each layer, then the head; nothing is left over."""
    proto = exports.exported().graph()
    layers_by_node = layers(quantize_products(proto, True, False) if quantized else proto, tmp_path)
    in_order = list(dict.fromkeys(layer for _, layer in layers_by_node if layer.startswith("encoder.")))
    assert in_order == [f"encoder.layer.{i}.{part}" for i in (0, 1) for part in ("attention", "feed-forward")]
    attention = [layer for operator, layer in layers_by_node if operator in ("Attention", "QAttention")]
    assert attention == ["encoder.layer.0.attention", "encoder.layer.1.attention"]
    assert [layer for operator, layer in layers_by_node if operator in ("BiasGelu", "Gelu")] == [
        "encoder.layer.0.feed-forward",
        "encoder.layer.1.feed-forward",
    ]
    assert layers_by_node[-1][1] == "classifier"
    # In float, the activation is part of the product.
    pooler = [operator for operator, layer in layers_by_node if layer == "pooler.dense"]
    assert pooler == (["DynamicQuantizeMatMul", "Tanh"] if quantized else ["FusedGemm"])
    assert UNNAMED not in dict(layers_by_node).values()
    assert all(layer.startswith("embeddings.") for operator, layer in layers_by_node[:3] if operator != "Cast")


def test_a_product_of_scores_belongs_to_the_projection_behind_it(tmp_path: Path) -> None:
    """Without the fusion, attention is a dozen nodes without weights between two projections."""
    layers_by_node = layers(exports.exported(fusions=False).graph(), tmp_path)
    softmax = [layer for operator, layer in layers_by_node if operator == "Softmax"]
    assert softmax == ["encoder.layer.0.attention", "encoder.layer.1.attention"]


def test_a_graph_without_names(tmp_path: Path) -> None:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in ("x", "y")]
    stored = [numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", value[:1], value[1:], stored)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert layers(proto, tmp_path) == [("MatMul", UNNAMED)]
    assert original_name("a#b#12") == "a#b"


def chain(weights: tuple[str, str], names: list[str]) -> onnx.ModelProto:
    """Two products with a Tanh between them, and what a quantizer puts around the second."""
    operators = [("MatMul", [weights[0]]), ("Tanh", []), ("Identity", []), ("MatMul", [weights[1]])]
    nodes, previous = [], "x"
    for (operator, more), name in zip(operators, names, strict=True):
        nodes.append(helper.make_node(operator, [previous, *more], [f"{name}_out"], name))
        previous = f"{name}_out"
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in ("x", previous)]
    stored = [numpy_helper.from_array(np.eye(4, dtype=np.float32), name) for name in weights]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_nodes_are_known_by_the_names_of_the_graph_that_theirs_was_made_from(tmp_path: Path) -> None:
    """Weights whose names say nothing; `node_1` is no part of `node_11`; a quantizer's is what it rounds."""
    onnx.save(chain(("a.0.weight", "a.1.weight"), ["node_1", "tanh", "tanh_1", "node_11"]), tmp_path / "float.onnx")
    origins = origins_in(tmp_path / "float.onnx")
    assert (origins["node_1"], origins["tanh_out"], origins["a.1.weight"]) == ("a.0.weight",) * 2 + ("a.1.weight",)
    derived = chain(
        ("val_0_quantized", "val_1_quantized"),
        ["node_1_quant", "tanh_QuantizeLinear", "tanh_1_Cast", "node_11_DequantizeLinear"],
    )
    onnx.save(derived, tmp_path / "made.onnx")
    layers_by_node = node_modules(tmp_path / "made.onnx", origins)
    assert layers_by_node == {
        "node_1_quant": "a.0.weight",
        "tanh_QuantizeLinear": "a.0.weight",
        "tanh_1_Cast": "a.1.weight",
        "node_11_DequantizeLinear": "a.1.weight",
    }
    assert set(node_modules(tmp_path / "made.onnx").values()) == {""}
