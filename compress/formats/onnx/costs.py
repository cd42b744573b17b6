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

    def has(self, index: int) -> bool:
        """Return whether the node has the input."""
        return self.tensor(index) is not None

    def integer(self, name: str, default: int) -> int:
        """Return an integer attribute."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.as_int()

    def integers(self, name: str) -> tuple[int, ...]:
        """Return an attribute that lists integers, empty if it is absent."""
        attribute = self.node.attributes.get(name)
        return () if attribute is None else tuple(attribute.as_ints())

    @property
    def out(self) -> Tensor:
        """First output of the node."""
        return self.outputs[0]


MICROSOFT = "com.microsoft"
_BLOCKED = "com.microsoft.nchwc"


Count = Callable[[NodeCall], Operations | None]


@dataclass(frozen=True)
class Operator:
    """Rules for counting one operator.

    ``operations`` counts a call, and returns ``None`` for a form that it does not know. ``rows`` maps each input that
    is a lookup table to (the input with the indices, the axis). ``picks``: no more of the first input is read than is
    written. ``view``: nothing is moved. ``written`` counts the written bytes where an output shares memory with an
    input.
    """

    operations: Count
    rows: Callable[[NodeCall], dict[int, tuple[int, int]]] | None = None
    picks: bool = False
    view: bool = False
    written: Callable[[NodeCall], int] | None = None


def sizes_of_reads(call: NodeCall) -> list[int]:
    """Return the bytes that the node reads of each of its inputs."""
    operator = OPERATORS[call.node.domain, call.node.op_type]
    if operator.view:
        return [0 for _ in call.inputs]
    sizes = [0 if tensor is None else tensor.bytes for tensor in call.inputs]
    if operator.picks:
        sizes[0] = min(sizes[0], sum(tensor.bytes for tensor in call.outputs))
    # Of a lookup table only the rows that the indices select are read.
    for table, (indices, axis) in (operator.rows(call) if operator.rows else {}).items():
        data, picked = call.tensor(table), call.tensor(indices)
        if data is not None and picked is not None and data.shape[axis]:
            sizes[table] = min(data.bytes, picked.elements * data.bytes // data.shape[axis])
    return sizes


def size_of_writes(call: NodeCall) -> int:
    """Return the bytes that the node writes."""
    operator = OPERATORS[call.node.domain, call.node.op_type]
    if operator.written is not None:
        return operator.written(call)
    return 0 if operator.view else sum(tensor.bytes for tensor in call.outputs)


def _nothing(call: NodeCall) -> Operations:
    """Count no operations, for nodes that only move values."""
    return Operations()


def _each_output(steps: int) -> Count:
    """Count ``steps`` for each element of the output."""
    return lambda call: Operations(fp32=steps * call.out.elements)


def _each_input(steps: int) -> Count:
    """Count ``steps`` for each element of the first input."""
    return lambda call: Operations(fp32=steps * call.need(0).elements)


def _sum(call: NodeCall) -> Operations:
    """Count the additions of a sum of all inputs."""
    return Operations(fp32=(len(call.inputs) - 1) * call.out.elements)


def _with_bias(steps: int, bias: int) -> Count:
    """Count ``steps`` for each element of the output, and one more if the input ``bias`` is present."""
    return lambda call: Operations(fp32=(steps + call.has(bias)) * call.out.elements)


def _gelu(call: NodeCall) -> Operations:
    """Count GELU: x/2 (1 + erf(x/√2)) is 5 steps, its approximation by tanh 8."""
    form = call.node.attributes.get("approximate")
    return Operations(fp32=(8 if form is not None and form.as_string() == "tanh" else 5) * call.out.elements)


def _inner(call: NodeCall, transposed: str) -> int:
    """Return the length of the axis over which a product sums."""
    shape = call.need(0).shape
    return shape[-2] if len(shape) > 1 and call.integer(transposed, 0) else shape[-1]


def _product(call: NodeCall) -> Operations:
    """Count a float matrix product."""
    return Operations(fp32=2 * _inner(call, "transA") * call.out.elements)


def _gemm(call: NodeCall) -> Operations:
    """Count a float matrix product with an optional bias."""
    return Operations(fp32=(2 * _inner(call, "transA") + call.has(2)) * call.out.elements)


def _integer_product(after: int, bias: int | None = None) -> Count:
    """Count 8-bit products, then ``after`` float steps for each element of the output, and one for a bias."""

    def count(call: NodeCall) -> Operations:
        steps = after + (bias is not None and call.has(bias))
        return Operations(steps * call.out.elements, 2 * _inner(call, "transA") * call.out.elements)

    return count


def _dynamic_product(call: NodeCall) -> Operations:
    """Count `DynamicQuantizeLinear` of the input, the integer product, its scale, and a bias."""
    float_steps = 6 * call.need(0).elements + (1 + call.has(4)) * call.out.elements
    return Operations(float_steps, 2 * _inner(call, "transA") * call.out.elements)


def _few_bits_product(call: NodeCall) -> Operations:
    """Count `MatMulNBits`, whose kernels at accuracy level 4 quantize the input and multiply integers."""
    products, bias = 2 * call.integer("K", 0) * call.out.elements, call.has(5) * call.out.elements
    if call.integer("accuracy_level", 0) == 4:
        return Operations(6 * call.need(0).elements + call.out.elements + bias, products)
    return Operations(products + bias)


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
        float_steps = (after + (bias is not None and call.has(bias))) * call.out.elements
        return Operations(float_steps, products) if integer else Operations(products + float_steps)

    return count


def _transposed_convolution(call: NodeCall) -> Operations:
    """Count a transposed convolution, whose weights are applied to each element of the input."""
    filters = call.need(1)
    products = 2 * call.need(0).elements * filters.elements // filters.shape[0]
    return Operations(products + call.has(2) * call.out.elements)


def _pool(call: NodeCall) -> Operations:
    """Count a pooling: one step for each element of the kernel and the output."""
    return Operations(math.prod(call.integers("kernel_shape")) * call.out.elements)


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
        (batch, length, width), heads = call.need(0).shape, call.integer("num_heads", 0)
        weights, past_keys = call.tensor(1), call.tensor(past)
        widths = call.integers("qkv_hidden_sizes") or ((weights.shape[-1] // 3,) * 3 if weights else ())
        if len(widths) != 3 or heads < 1 or call.integer("do_rotary", 0):
            return None
        keys = length + (past_keys.shape[3] if past_keys else 0)
        scores = batch * heads * length * keys
        core = attention_core(batch, heads, length, keys, widths[1], widths[2]) + call.has(mask) * scores
        projected = batch * length * sum(widths)
        products = 2 * width * projected
        # The integer products are scaled and get their bias in one pass.
        return Operations(core + 2 * projected, products) if integer else Operations(core + products + projected)

    return count


def _multi_head_attention(call: NodeCall) -> Operations | None:
    """Count `MultiHeadAttention` with query, key and value of [batch, length, width] each and no past."""
    query, key, value = (call.tensor(index) for index in range(3))
    heads = call.integer("num_heads", 0)
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
    query, present, heads = call.need(0), call.outputs[1], call.integer("num_heads", 0)
    if heads < 1 or any(call.has(index) for index in range(10, len(call.inputs))) or len(query.shape) != 3:
        return None
    batch, queries, _ = query.shape
    _, groups, keys, size = present.shape
    window = call.integer("local_window_size", -1)
    visible_keys = (min(keys - queries + 1 + position, window if window > 0 else keys) for position in range(queries))
    core = attention_core(batch, heads, 1, sum(visible_keys), heads * size, heads * size)
    return Operations(core + call.integer("do_rotary", 0) * 3 * batch * queries * (heads + groups) * size)


def _grouped_writes(call: NodeCall) -> int:
    """Count the output and the new keys and values; earlier ones may stay in place."""
    new = call.need(0).shape[1]
    return call.out.bytes + sum(cache.bytes * new // max(1, cache.shape[2]) for cache in call.outputs[1:])


def _embed(call: NodeCall) -> Operations:
    """Count the additions of two or three embeddings and their normalisation."""
    return Operations(fp32=(7 + 1 + call.has(4)) * call.out.elements)


def _lookup(call: NodeCall) -> dict[int, tuple[int, int]]:
    """Return the table of a `Gather`."""
    return {0: (1, call.integer("axis", 0))}


def _quantized_lookup(call: NodeCall) -> dict[int, tuple[int, int]]:
    """Return the integers, scales and zero points of a `GatherBlockQuantized`."""
    axis = call.integer("gather_axis", 0)
    return {0: (1, axis), 2: (1, axis), 3: (1, axis)}


def _angles(call: NodeCall) -> dict[int, tuple[int, int]]:
    """Return the tables of cosines and sines, of which one row is read for each row of the batch.

    A prompt reads more rows than one, so this is a lower bound.
    """
    return {7: (5, 0), 8: (5, 0)}


def _embedding_lookups(call: NodeCall) -> dict[int, tuple[int, int]]:
    """Return the three tables of an `EmbedLayerNormalization`."""
    return {2: (0, 0), 3: (0, 0), 4: (0, 0)}


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
    return table | {("", name): Operator(_nothing, picks=True) for name in ("GatherElements", "GatherND")}


def _onnxruntime_operators() -> dict[tuple[str, str], Operator]:
    """Return the counting rules of operators that only ONNX Runtime has."""
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
    table = {(MICROSOFT, name): Operator(count) for name, count in fused.items()}
    # ONNX Runtime writes this one into the standard domain of optimized graphs.
    table |= {("", "SimplifiedLayerNormalization"): Operator(_each_output(4))}
    table |= {(MICROSOFT, "GatherBlockQuantized"): Operator(_each_output(2), rows=_quantized_lookup)}
    table |= {(MICROSOFT, "GroupQueryAttention"): Operator(_grouped_attention, rows=_angles, written=_grouped_writes)}
    table |= {(MICROSOFT, "EmbedLayerNormalization"): Operator(_embed, rows=_embedding_lookups)}
    table |= {
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
        call = _call(node, shapes)
        cost = costs[str(node.name)] = None if call is None else _count(call)
        if call is not None and cost is not None:
            for value, tensor, size in zip(node.inputs, call.inputs, sizes_of_reads(call), strict=True):
                if value is not None and tensor is not None and tensor.stored:
                    key = str(value.name)
                    # Nodes that read the same tensor share its bytes.
                    stored[key] = min(tensor.bytes, stored.get(key, 0) + size)
    busiest = max((cost.activation_bytes for cost in costs.values() if cost is not None), default=0)
    return GraphCost(costs, sum(stored.values()) + busiest)


def stored_tensor(value: ir.Value) -> Tensor | None:
    """Return type and shape of an initializer, or ``None`` for a computed value."""
    if value.const_value is None:
        return None
    return Tensor(value.const_value.dtype, tuple(int(size) for size in value.const_value.shape), stored=True)


def _tensor(value: ir.Value, shapes: Mapping[str, Tensor]) -> Tensor | None:
    """Return a value's tensor, stored or computed."""
    return stored_tensor(value) or shapes.get(str(value.name))


def _call(node: ir.Node, shapes: Mapping[str, Tensor]) -> NodeCall | None:
    """Return the node with its tensors; None for an unknown operator or tensor."""
    inputs = [None if value is None else _tensor(value, shapes) for value in node.inputs]
    outputs = [_tensor(value, shapes) for value in node.outputs if value.name]
    present = [tensor for tensor in outputs if tensor is not None]
    unknown = any(value is not None and tensor is None for value, tensor in zip(node.inputs, inputs, strict=True))
    if (node.domain, node.op_type) not in OPERATORS or unknown or len(present) != len(outputs):
        return None
    return NodeCall(node, inputs, present)


def _count(call: NodeCall) -> NodeCost | None:
    """Return the cost of a call, or None for a form that its operator's rule does not know."""
    operations = OPERATORS[call.node.domain, call.node.op_type].operations(call)
    if operations is None:
        return None
    reads = sizes_of_reads(call)
    weights = sum(size for tensor, size in zip(call.inputs, reads, strict=True) if tensor is not None and tensor.stored)
    return NodeCost(operations, weights, sum(reads) - weights, size_of_writes(call))
