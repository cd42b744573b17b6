"""Tests of operation and byte counts of ONNX nodes, computed by hand or compared with PyTorch's FLOP counter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from graph_shapes import shapes_by_running
from onnx import helper
from onnx_graphs import onnx_model
from torch.utils.flop_counter import FlopCounterMode

from compress.formats.onnx.costs import GraphCost, NodeCost, Operations, Tensor, count_graph
from compress.formats.onnx.int8.dynamic import quantize_products
from compress.formats.onnx.runtimes.profile import write_optimized

MICROSOFT = "com.microsoft"
FLOAT, UINT8, INT64 = ir.DataType.FLOAT, ir.DataType.UINT8, ir.DataType.INT64
F32 = np.float32


def ones(*shape: int, dtype: Any = F32) -> np.ndarray:
    return np.ones(shape, dtype)


def one_node(
    operator: str,
    inputs: Mapping[str, np.ndarray | tuple[ir.DataType, tuple[int, ...]] | None],
    outputs: Sequence[tuple[ir.DataType, tuple[int, ...]]],
    domain: str = "",
    **attributes: Any,
) -> NodeCost | None:
    """Return the cost of a one-node graph: arrays are initializers, (type, shape) inputs, None an omitted input."""
    names = [name if value is not None else "" for name, value in inputs.items()]
    stored = {name: value for name, value in inputs.items() if isinstance(value, np.ndarray)}
    graph_inputs = {name: value for name, value in inputs.items() if isinstance(value, tuple)}
    graph_outputs = {f"y{i}": value for i, value in enumerate(outputs)}
    node = helper.make_node(operator, names, [*graph_outputs], "node", domain=domain, **attributes)
    model = onnx_model([node], graph_inputs, graph_outputs, stored, domains=[MICROSOFT])
    shapes = {name: Tensor(kind, shape) for name, (kind, shape) in (graph_inputs | graph_outputs).items()}
    return count_graph(ir.from_proto(model).graph, shapes).nodes["node"]


def counted(*arguments: Any, **keywords: Any) -> NodeCost:
    cost = one_node(*arguments, **keywords)
    assert cost is not None
    return cost


X, Y = (FLOAT, (5, 8)), [(FLOAT, (5, 3))]
INT8_WEIGHTS = ones(8, 3, dtype=np.int8)
DYNAMIC = {"a": X, "w": INT8_WEIGHTS, "s": ones(3), "z": ones(3, dtype=np.int8)}
HIDDEN, HEADS = (FLOAT, (2, 5, 8)), {"domain": MICROSOFT, "num_heads": 2}
PACKED = {"x": HIDDEN, "w": ones(8, 24), "b": ones(24)}
MASK = (ir.DataType.INT32, (2, 5))
INTEGER_ATTENTION = {
    "x": (UINT8, (2, 5, 8)), "w": ones(8, 24, dtype=np.int8), "b": ones(24), "xs": (FLOAT, ()), "ws": ones(24),
    "m": MASK, "xz": (UINT8, ()), "wz": ones(24, dtype=np.int8),
}  # fmt: skip
FEW_BITS = {"a": (FLOAT, (5, 32)), "w": ones(3, 1, 16, dtype=np.uint8), "s": ones(3)}
FEW_BITS_SHAPE = {"domain": MICROSOFT, "K": 32, "N": 3, "bits": 4, "block_size": 32}
PRODUCTS: dict[str, tuple[str, dict[str, Any], Any, dict[str, Any], tuple[int, int], int]] = {
    # [2, 5, 8] @ [8, 3]: 2·5·3 sums of 8 products.
    "stored": ("MatMul", {"a": HIDDEN, "w": ones(8, 3)}, [(FLOAT, (2, 5, 3))], {}, (2 * 8 * 30, 0), 8 * 3 * 4),
    "computed": (
        "MatMul", {"a": (FLOAT, (2, 4, 5, 8)), "b": (FLOAT, (2, 4, 8, 6))}, [(FLOAT, (2, 4, 5, 6))], {},
        (2 * 8 * 2 * 4 * 5 * 6, 0), 0,
    ),
    "gemm": ("Gemm", {"a": X, "w": ones(8, 3)}, Y, {}, (2 * 8 * 15, 0), 96),
    "gemm with a bias": ("Gemm", {"a": X, "w": ones(8, 3), "c": ones(3)}, Y, {}, (2 * 8 * 15 + 15, 0), 108),
    # Products only; int8 weights are a quarter of the float ones.
    "integers": ("MatMulInteger", {"a": (UINT8, (5, 8)), "w": INT8_WEIGHTS}, [(ir.DataType.INT32, (5, 3))], {},
                 (0, 2 * 8 * 15), 24),
    # 6 steps to quantize each of 40 inputs; scale and bias for each of 15 outputs.
    "dynamic": ("DynamicQuantizeMatMul", DYNAMIC, Y, {"domain": MICROSOFT}, (6 * 40 + 15, 2 * 8 * 15), 24 + 12 + 3),
    "few bits": ("MatMulNBits", FEW_BITS, Y, FEW_BITS_SHAPE, (2 * 32 * 15, 0), 3 * 16 + 3 * 4),
    # At level 4 the 160 inputs are quantized (6 steps) and the 15 outputs scaled: 975 float steps.
    "few bits, rounded": ("MatMulNBits", FEW_BITS, Y, FEW_BITS_SHAPE | {"accuracy_level": 4}, (975, 2 * 32 * 15), 60),
    # B = 2, S = 5, D = 8, 2 heads: projections 2·10·8·24 + bias 240; Q Kᵀ and its product with V 2·2·25·16; scale, mask
    # and softmax 7 for each of 2·2·25 scores.
    "attention": ("Attention", PACKED | {"m": MASK}, [HIDDEN], HEADS, (3840 + 240 + 1600 + 700, 0), (8 * 24 + 24) * 4),
    # Q and K of 6, V of 4 wide: 2·10·8·16 + 160; 2·2·25·(6 + 4); 6 for each score.
    "cut heads": ("Attention", {"x": HIDDEN, "w": ones(8, 16), "b": ones(16)}, [(FLOAT, (2, 5, 4))],
                  HEADS | {"qkv_hidden_sizes": [6, 6, 4]}, (2560 + 160 + 1000 + 600, 0), 576),
    # 3 positions of the past lengthen the keys from 5 to 8.
    "past": ("Attention", PACKED | {"m": None, "p": (FLOAT, (2, 2, 2, 3, 4))}, [HIDDEN, (FLOAT, (2, 2, 2, 8, 4))],
             HEADS, (3840 + 240 + 2 * 2 * 40 * 16 + 6 * 2 * 2 * 40, 0), 864),
    # Only the projections are integer; their 240 results are scaled and get a bias.
    "integer attention": ("QAttention", INTEGER_ATTENTION, [HIDDEN], HEADS, (480 + 1600 + 700, 3840), 408),
    # 3 queries, 7 keys: 2·2·21·(8 + 4) and 6 for each of 2·2·21 scores.
    "other keys": ("MultiHeadAttention", {"q": (FLOAT, (2, 3, 8)), "k": (FLOAT, (2, 7, 8)), "v": (FLOAT, (2, 7, 4))},
                   [(FLOAT, (2, 3, 4))], HEADS, (1008 + 504, 0), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_costs_of_matmuls_and_attention(name: str) -> None:
    operator, inputs, outputs, options, operations, weight_bytes = PRODUCTS[name]
    cost = counted(operator, inputs, outputs, **options)
    assert (cost.operations, cost.weight_bytes) == (Operations(*operations), weight_bytes)
    given = [Tensor(*value).bytes for value in inputs.values() if isinstance(value, tuple)]
    assert cost.read_bytes == sum(given)
    assert cost.written_bytes == sum(Tensor(*value).bytes for value in outputs)


@pytest.mark.parametrize(("window", "seen"), [(-1, 4 + 5), (3, 3 + 3)])
def test_costs_of_grouped_query_attention(window: int, seen: int) -> None:
    """B = 2, two new tokens after three, 4 heads and 2 groups of 8: the first sees 4 keys, the second 5.

    2·2·seen·(32 + 32) for both products, 6 for each of the 2·4·seen scores, 3 for each of 2·2·(32 + 16) rotated.
    Two of the hundred rows of cosines and of sines are read. Of keys and values, two tokens' are written.
    """
    half = np.ones((100, 4), F32)
    past, present = (FLOAT, (2, 2, 3, 8)), (FLOAT, (2, 2, 5, 8))
    inputs = {"qkv": (FLOAT, (2, 2, 64)), "k": None, "v": None, "pk": past, "pv": past}
    inputs |= {"last": (ir.DataType.INT32, (2,)), "total": (ir.DataType.INT32, ()), "cos": half, "sin": half}
    outputs = [(FLOAT, (2, 2, 32)), present, present]
    attributes = {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1, "local_window_size": window}
    cost = counted("GroupQueryAttention", inputs, outputs, MICROSOFT, **attributes)
    assert cost.operations == Operations(2 * 2 * seen * 64 + 6 * 2 * 4 * seen + 3 * 2 * 2 * 48)
    assert cost.weight_bytes == 2 * 2 * 4 * 4
    assert cost.written_bytes == 2 * 2 * 32 * 4 + 2 * (2 * 2 * 2 * 8 * 4)


@pytest.mark.parametrize(
    ("domain", "shapes", "more"),
    [("", ((2, 8, 6, 6), (2, 4, 6, 6)), {}), (MICROSOFT, ((2, 6, 6, 8), (2, 6, 6, 4)), {"channels_last": 1})],
)
def test_costs_of_integer_convolutions(domain: str, shapes: tuple[tuple[int, ...], ...], more: dict[str, int]) -> None:
    """Each of 4·2·6·6 outputs needs 2·8·3·3 int8 operations, then 3 in float to add the bias, scale and round."""
    scale, zero = ones(), ones(dtype=np.uint8)
    inputs = {"x": (UINT8, shapes[0]), "x_scale": scale, "x_zero": zero, "w": ones(4, 8, 3, 3, dtype=np.int8)}
    inputs |= {"w_scale": ones(4), "w_zero": ones(4, dtype=np.int8), "y_scale": scale, "y_zero": zero}
    inputs |= {"bias": ones(4, dtype=np.int32)}
    cost = counted("QLinearConv", inputs, [(UINT8, shapes[1])], domain, pads=[1, 1, 1, 1], **more)
    assert cost.operations == Operations(fp32=3 * 288, int8=2 * 8 * 9 * 288)


def test_lookup_reads_only_the_selected_rows() -> None:
    table = ones(1000, 16)
    cost = counted("Gather", {"t": table, "i": (INT64, (2, 5))}, [(FLOAT, (2, 5, 16))])
    assert cost == NodeCost(Operations(), weight_bytes=10 * 64, read_bytes=80, written_bytes=640)
    whole = counted("Gather", {"t": ones(4, 16), "i": (INT64, (2, 5))}, [(FLOAT, (2, 5, 16))])
    assert whole.weight_bytes == 4 * 64, "no more than there is"


def test_4_bit_lookup_reads_packed_rows_and_scales() -> None:
    """A row of 32 4-bit values is 16 bytes, its scale 4 and its packed zero point 1."""
    inputs = {
        "t": ones(1000, 16, dtype=np.uint8), "i": (INT64, (2, 5)), "s": ones(1000, 1),
        "z": ones(1000, 1, dtype=np.uint8),
    }  # fmt: skip
    keywords = {"gather_axis": 0, "quantize_axis": 1, "block_size": 32, "bits": 4}
    cost = counted("GatherBlockQuantized", inputs, [(FLOAT, (2, 5, 32))], MICROSOFT, **keywords)
    assert cost == NodeCost(Operations(fp32=2 * 320), weight_bytes=10 * 21, read_bytes=80, written_bytes=320 * 4)


def test_packed_types_take_half_a_byte() -> None:
    assert Tensor(ir.DataType.INT4, (3, 5)).bytes == 8
    assert Tensor(ir.DataType.FLOAT16, (3, 5)).bytes == 30
    assert Tensor(FLOAT, ()).bytes == 4


@pytest.mark.parametrize(
    ("operator", "domain", "steps", "more"),
    [
        ("Tanh", "", 1, {}),
        ("Softmax", "", 5, {}),
        ("LayerNormalization", "", 6, {"g": ones(8)}),
        ("LayerNormalization", "", 7, {"g": ones(8), "b": ones(8)}),
        ("SkipLayerNormalization", MICROSOFT, 7, {"r": (FLOAT, (2, 5, 8)), "g": ones(8)}),
        ("SkipLayerNormalization", MICROSOFT, 9, {"r": (FLOAT, (2, 5, 8)), "g": ones(8), "b": ones(8), "c": ones(8)}),
        ("BiasGelu", MICROSOFT, 6, {"b": ones(8)}),
        ("FastGelu", MICROSOFT, 9, {"b": ones(8)}),
        ("Gelu", MICROSOFT, 5, {}),
        ("QuickGelu", MICROSOFT, 3, {}),
        ("RotaryEmbedding", MICROSOFT, 3, {"ids": ones(2, 1), "cos": ones(1, 4), "sin": ones(1, 4)}),
        ("Sum", "", 2, {"r": (FLOAT, (2, 5, 8)), "s": (FLOAT, (2, 5, 8))}),
        ("Cast", "", 0, {}),
    ],
)
def test_operations_per_element(operator: str, domain: str, steps: int, more: dict[str, Any]) -> None:
    attributes = {"to": 1} if operator == "Cast" else {}
    cost = counted(operator, {"x": (FLOAT, (2, 5, 8)), **more}, [(FLOAT, (2, 5, 8))], domain, **attributes)
    assert cost.operations == Operations(fp32=steps * 80)
    assert cost.written_bytes == 320


def test_views_move_no_bytes_and_slices_only_kept_ones() -> None:
    assert counted("Reshape", {"x": (FLOAT, (4, 6)), "s": ones(2, dtype=np.int64)}, [(FLOAT, (6, 4))]).total_bytes == 0
    ends = {name: ones(1, dtype=np.int64) for name in ("b", "e")}
    cost = counted("Slice", {"x": (FLOAT, (100, 6)), **ends}, [(FLOAT, (3, 6))])
    assert (cost.read_bytes, cost.weight_bytes, cost.written_bytes) == (72, 16, 72)


def test_unknown_operators_and_shapes_are_not_counted() -> None:
    targets = [(FLOAT, (4, 6))]
    packed = {"q": (FLOAT, (2, 3, 2, 3, 4))}
    assert one_node("MultiHeadAttention", packed, [(FLOAT, (2, 3, 8))], MICROSOFT, num_heads=2) is None
    assert one_node("Einsum", {"x": (FLOAT, (6, 4))}, targets, equation="ij->ji") is None
    assert one_node("MatMul", {"x": (FLOAT, (4, 6))}, targets, "of.somebody") is None
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "node")
    graph = ir.from_proto(onnx_model([node], {"x": None}, {"y": None}, {"w": ones(6, 6)})).graph
    cost = count_graph(graph, {"x": Tensor(FLOAT, (4, 6))})
    assert cost.nodes == {"node": None}, "the shape of y is missing"
    cost = count_graph(graph, {"y": Tensor(FLOAT, (4, 6))})
    assert cost.nodes == {"node": None}, "the shape of x is missing"
    assert cost.working_set_bytes == 0


def test_the_working_set_counts_shared_weights_once() -> None:
    nodes = [helper.make_node("MatMul", [a, "w"], [b], b) for a, b in (("x", "h"), ("h", "y"))]
    graph = onnx_model(nodes, {"x": [5, 8]}, {"y": [5, 8]}, {"w": ones(8, 8)})
    shapes = {name: Tensor(FLOAT, (5, 8)) for name in ("x", "h", "y")}
    graph_cost = count_graph(ir.from_proto(graph).graph, shapes)
    assert graph_cost.working_set_bytes == 8 * 8 * 4 + 2 * 5 * 8 * 4
    assert sum(cost.weight_bytes for cost in graph_cost.nodes.values() if cost) == 2 * 8 * 8 * 4
    assert graph_cost.operations == Operations(fp32=2 * 2 * 8 * 40)


def optimized(proto: onnx.ModelProto, folder: Path, inputs: Mapping[str, np.ndarray]) -> tuple[ir.Graph, GraphCost]:
    """Return the graph as optimized by ONNX Runtime and the cost of one call."""
    source = folder / "source.onnx"
    onnx.save(proto, source)
    path = write_optimized(source, folder, threads=1)
    graph = ir.load(path).graph
    return graph, count_graph(graph, shapes_by_running(path, inputs))


def by_type(graph: ir.Graph, found: GraphCost) -> dict[str, list[NodeCost]]:
    grouped: dict[str, list[NodeCost]] = {}
    for node in graph:
        cost = found.nodes[str(node.name)]
        assert cost is not None, f"{node.domain} {node.op_type} is not counted"
        grouped.setdefault(node.op_type, []).append(cost)
    return grouped


def torch_flops(model: torch.nn.Module, inputs: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Return PyTorch's operation counts of matrix products by aten operator."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    return {str(kind).removeprefix("aten."): count for kind, count in counter.get_flop_counts()["Global"].items()}


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    return exports.batch(3, 7, vocabulary=30, pad=0)


def test_float_encoder_operations_match_pytorch(tmp_path: Path, inputs: dict[str, np.ndarray]) -> None:
    export = exports.exported(fusions=False)
    graph, graph_cost = optimized(export.graph(), tmp_path, inputs)
    grouped = by_type(graph, graph_cost)
    products = [cost for kind in ("MatMul", "FusedMatMul", "Gemm", "FusedGemm") for cost in grouped.get(kind, [])]
    # A Gemm adds its bias, a fused one applies an activation too, one step each for each float that it writes.
    extra = sum(cost.written_bytes // 4 for cost in grouped.get("Gemm", []))
    extra += sum(2 * cost.written_bytes // 4 for cost in grouped.get("FusedGemm", []))
    model = export.model.module
    model.set_attn_implementation("eager")
    expected = torch_flops(model, inputs)
    assert sum(cost.operations.fp32 for cost in products) - extra == sum(expected.values())
    assert graph_cost.operations.int8 == 0


def test_int8_encoder_operations_match_pytorch(tmp_path: Path, inputs: dict[str, np.ndarray]) -> None:
    """Linear layers become integer products; Q Kᵀ and the product with V stay float."""
    export = exports.exported(fusions=False)
    _, cost = optimized(quantize_products(export.graph(), True, False), tmp_path, inputs)
    model = export.model.module
    model.set_attn_implementation("eager")
    expected = torch_flops(model, inputs)
    linear = sum(count for kind, count in expected.items() if kind in ("addmm", "mm"))
    assert linear > 0
    assert cost.operations.int8 == linear


def test_every_node_of_our_exports_is_counted(tmp_path: Path, inputs: dict[str, np.ndarray]) -> None:
    proto = exports.exported().graph()
    graph, cost = optimized(proto, tmp_path, inputs)
    assert "Attention" in by_type(graph, cost)
    graph, cost = optimized(quantize_products(proto, True, False), tmp_path, inputs)
    assert "QAttention" in by_type(graph, cost)


@pytest.mark.parametrize("quantized", [False, True])
def test_weights_read_are_the_bytes_in_the_file(tmp_path: Path, quantized: bool) -> None:
    """The file holds the weights of three MatMuls and a graph of a few hundred bytes."""
    generator = np.random.default_rng(0)
    nodes = [helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"], f"product{i}") for i in range(3)]
    stored = {f"w{i}": generator.normal(size=(128, 128)).astype(F32) for i in range(3)}
    proto = onnx_model(nodes, {"h0": [5, 128]}, {"h3": [5, 128]}, stored, opset=17)
    proto = quantize_products(proto, True, False) if quantized else proto
    _, graph_cost = optimized(proto, tmp_path, {"h0": ones(5, 128)})
    read = sum(cost.weight_bytes for cost in graph_cost.nodes.values() if cost is not None)
    size = (tmp_path / "source.onnx").stat().st_size
    assert 3 * 128 * 128 * (1 if quantized else 4) <= read
    # A quantized graph has several named nodes per product.
    assert 0 < size - read < (4000 if quantized else 600)


@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.Conv2d(6, 8, 3, stride=2, padding=1),
        torch.nn.Conv2d(8, 8, 3, groups=4, bias=False),
        torch.nn.Conv1d(6, 10, 5),
        torch.nn.ConvTranspose2d(6, 8, 3, stride=2),
    ],
)
def test_convolution_operations_match_pytorch(layer: torch.nn.Module) -> None:
    image = torch.ones((2, layer.in_channels, *((9,) * (layer.weight.dim() - 2))))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        answer = layer(image)
    transposed = isinstance(layer, torch.nn.ConvTranspose2d)
    sources = {"x": (FLOAT, tuple(image.shape)), "w": layer.weight.detach().numpy()}
    if layer.bias is not None:
        sources["b"] = layer.bias.detach().numpy()
    cost = counted(
        "ConvTranspose" if transposed else "Conv", sources, [(FLOAT, tuple(answer.shape))], group=layer.groups
    )
    bias = answer.numel() if layer.bias is not None else 0
    assert cost.operations == Operations(fp32=counter.get_total_flops() + bias)


def test_blocked_convolution_costs_as_much_as_a_plain_one(tmp_path: Path) -> None:
    """ONNX Runtime converts this convolution to its blocked layout (NCHWc), which does the same work."""
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], "conv", pads=[1, 1, 1, 1])
    stored = {"w": ones(32, 16, 3, 3), "b": ones(32)}
    proto = onnx_model([node], {"x": [1, 16, 9, 9]}, {"y": [1, 32, 9, 9]}, stored, opset=17)
    graph, cost = optimized(proto, tmp_path, {"x": ones(1, 16, 9, 9)})
    domains = {node.domain for node in graph if node.op_type == "Conv"}
    assert cost.operations == Operations(fp32=(2 * 16 * 9 + 1) * 32 * 81), domains
