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
from dataclasses import dataclass, field
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
        """Size of the values in bytes; 4-bit types are packed in pairs."""
        return math.ceil(self.elements * float(self.dtype.bitwidth) / 8)


class Operations(NamedTuple):
    """Arithmetic operations by the class of arithmetic that does them."""

    fp32: int = 0
    int8: int = 0


@dataclass(frozen=True)
class NodeCall:
    """One node with the tensors of one call. Optional inputs that are absent are ``None``."""

    node: ir.Node
    inputs: list[Tensor | None]
    outputs: list[Tensor]

    def tensor(self, index: int) -> Tensor | None:
        """Return an input, or ``None`` if it is absent."""
        return self.inputs[index] if index < len(self.inputs) else None

    def need(self, index: int) -> Tensor:
        """Return an input that the operator always has."""
        tensor = self.tensor(index)
        assert tensor is not None, f"{self.node.op_type} without input {index}"
        return tensor

    def has(self, index: int | None) -> bool:
        """Return whether the node has the input; it has no input ``None``."""
        return index is not None and self.tensor(index) is not None

    def integer(self, name: str, default: int = 0) -> int:
        """Return an integer attribute."""
        return int(self.node.attributes.get_int(name, default))

    @property
    def out(self) -> Tensor:
        """First output of the node."""
        return self.outputs[0]


MICROSOFT, _BLOCKED = "com.microsoft", "com.microsoft.nchwc"


Count = Callable[[NodeCall], Operations | None]


