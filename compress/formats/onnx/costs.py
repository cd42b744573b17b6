"""Arithmetic operations and bytes moved by one call of an ONNX graph, node by node.

A multiply-add counts as two operations, as in the peak performance that vendors state. Element-wise operators count one
for each step of their definition (`exp`, `tanh` and `erf` are one step), so `Softmax` is 5 per element: maximum,
difference, exponential, sum, quotient. ``int8`` counts products of 8-bit integers, ``fp32`` everything else.

Bytes are those of every tensor that a node reads and writes, each once. Of a table that is looked up they are the rows
that are read. Packed copies and scratch memory of a kernel are not counted, so the bytes are a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import onnx_ir as ir


class Tensor(NamedTuple):
    """Type and shape of a tensor; ``stored`` if the graph holds its values."""

    dtype: ir.DataType
    shape: tuple[int, ...]
    stored: bool = False

    @property
    def elements(self) -> int:
        """Number of values; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size of the values; 4-bit types are packed in pairs."""
        return math.ceil(self.elements * float(self.dtype.bitwidth) / 8)


class Operations(NamedTuple):
    """Arithmetic operations by the class of arithmetic that does them."""

    fp32: int = 0
    int8: int = 0


@dataclass(frozen=True)
class Call:
    """One node with the tensors of one call. Inputs that the node leaves out are ``None``."""

    node: ir.Node
    inputs: list[Tensor | None]
    outputs: list[Tensor]

    def tensor(self, index: int) -> Tensor | None:
        """An input, or ``None`` where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def need(self, index: int) -> Tensor:
        """An input that the operator always has."""
        tensor = self.tensor(index)
        assert tensor is not None, f"{self.node.op_type} without input {index}"
        return tensor

    def has(self, index: int) -> bool:
        """Whether the node has that input."""
        return self.tensor(index) is not None

    def integer(self, name: str, default: int) -> int:
        """An integer attribute."""
        found = self.node.attributes.get(name)
        return default if found is None else found.as_int()

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of integers, empty where it is left out."""
        found = self.node.attributes.get(name)
        return () if found is None else tuple(found.as_ints())

    @property
    def out(self) -> Tensor:
        """The first output."""
        return self.outputs[0]


MICROSOFT = "com.microsoft"
_BLOCKED = "com.microsoft.nchwc"


Count = Callable[[Call], Operations | None]


@dataclass(frozen=True)
class Operator:
    """``operations`` of a call, ``None`` for a form that is not known.

    ``rows`` maps the input that is looked up in to (the input with the indices, the axis); ``picks`` says that no
    more of the first input is read than is written; a ``view`` moves nothing. ``written``: bytes, where an output's
    memory holds much of it before.
    """

    operations: Count
    rows: Callable[[Call], dict[int, tuple[int, int]]] | None = None
    picks: bool = False
    view: bool = False
    written: Callable[[Call], int] | None = None


def sizes_of_reads(call: Call) -> list[int]:
    """Bytes that the node reads of each of its inputs."""
    operator = OPERATORS[call.node.domain, call.node.op_type]
    if operator.view:
        return [0 for _ in call.inputs]
    sizes = [0 if tensor is None else tensor.bytes for tensor in call.inputs]
    if operator.picks:
        sizes[0] = min(sizes[0], sum(tensor.bytes for tensor in call.outputs))
    for table, (indices, axis) in (operator.rows(call) if operator.rows else {}).items():
        data, picked = call.tensor(table), call.tensor(indices)
        if data is not None and picked is not None and data.shape[axis]:
            sizes[table] = min(data.bytes, picked.elements * data.bytes // data.shape[axis])
    return sizes


def size_of_writes(call: Call) -> int:
    """Bytes that the node writes."""
    operator = OPERATORS[call.node.domain, call.node.op_type]
    if operator.written is not None:
        return operator.written(call)
    return 0 if operator.view else sum(tensor.bytes for tensor in call.outputs)


def _nothing(call: Call) -> Operations:
    return Operations()


def _each_output(steps: int) -> Count:
    return lambda call: Operations(fp32=steps * call.out.elements)


def _each_input(steps: int) -> Count:
    return lambda call: Operations(fp32=steps * call.need(0).elements)


def _sum(call: Call) -> Operations:
    return Operations(fp32=(len(call.inputs) - 1) * call.out.elements)


def _with_bias(steps: int, bias: int) -> Count:
    """``steps`` for each element of the output, and one more where input ``bias`` is there."""
    return lambda call: Operations(fp32=(steps + call.has(bias)) * call.out.elements)


def _gelu(call: Call) -> Operations:
    """x/2 (1 + erf(x/√2)) is 5 steps, its approximation by tanh 8."""
    form = call.node.attributes.get("approximate")
    return Operations(fp32=(8 if form is not None and form.as_string() == "tanh" else 5) * call.out.elements)


def _inner(call: Call, transposed: str) -> int:
    shape = call.need(0).shape
    return shape[-2] if len(shape) > 1 and call.integer(transposed, 0) else shape[-1]


def _product(call: Call) -> Operations:
    return Operations(fp32=2 * _inner(call, "transA") * call.out.elements)


def _gemm(call: Call) -> Operations:
    return Operations(fp32=(2 * _inner(call, "transA") + call.has(2)) * call.out.elements)


def _integer_product(after: int, bias: int | None = None) -> Count:
    """8-bit products, then ``after`` float steps for each element of the output, and one for a bias."""

    def count(call: Call) -> Operations:
        steps = after + (bias is not None and call.has(bias))
        return Operations(steps * call.out.elements, 2 * _inner(call, "transA") * call.out.elements)

    return count


def _dynamic_product(call: Call) -> Operations:
    """`DynamicQuantizeLinear` of the input, the product of integers, its scale, and a bias."""
    own = 6 * call.need(0).elements + (1 + call.has(4)) * call.out.elements
    return Operations(own, 2 * _inner(call, "transA") * call.out.elements)


def _few_bits_product(call: Call) -> Operations:
    """`MatMulNBits`, whose kernels at accuracy level 4 quantize the input and multiply integers."""
    products, bias = 2 * call.integer("K", 0) * call.out.elements, call.has(5) * call.out.elements
    if call.integer("accuracy_level", 0) == 4:
        return Operations(6 * call.need(0).elements + call.out.elements + bias, products)
    return Operations(products + bias)


def _convolution(weight: int, bias: int | None, integer: bool = False, after: int = 0) -> Count:
    """2 · (channels of a group) · (kernel) for each element of the output; weights are [out, in / group, ...]."""

    def count(call: Call) -> Operations:
        filters = call.need(weight)
        products = 2 * filters.elements // filters.shape[0] * call.out.elements
        own = (after + (bias is not None and call.has(bias))) * call.out.elements
        return Operations(own, products) if integer else Operations(products + own)

    return count


def _transposed_convolution(call: Call) -> Operations:
    filters = call.need(1)
    products = 2 * call.need(0).elements * filters.elements // filters.shape[0]
    return Operations(products + call.has(2) * call.out.elements)


def _pool(call: Call) -> Operations:
    return Operations(math.prod(call.integers("kernel_shape")) * call.out.elements)


def attention_core(batch: int, heads: int, queries: int, keys: int, key_width: int, value_width: int) -> int:
    """Operations of softmax(Q Kᵀ · scale) V; the widths are those of all heads together.

    Two products, the scale, and 5 an element for the softmax. A mask is one addition more, which the caller knows of.
    """
    products = 2 * batch * queries * keys * (key_width + value_width)
    return products + 6 * batch * heads * queries * keys


def _attention(mask: int, past: int, integer: bool) -> Count:
    """`Attention` and `QAttention`: the projections of [batch, length, width] to Q, K and V, then the core."""

    def count(call: Call) -> Operations | None:
        (batch, length, width), heads = call.need(0).shape, call.integer("num_heads", 0)
        weights, before = call.tensor(1), call.tensor(past)
        widths = call.integers("qkv_hidden_sizes") or ((weights.shape[-1] // 3,) * 3 if weights else ())
        if len(widths) != 3 or heads < 1 or call.integer("do_rotary", 0):
            return None
        keys = length + (before.shape[3] if before else 0)
        scores = batch * heads * length * keys
        core = attention_core(batch, heads, length, keys, widths[1], widths[2]) + call.has(mask) * scores
        projected = batch * length * sum(widths)
        products = 2 * width * projected
        # The integer products are scaled and get their bias in one pass.
        return Operations(core + 2 * projected, products) if integer else Operations(core + products + projected)

    return count


def _multi_head_attention(call: Call) -> Operations | None:
    """`MultiHeadAttention` with query, key and value of [batch, length, width] each and no past."""
    query, key, value = (call.tensor(index) for index in range(3))
    heads = call.integer("num_heads", 0)
    if heads < 1 or not query or not key or not value or any(len(each.shape) != 3 for each in (query, key, value)):
        return None
    if any(call.has(index) for index in range(6, len(call.inputs))):
        return None
    (batch, queries, _), keys = query.shape, key.shape[1]
    core = attention_core(batch, heads, queries, keys, key.shape[2], value.shape[2])
    biases = call.has(3) * (query.elements + key.elements + value.elements)
    masks = (call.has(4) + call.has(5)) * batch * heads * queries * keys
    return Operations(core + biases + masks)


def _grouped_attention(call: Call) -> Operations | None:
    """`GroupQueryAttention`: every query sees the keys up to its own, in a window of them where it has one.

    Rotation is 3 steps for each element of queries and keys. Query, key and value may lie in one tensor.
    """
    query, present, heads = call.need(0), call.outputs[1], call.integer("num_heads", 0)
    if heads < 1 or any(call.has(index) for index in range(10, len(call.inputs))) or len(query.shape) != 3:
        return None
    batch, queries, _ = query.shape
    _, groups, keys, size = present.shape
    window = call.integer("local_window_size", -1)
    seen = (min(keys - queries + 1 + place, window if window > 0 else keys) for place in range(queries))
    core = attention_core(batch, heads, 1, sum(seen), heads * size, heads * size)
    return Operations(core + call.integer("do_rotary", 0) * 3 * batch * queries * (heads + groups) * size)


def _grouped_writes(call: Call) -> int:
    """The output, and the keys and values of the tokens that are new: those before them may stay where they are."""
    new = call.need(0).shape[1]
    return call.out.bytes + sum(cache.bytes * new // max(1, cache.shape[2]) for cache in call.outputs[1:])


def _embed(call: Call) -> Operations:
    """Two or three embeddings are added and normalized."""
    return Operations(fp32=(7 + 1 + call.has(4)) * call.out.elements)


def _lookup(call: Call) -> dict[int, tuple[int, int]]:
    return {0: (1, call.integer("axis", 0))}


def _quantized_lookup(call: Call) -> dict[int, tuple[int, int]]:
    axis = call.integer("gather_axis", 0)
    return {0: (1, axis), 2: (1, axis), 3: (1, axis)}


def _angles(call: Call) -> dict[int, tuple[int, int]]:
    """Of cosines and sines, a row for each row of the batch: those of one token, which a prompt has more of."""
    return {7: (5, 0), 8: (5, 0)}


def _embedding_lookups(call: Call) -> dict[int, tuple[int, int]]:
    return {2: (0, 0), 3: (0, 0), 4: (0, 0)}


def _table() -> dict[tuple[str, str], Operator]:
    one = (
        *("Add", "Sub", "Mul", "Div", "Pow", "Mod", "Neg", "Abs", "Sqrt", "Reciprocal", "Sign", "Exp", "Log", "Erf"),
        *("Tanh", "Sigmoid", "Sin", "Cos", "Relu", "Ceil", "Floor", "Round", "Where", "And", "Or", "Not", "Xor"),
        *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "IsNaN", "CumSum"),
    )
    reductions = (
        *("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2"),
        *("ArgMax", "ArgMin", "GlobalAveragePool", "GlobalMaxPool"),
    )
    moves = ("Cast", "Concat", "ConstantOfShape", "Expand", "Pad", "Range", "Split", "Tile", "Transpose", "Trilu")
    views = ("Constant", "Flatten", "Identity", "Reshape", "Shape", "Size", "Squeeze", "Unsqueeze")
    steps = {"Clip": 2, "Softmax": 5, "LogSoftmax": 5, "LeakyRelu": 2, "HardSigmoid": 3, "HardSwish": 5}
    steps |= {"BatchNormalization": 2, "InstanceNormalization": 7, "RMSNormalization": 4, "DequantizeLinear": 2}
    counts: dict[str, Count] = {name: _each_output(1) for name in one}
    counts |= {name: _each_input(1) for name in reductions}
    counts |= dict.fromkeys(moves, _nothing)
    counts |= {name: _each_output(count) for name, count in steps.items()}
    counts |= dict.fromkeys(("Sum", "Max", "Min", "Mean"), _sum)
    counts |= {"QuantizeLinear": _each_output(4), "DynamicQuantizeLinear": _each_output(6), "Gelu": _gelu}
    counts |= {"LayerNormalization": _with_bias(6, 2), "MatMul": _product, "Gemm": _gemm}
    counts |= {"MatMulInteger": _integer_product(0), "QLinearMatMul": _integer_product(2)}
    counts |= {"Conv": _convolution(1, 2), "ConvInteger": _convolution(1, None, integer=True)}
    counts |= {"QLinearConv": _convolution(3, 8, integer=True, after=2), "ConvTranspose": _transposed_convolution}
    counts |= {"MaxPool": _pool, "AveragePool": _pool}
    table = {("", name): Operator(count) for name, count in counts.items()}
    table |= {("", name): Operator(_nothing, view=True) for name in views}
    table |= {("", "Slice"): Operator(_nothing, picks=True), ("", "Gather"): Operator(_nothing, rows=_lookup)}
    table |= {("", name): Operator(_nothing, picks=True) for name in ("GatherElements", "GatherND")}
    fused: dict[str, Count] = {
        "Attention": _attention(mask=3, past=4, integer=False),
        "QAttention": _attention(mask=5, past=8, integer=True),
        "MultiHeadAttention": _multi_head_attention,
        "BiasGelu": _each_output(6),
        "BiasSoftmax": _each_output(6),
        "FastGelu": _with_bias(8, 1),
        "Gelu": _each_output(5),
        "QuickGelu": _each_output(3),
        "RotaryEmbedding": _each_output(3),
        "SkipLayerNormalization": lambda call: Operations((7 + call.has(3) + call.has(4)) * call.out.elements),
        "SkipSimplifiedLayerNormalization": _with_bias(5, 3),
        "DynamicQuantizeMatMul": _dynamic_product,
        "MatMulIntegerToFloat": _integer_product(1, bias=6),
        "MatMulNBits": _few_bits_product,
        "QGemm": _integer_product(2, bias=6),
        "FusedMatMul": _product,
        "FusedGemm": lambda call: Operations((2 * _inner(call, "transA") + call.has(2) + 1) * call.out.elements),
        "FusedConv": _convolution(1, 2, after=1),
        # With channels last, as it is written on processors for integers; and a sum of restored values, rounded again.
        "QLinearConv": _convolution(3, 8, integer=True, after=2),
        "QLinearAdd": _each_output(9),
        "QuantizeLinear": _each_output(4),
        "DequantizeLinear": _each_output(2),
    }
    table |= {(MICROSOFT, name): Operator(count) for name, count in fused.items()}
    # ONNX Runtime writes this one into the standard domain of optimized graphs.
    table |= {("", "SimplifiedLayerNormalization"): Operator(_each_output(4))}
    table |= {(MICROSOFT, "GatherBlockQuantized"): Operator(_each_output(2), rows=_quantized_lookup)}
    table |= {(MICROSOFT, "GroupQueryAttention"): Operator(_grouped_attention, rows=_angles, written=_grouped_writes)}
    table |= {(MICROSOFT, "EmbedLayerNormalization"): Operator(_embed, rows=_embedding_lookups)}
    table |= {
        (_BLOCKED, "Conv"): Operator(_convolution(1, 2)),
        (_BLOCKED, "GlobalAveragePool"): Operator(_each_input(1)),
    }
    table |= {(_BLOCKED, name): Operator(_pool) for name in ("MaxPool", "AveragePool")}
    table |= {(_BLOCKED, name): Operator(_nothing) for name in ("ReorderInput", "ReorderOutput")}
    return table


OPERATORS = _table()
"""(domain, operator) -> how to count it."""


@dataclass(frozen=True)
class Cost:
    """What a node does in one call. ``weight_bytes`` are read from stored tensors, the rest from other nodes."""

    operations: Operations
    weight_bytes: int
    read_bytes: int
    written_bytes: int

    @property
    def moved_bytes(self) -> int:
        """All bytes read and written."""
        return self.weight_bytes + self.read_bytes + self.written_bytes

    @property
    def activation_bytes(self) -> int:
        """Bytes read from other nodes and written for them."""
        return self.read_bytes + self.written_bytes


@dataclass(frozen=True)
class GraphCost:
    """The costs of one call by node name. ``None`` for a node that nobody knows how to count.

    ``working_set_bytes`` is what a call has in use: the stored bytes that it reads, those shared by several nodes
    once, and the activations of the node that has most of them.
    """

    nodes: Mapping[str, Cost | None]
    working_set_bytes: int

    @property
    def operations(self) -> Operations:
        """The sum over the counted nodes."""
        known = [cost.operations for cost in self.nodes.values() if cost is not None]
        return Operations(sum(each.fp32 for each in known), sum(each.int8 for each in known))


def count_graph(graph: ir.Graph, shapes: Mapping[str, Tensor]) -> GraphCost:
    """The costs of one call of ``graph``, whose nodes have names of their own.

    ``shapes`` gives every tensor that is not stored in the graph, by name, as it is in that call; a node of which
    one is missing is not counted. Subgraphs are not entered, so an `If` or a `Loop` is not counted.
    """
    costs: dict[str, Cost | None] = {}
    stored: dict[str, int] = {}
    for node in graph:
        call = _call(node, shapes)
        cost = costs[str(node.name)] = None if call is None else _count(call)
        if call is not None and cost is not None:
            for value, tensor, size in zip(node.inputs, call.inputs, sizes_of_reads(call), strict=True):
                if value is not None and tensor is not None and tensor.stored:
                    key = str(value.name)
                    stored[key] = min(tensor.bytes, stored.get(key, 0) + size)
    busiest = max((cost.activation_bytes for cost in costs.values() if cost is not None), default=0)
    return GraphCost(costs, sum(stored.values()) + busiest)


def stored_tensor(value: ir.Value) -> Tensor | None:
    """Type and shape of an initializer, or ``None`` for a value that is computed."""
    if value.const_value is None:
        return None
    return Tensor(value.const_value.dtype, tuple(int(size) for size in value.const_value.shape), stored=True)


def _tensor(value: ir.Value, shapes: Mapping[str, Tensor]) -> Tensor | None:
    return stored_tensor(value) or shapes.get(str(value.name))


def _call(node: ir.Node, shapes: Mapping[str, Tensor]) -> Call | None:
    """The node with its tensors; None for an operator or a tensor that is not known."""
    inputs = [None if value is None else _tensor(value, shapes) for value in node.inputs]
    outputs = [_tensor(value, shapes) for value in node.outputs if value.name]
    present = [tensor for tensor in outputs if tensor is not None]
    unknown = any(value is not None and tensor is None for value, tensor in zip(node.inputs, inputs, strict=True))
    if (node.domain, node.op_type) not in OPERATORS or unknown or len(present) != len(outputs):
        return None
    return Call(node, inputs, present)


def _count(call: Call) -> Cost | None:
    operations = OPERATORS[call.node.domain, call.node.op_type].operations(call)
    if operations is None:
        return None
    reads = sizes_of_reads(call)
    weights = sum(size for tensor, size in zip(call.inputs, reads, strict=True) if tensor is not None and tensor.stored)
    return Cost(operations, weights, sum(reads) - weights, size_of_writes(call))
