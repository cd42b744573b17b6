"""Tests of grouping tensors and graph nodes into layers."""

from __future__ import annotations

from pathlib import Path

import exports
import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_graphs import onnx_model

from compress.formats.onnx.int8.dynamic import quantize_products
from compress.formats.onnx.runtimes.profile import original_name, write_optimized
from compress.inspection.layers import UNNAMED, group_layers, model_prefix, node_layers
from compress.models.stored_tensor import StoredTensor


def made(names: list[str], size: int = 4) -> list[StoredTensor]:
    location = {"origin": "", "file": "", "path": Path(), "start": 0, "stored_bytes": 0}
    return [StoredTensor(name=n, shape=(1,), dtype="float32", parameters=1, bytes=size, **location) for n in names]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "layers.3.attention"),
        ("model.layers.3.post_attention_layernorm.weight", "layers.3.norms"),
        ("model.layers.3.mlp.down_proj.weight", "layers.3.feed-forward"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_llama_names(name: str, layer: str) -> None:
    around = ["model.layers.0.self_attn.k_proj.weight", "model.norm.weight"]
    assert name in [tensor.name for tensor in group_layers(made([*around, name]))[layer]]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("blk.0.attn_q.weight", "blk.0.attention"),
        ("blk.0.attn_norm.weight", "blk.0.norms"),
        ("blk.0.ffn_up.weight", "blk.0.feed-forward"),
        ("token_embd.weight", "token_embd"),
        ("transformer.layer.1.sa_layer_norm.bias", "transformer.layer.1.norms"),
        ("transformer.layer.1.ffn.lin1.weight", "transformer.layer.1.feed-forward"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.block.0.attention"),
        ("decoder.block.0.layer.1.EncDecAttention.q.weight", "decoder.block.0.cross-attention"),
        ("decoder.layers.0.encoder_attn.k_proj.weight", "decoder.layers.0.cross-attention"),
        ("decoder.layers.0.fc1.weight", "decoder.layers.0.feed-forward"),
        ("h.0.ln_1.weight", "h.0.norms"),
        ("features.4.conv.weight", "features.4.conv"),
        ("constants.val_7", "constants"),
        ("W", "W"),
    ],
)
def test_names_of_other_families(name: str, layer: str) -> None:
    assert list(group_layers(made([name]))) == [layer]


def test_model_prefix_is_the_common_module_of_all_blocks() -> None:
    assert model_prefix(["bert.encoder.layer.0.w", "bert.embeddings.x.w", "classifier.weight"]) == "bert."
    assert model_prefix(["encoder.layer.0.w", "embeddings.x.w"]) == ""
    assert model_prefix(["encoder.layers.0.w", "encoder.conv.w", "decoder.layers.0.w", "decoder.x.w"]) == ""
    assert model_prefix(["blk.0.w.x", "blk.1.w.x"]) == ""
    assert model_prefix(["a.layers.0.w", "a.head.weight", "head.weight"]) == ""


def test_layers_are_merged_until_they_are_few() -> None:
    parts = ("self_attn.q.weight", "mlp.up.weight", "input_layernorm.weight")

    def names(count: int) -> list[str]:
        blocks = [f"model.layers.{i}.{part}" for i in range(count) for part in parts]
        return ["model.embed.weight", *blocks, "lm_head.weight"]

    assert len(group_layers(made(names(10)))) == 32
    assert list(group_layers(made(names(30))))[:3] == ["embed", "layers.0", "layers.1"]
    merged = {f"layers.*.{part}" for part in ("attention", "feed-forward", "norms")}
    assert set(group_layers(made(names(80)))) == {"embed", *merged, "lm_head"}


def test_small_layers_are_merged_into_other_without_loss() -> None:
    tensors = made([f"module{i}.weight" for i in range(60)]) + made(["large.weight"], size=100)
    groups = group_layers(tensors, at_most=5)
    assert len(groups) == 5 and "large" in groups and list(groups)[-1] == "other"
    assert sum(len(group) for group in groups.values()) == 61


def layers(proto: onnx.ModelProto, folder: Path) -> list[tuple[str, str]]:
    """Return (operator, layer) of each node of the graph as optimized by ONNX Runtime."""
    onnx.save(proto, folder / "source.onnx")
    path = write_optimized(folder / "source.onnx", folder, threads=1)
    layers_by_node = node_layers(path)
    return [(node.op_type, layers_by_node[node.name]) for node in onnx.load(path, load_external_data=False).graph.node]


@pytest.mark.parametrize("quantized", [False, True])
def test_nodes_of_an_encoder_are_grouped_by_layer(tmp_path: Path, quantized: bool) -> None:
    """The expected order is embeddings, then attention and feed-forward of each layer, then the head."""
    proto = exports.exported().graph()
    layers_by_node = layers(quantize_products(proto, True, False) if quantized else proto, tmp_path)
    in_order = list(dict.fromkeys(layer for _, layer in layers_by_node if layer.startswith("encoder.")))
    assert in_order == [f"encoder.layer.{i}.{part}" for i in (0, 1) for part in ("attention", "feed-forward")]
    attention = [layer for operator, layer in layers_by_node if operator in ("Attention", "QAttention")]
    activation = [layer for operator, layer in layers_by_node if operator in ("BiasGelu", "Gelu")]
    assert attention == in_order[::2] and activation == in_order[1::2]
    assert layers_by_node[-1][1] == "classifier"
    # In float, the activation is part of the product.
    pooler = [operator for operator, layer in layers_by_node if layer == "pooler.dense"]
    assert pooler == (["DynamicQuantizeMatMul", "Tanh"] if quantized else ["FusedGemm"])
    assert UNNAMED not in dict(layers_by_node).values()
    assert all(layer.startswith("embeddings.") for operator, layer in layers_by_node[:3] if operator != "Cast")


def test_unfused_attention_nodes_belong_to_the_attention_layer(tmp_path: Path) -> None:
    """Without fusion, attention is a dozen nodes without weights between two projections."""
    layers_by_node = layers(exports.exported(fusions=False).graph(), tmp_path)
    softmax = [layer for operator, layer in layers_by_node if operator == "Softmax"]
    assert softmax == ["encoder.layer.0.attention", "encoder.layer.1.attention"]


def test_a_graph_without_names(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    proto = onnx_model(nodes, {"x": [2, 4]}, {"y": [2, 4]}, {"w": np.eye(4, dtype=np.float32)})
    assert layers(proto, tmp_path) == [("MatMul", UNNAMED)]
    assert original_name("a#b#12") == "a#b"