@dataclass(frozen=True)
class Operator:
    """Rules for counting one operator.

    ``operations`` counts a call, and returns ``None`` for a form that it does not know. ``rows`` maps each input that
    is a lookup table to the input with the indices of its rows, which lie along the attribute ``axis``, 0 by default.
    ``picks``: no more of the first input is read than is written. ``view``: nothing is moved. ``written`` counts the
    written bytes where an output shares memory with an input.
    """

    operations: Count
    rows: Mapping[int, int] = field(default_factory=dict)
    axis: str = "axis"
    picks: bool = False
    view: bool = False
    written: Callable[[NodeCall], int] | None = None

    def reads(self, call: NodeCall) -> list[int]:
        """Return the bytes that the node reads of each of its inputs."""
        if self.view:
            return [0 for _ in call.inputs]
        sizes = [0 if tensor is None else tensor.bytes for tensor in call.inputs]
        if self.picks:
            sizes[0] = min(sizes[0], sum(tensor.bytes for tensor in call.outputs))
        # Of a lookup table only the rows that the indices select are read.
        for table, indices in self.rows.items():
            data, picked = call.tensor(table), call.tensor(indices)
            if data is not None and picked is not None and (count := data.shape[call.integer(self.axis)]):
                sizes[table] = min(data.bytes, picked.elements * data.bytes // count)
        return sizes

    def writes(self, call: NodeCall) -> int:
        """Return the bytes that the node writes."""
        if self.written is not None:
            return self.written(call)
        return 0 if self.view else sum(tensor.bytes for tensor in call.outputs)


def _nothing(call: NodeCall) -> Operations:
    """Count no operations, for nodes that only move values."""
    return Operations()


def _each_output(steps: int, *optional: int) -> Count:
    """Count ``steps`` for each element of the output, and one more for each of the ``optional`` inputs."""
    return lambda call: Operations((steps + sum(map(call.has, optional))) * call.out.elements)


def _each_input(steps: int) -> Count:
    """Count ``steps`` for each element of the first input."""
    return lambda call: Operations(steps * call.need(0).elements)


def _gelu(call: NodeCall) -> Operations:
    """Count GELU: x/2 (1 + erf(x/√2)) is 5 steps, its approximation by tanh 8."""
    approximate = call.node.attributes.get_string("approximate", "none")
    return Operations((8 if approximate == "tanh" else 5) * call.out.elements)


def _operations(products: int, steps: int, integer: bool) -> Operations:
    """Return multiply-adds of floats or of 8-bit integers, and float steps."""
    return Operations(steps, products) if integer else Operations(products + steps)


def _product(after: int = 0, bias: int | None = None, integer: bool = False, before: int = 0) -> Count:
    """Count a matrix product.

    Args:
        after: Float steps for each element of the output.
        bias: Index of the input with the bias, which is one step more, or None for an operator without one.
        integer: Whether the products are of 8-bit integers.
        before: Float steps for each element of the first input, which quantize it.
    """

    def count(call: NodeCall) -> Operations:
        shape = call.need(0).shape
        inner = shape[-2] if len(shape) > 1 and call.integer("transA") else shape[-1]
        steps = before * call.need(0).elements + (after + call.has(bias)) * call.out.elements
        return _operations(2 * inner * call.out.elements, steps, integer)

    return count


def _few_bits_product(call: NodeCall) -> Operations:
    """Count `MatMulNBits`, whose kernels at accuracy level 4 quantize the input and multiply integers."""
    integer, outputs = call.integer("accuracy_level") == 4, call.out.elements
    steps = 6 * call.need(0).elements + outputs if integer else 0
    return _operations(2 * call.integer("K") * outputs, steps + call.has(5) * outputs, integer)


def _convolution(weight: int, bias: int | None, integer: bool = False, after: int = 0) -> Count:
    """Count a convolution: 2 · (channels of a group) · (kernel) for each element of the output.

    Args:
        weight: Index of the input with the weights [out, in / group, ...].
        bias: Index of the input with the bias, or None for an operator without one.
        integer: Whether the products are of 8-bit integers.
        after: Float steps for each element of the output.
    """

    def count(call: NodeCall) -> Operations:
        filters = call.need(weight)
        products = 2 * filters.elements // filters.shape[0] * call.out.elements
        return _operations(products, (after + call.has(bias)) * call.out.elements, integer)

    return count


def _transposed_convolution(call: NodeCall) -> Operations:
    """Count a transposed convolution, whose weights are applied to each element of the input."""
    filters = call.need(1)
    products = 2 * call.need(0).elements * filters.elements // filters.shape[0]
    return Operations(products + call.has(2) * call.out.elements)


def _pool(call: NodeCall) -> Operations:
    """Count a pooling: one step for each element of the kernel and the output."""
    return Operations(math.prod(call.node.attributes.get_ints("kernel_shape", ())) * call.out.elements)


def attention_core(batch: int, heads: int, queries: int, keys: int, key_width: int, value_width: int) -> int:
    """Return the operations of softmax(Q Kᵀ · scale) V.

    They are two products, the scale, and 5 per score for the softmax. A mask is one addition more, which the caller
    adds.

    Args:
        batch: Rows of the batch.
        heads: Attention heads.
        queries: Number of queries.
        keys: Number of keys.
        key_width: Width of the keys of all heads together.
        value_width: Width of the values of all heads together.
    """
    products = 2 * batch * queries * keys * (key_width + value_width)
    return products + 6 * batch * heads * queries * keys


def _attention(mask: int, past: int, integer: bool) -> Count:
    """Count `Attention` and `QAttention`: the projections of [batch, length, width] to Q, K and V, then the core."""

    def count(call: NodeCall) -> Operations | None:
        (batch, length, width), heads = call.need(0).shape, call.integer("num_heads")
        weights, past_keys = call.tensor(1), call.tensor(past)
        widths = call.node.attributes.get_ints("qkv_hidden_sizes", (weights.shape[-1] // 3,) * 3 if weights else ())
        if len(widths) != 3 or heads < 1 or call.integer("do_rotary"):
            return None
        keys = length + (past_keys.shape[3] if past_keys else 0)
        scores = batch * heads * length * keys
        core = attention_core(batch, heads, length, keys, widths[1], widths[2]) + call.has(mask) * scores
        projected = batch * length * sum(widths)
        # The products get their bias; integer ones are scaled too.
        return _operations(2 * width * projected, core + (1 + integer) * projected, integer)

    return count


def _multi_head_attention(call: NodeCall) -> Operations | None:
    """Count `MultiHeadAttention` with query, key and value of [batch, length, width] each and no past."""
    query, key, value = (call.tensor(index) for index in range(3))
    heads = call.integer("num_heads")
    if heads < 1 or not query or not key or not value or any(len(tensor.shape) != 3 for tensor in (query, key, value)):
        return None
    if any(call.has(index) for index in range(6, len(call.inputs))):
        return None
    (batch, queries, _), keys = query.shape, key.shape[1]
    core = attention_core(batch, heads, queries, keys, key.shape[2], value.shape[2])
    biases = call.has(3) * (query.elements + key.elements + value.elements)
    masks = (call.has(4) + call.has(5)) * batch * heads * queries * keys
    return Operations(core + biases + masks)


def _grouped_attention(call: NodeCall) -> Operations | None:
    """Count `GroupQueryAttention`: a query sees the keys up to its own, within the window if there is one.

    Rotation is 3 steps for each element of queries and keys. Query, key and value may lie in one tensor.
    """
    query, present, heads = call.need(0), call.outputs[1], call.integer("num_heads")
    if heads < 1 or any(call.has(index) for index in range(10, len(call.inputs))) or len(query.shape) != 3:
        return None
    batch, queries, _ = query.shape
    _, groups, keys, size = present.shape
    window = call.integer("local_window_size", -1)
    visible_keys = (min(keys - queries + 1 + position, window if window > 0 else keys) for position in range(queries))
    core = attention_core(batch, heads, 1, sum(visible_keys), heads * size, heads * size)
    return Operations(core + call.integer("do_rotary") * 3 * batch * queries * (heads + groups) * size)


def _grouped_writes(call: NodeCall) -> int:
    """Count the output and the new keys and values; earlier ones may stay in place."""
    new = call.need(0).shape[1]
    return call.out.bytes + sum(cache.bytes * new // max(1, cache.shape[2]) for cache in call.outputs[1:])


def _standard_operators() -> dict[tuple[str, str], Operator]:
    """Return the counting rules of operators in the ONNX standard."""
    single_step = (
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
    counts: dict[str, Count] = {name: _each_output(1) for name in single_step}
    counts |= {name: _each_input(1) for name in reductions}
    counts |= dict.fromkeys(moves, _nothing)
    counts |= {name: _each_output(count) for name, count in steps.items()}
    counts |= dict.fromkeys(
        ("Sum", "Max", "Min", "Mean"), lambda call: Operations((len(call.inputs) - 1) * call.out.elements)
    )
    counts |= {"QuantizeLinear": _each_output(4), "DynamicQuantizeLinear": _each_output(6), "Gelu": _gelu}
    counts |= {"LayerNormalization": _each_output(6, 2), "MatMul": _product(), "Gemm": _product(bias=2)}
    counts |= {"MatMulInteger": _product(integer=True), "QLinearMatMul": _product(2, integer=True)}
    counts |= {"Conv": _convolution(1, 2), "ConvInteger": _convolution(1, None, integer=True)}
    counts |= {"QLinearConv": _convolution(3, 8, integer=True, after=2), "ConvTranspose": _transposed_convolution}
    counts |= {"MaxPool": _pool, "AveragePool": _pool}
    table = {("", name): Operator(count) for name, count in counts.items()}
    table |= {("", name): Operator(_nothing, view=True) for name in views}
    table |= {("", "Slice"): Operator(_nothing, picks=True), ("", "Gather"): Operator(_nothing, rows={0: 1})}
    return table | {("", name): Operator(_nothing, picks=True) for name in ("GatherElements", "GatherND")}


def _onnxruntime_operators() -> dict[tuple[str, str], Operator]:
    """Return the counting rules of operators that only ONNX Runtime has."""
    steps = {"BiasGelu": 6, "BiasSoftmax": 6, "Gelu": 5, "QuickGelu": 3, "RotaryEmbedding": 3}
    steps |= {"QLinearAdd": 9, "QuantizeLinear": 4, "DequantizeLinear": 2}
    fused: dict[str, Count] = {
        "Attention": _attention(mask=3, past=4, integer=False),
        "QAttention": _attention(mask=5, past=8, integer=True),
        "MultiHeadAttention": _multi_head_attention,
        "FastGelu": _each_output(8, 1),
        "SkipLayerNormalization": _each_output(7, 3, 4),
        "SkipSimplifiedLayerNormalization": _each_output(5, 3),
        "DynamicQuantizeMatMul": _product(1, bias=4, integer=True, before=6),
        "MatMulIntegerToFloat": _product(1, bias=6, integer=True),
        "MatMulNBits": _few_bits_product,
        "QGemm": _product(2, bias=6, integer=True),
        "FusedMatMul": _product(),
        "FusedGemm": _product(1, bias=2),
        "FusedConv": _convolution(1, 2, after=1),
        # With channels last, as it is written on processors for integers.
        "QLinearConv": _convolution(3, 8, integer=True, after=2),
        **{name: _each_output(count) for name, count in steps.items()},
    }
    table = {(MICROSOFT, name): Operator(count) for name, count in fused.items()}
    # ONNX Runtime writes this one into the standard domain of optimized graphs.
    table |= {("", "SimplifiedLayerNormalization"): Operator(_each_output(4))}
    integers_scales_and_zero_points = {0: 1, 2: 1, 3: 1}
    # One row of cosines and sines is read for each row of the batch; a prompt reads more, so this is a lower bound.
    angles = {7: 5, 8: 5}
    table |= {
        (MICROSOFT, "GatherBlockQuantized"): Operator(
            _each_output(2), rows=integers_scales_and_zero_points, axis="gather_axis"
        ),
        (MICROSOFT, "GroupQueryAttention"): Operator(_grouped_attention, rows=angles, written=_grouped_writes),
        # The sum of two or three embeddings and its normalization.
        (MICROSOFT, "EmbedLayerNormalization"): Operator(_each_output(8, 4), rows={2: 0, 3: 0, 4: 0}),
        # Operators on channels in blocks, which ONNX Runtime inserts when it optimizes for one processor.
        (_BLOCKED, "Conv"): Operator(_convolution(1, 2)),
        (_BLOCKED, "GlobalAveragePool"): Operator(_each_input(1)),
    }
    table |= {(_BLOCKED, name): Operator(_pool) for name in ("MaxPool", "AveragePool")}
    table |= {(_BLOCKED, name): Operator(_nothing) for name in ("ReorderInput", "ReorderOutput")}
    return table


OPERATORS = _standard_operators() | _onnxruntime_operators()
"""Counting rule by (domain, operator)."""


@dataclass(frozen=True)
class NodeCost:
    """Work of a node in one call. ``weight_bytes`` are read from stored tensors, ``read_bytes`` from other nodes."""

    operations: Operations
    weight_bytes: int
    read_bytes: int
    written_bytes: int

    @property
    def total_bytes(self) -> int:
        """Number of bytes read and written."""
        return self.weight_bytes + self.read_bytes + self.written_bytes

    @property
    def activation_bytes(self) -> int:
        """Bytes read from other nodes and written for them."""
        return self.read_bytes + self.written_bytes


@dataclass(frozen=True)
class GraphCost:
    """Costs of one call by node name, ``None`` for a node that cannot be counted.

    ``working_set_bytes`` is the memory that a call uses: the stored bytes that it reads, each once, and the activations
    of the node that has most of them.
    """

    nodes: Mapping[str, NodeCost | None]
    working_set_bytes: int

    @property
    def operations(self) -> Operations:
        """Sum of the operations of all counted nodes."""
        counted = [cost.operations for cost in self.nodes.values() if cost is not None]
        return Operations(
            sum(operations.fp32 for operations in counted), sum(operations.int8 for operations in counted)
        )


def count_graph(graph: ir.Graph, shapes: Mapping[str, Tensor]) -> GraphCost:
    """Return the costs of one call of ``graph``, whose nodes have unique names.

    ``shapes`` holds every tensor that is not stored in the graph, by name, as it is in that call. A node with an
    unknown tensor is not counted. Subgraphs are not entered, so an `If` or a `Loop` is not counted.
    """
    costs: dict[str, NodeCost | None] = {}
    stored: dict[str, int] = {}
    for node in graph:
        costs[str(node.name)] = None
        call, operator = _call(node, shapes), OPERATORS.get((node.domain, node.op_type))
        # A rule may not know the form of a call.
        operations = None if call is None or operator is None else operator.operations(call)
        if call is None or operator is None or operations is None:
            continue
        reads, weights = operator.reads(call), 0
        for value, tensor, size in zip(node.inputs, call.inputs, reads, strict=True):
            if value is not None and tensor is not None and tensor.stored:
                weights, key = weights + size, str(value.name)
                # Nodes that read the same tensor share its bytes.
                stored[key] = min(tensor.bytes, stored.get(key, 0) + size)
        costs[str(node.name)] = NodeCost(operations, weights, sum(reads) - weights, operator.writes(call))
    busiest = max((cost.activation_bytes for cost in costs.values() if cost is not None), default=0)
    return GraphCost(costs, sum(stored.values()) + busiest)


def stored_tensor(value: ir.Value) -> Tensor | None:
    """Return type and shape of an initializer, or ``None`` for a computed value."""
    if value.const_value is None:
        return None
    return Tensor(value.const_value.dtype, tuple(int(size) for size in value.const_value.shape), stored=True)


def _call(node: ir.Node, shapes: Mapping[str, Tensor]) -> NodeCall | None:
    """Return the node with its tensors, stored or computed; None if one of them is unknown."""
    inputs, outputs = (
        [None if value is None else stored_tensor(value) or shapes.get(str(value.name)) for value in values]
        for values in (node.inputs, [value for value in node.outputs if value.name])
    )
    present = [tensor for tensor in outputs if tensor is not None]
    unknown = any(value is not None and tensor is None for value, tensor in zip(node.inputs, inputs, strict=True))
    return None if unknown or len(present) != len(outputs) else NodeCall(node, inputs, present)
