"""`Einsum` and `FusedMatMul` as plain products and transposes, which quantizers and integer kernels know."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from compress.formats.onnx.graph_edits import NodeWriter, clean, constant, rank


@dataclass(frozen=True)
class _Letters:
    """Subscripts of two operands and their result. ``batch`` occurs in all three, ``summed`` only in both operands."""

    left: str
    right: str
    out: str

    @property
    def batch(self) -> str:
        return "".join(letter for letter in self.out if letter in self.left and letter in self.right)

    @property
    def summed(self) -> str:
        return "".join(letter for letter in self.left if letter in self.right and letter not in self.out)

    @property
    def rows(self) -> str:
        return "".join(letter for letter in self.left if letter not in self.right)

    @property
    def columns(self) -> str:
        return "".join(letter for letter in self.right if letter not in self.left)

    @property
    def plain(self) -> bool:
        """Return whether each letter occurs once per term and none is summed within one operand."""
        once = all(len(set(term)) == len(term) and term.isalpha() for term in (self.left, self.right, self.out))
        return once and set(self.out) == {*self.batch, *self.rows, *self.columns}


def expand_einsum(model: ir.Model) -> int:
    """Replace each `Einsum` of one operand, or of two with a single product, in place; return how many.

    XLNet and Funnel compute attention with `Einsum`.
    """
    graph, count = model.graph, 0
    for node in list(graph):
        if node.op_type == "Einsum" and _replace_einsum(graph, node, count):
            count += 1
    if count:
        clean(model)
    return count


def _replace_einsum(graph: ir.Graph, node: ir.Node, index: int) -> bool:
    """Replace one `Einsum` and return True, or return False for a form that is not supported."""
    left_side, _, out = node.attributes.get_string("equation", "").replace(" ", "").partition("->")
    parts, old = left_side.split(","), node.outputs[0]
    writer = NodeWriter(graph, node, f"einsum_{index}")
    first, second = (*node.inputs, None)[:2]
    replacement: ir.Value | None = None
    if first is None or not out:
        return False
    # One operand: a transpose.
    if len(parts) == 1 and sorted(parts[0]) == sorted(out):
        replacement = _transposed(writer, first, parts[0], out)
    elif len(parts) == 2 and second is not None and (letters := _Letters(parts[0], parts[1], out)).plain:
        weight = constant(second)
        # Stored weights become a matrix; two computed operands a batched product.
        if weight is not None and not letters.batch:
            replacement = _projected(writer, first, weight, letters)
        elif len(letters.summed) == len(letters.rows) == len(letters.columns) == 1:
            replacement = _multiplied(writer, first, second, letters)
    if replacement is None:
        return False
    replacement.dtype, replacement.shape = old.dtype, old.shape
    old.replace_all_uses_with(replacement, replace_graph_outputs=True)
    return True


def _transposed(writer: NodeWriter, value: ir.Value, order: str, target: str) -> ir.Value:
    """Transpose ``value`` from the axis order ``order`` to ``target``."""
    if order == target:
        return value
    perm = tuple(order.index(letter) for letter in target)
    shape = None if value.shape is None else [value.shape[axis] for axis in perm]
    return writer.node("Transpose", [value], shape, perm=perm)


def _projected(writer: NodeWriter, value: ir.Value, weight: np.ndarray, letters: _Letters) -> ir.Value | None:
    """Multiply [..., summed] by stored weights: a matrix product, and a reshape where either side has more axes."""
    summed, columns = letters.summed, letters.columns
    if not letters.left.endswith(summed) or letters.out != letters.rows + columns or not summed or not columns:
        return None
    matrix = np.transpose(weight, [letters.right.index(letter) for letter in summed + columns])
    sizes = matrix.shape[len(summed) :]
    matrix = matrix.reshape(int(np.prod(matrix.shape[: len(summed)])), -1)
    axes = len(letters.rows)
    rows = None if value.shape is None else list(value.shape)[:axes]
    # Several summed axes are merged into one first.
    if len(summed) > 1:
        merged = writer.constant(np.array([0] * axes + [-1]))
        value = writer.node("Reshape", [value, merged], rows and [*rows, matrix.shape[0]])
    product = writer.node("MatMul", [value, writer.constant(matrix)], rows and [*rows, matrix.shape[1]])
    # Several column axes are split again after the product.
    if len(columns) == 1:
        return product
    split = writer.constant(np.array([0] * axes + list(sizes)))
    return writer.node("Reshape", [product, split], rows and [*rows, *sizes])


def _multiplied(writer: NodeWriter, first: ir.Value, second: ir.Value, letters: _Letters) -> ir.Value:
    """Multiply two computed operands as a batched matrix product."""
    batch, rows, columns, summed = letters.batch, letters.rows, letters.columns, letters.summed
    left = _transposed(writer, first, letters.left, batch + rows + summed)
    right = _transposed(writer, second, letters.right, batch + summed + columns)
    shape = None if left.shape is None or right.shape is None else [*left.shape[:-1], right.shape[-1]]
    product = writer.node("MatMul", [left, right], shape)
    return _transposed(writer, product, batch + rows + columns, letters.out)


_FUSED, _DOMAIN = "FusedMatMul", "com.microsoft"
_FLAGS = (("transBatchA", "transA"), ("transBatchB", "transB"))


def unfold_batch_transposes(model: ir.Model) -> int:
    """Put a `Transpose` before each `FusedMatMul` that ONNX Runtime refuses, in place; return how many.

    onnxscript folds a `Transpose` into the operator without checking the other operand's rank. ONNX Runtime only
    transposes batch axes if both operands have the same rank above two. `nn.MultiheadAttention`, which pools in SigLIP,
    has such a product with its weights.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type == _FUSED and node.domain == _DOMAIN and _refused(node):
            _unfold(model.graph, node)
            count += 1
    return count


def _refused(node: ir.Node) -> bool:
    """Return whether ONNX Runtime refuses a product, which it does for operands of different or low rank."""
    ranks = [rank(value) for value in node.inputs]
    transposes = any(node.attributes.get_int(batch, 0) for batch, _ in _FLAGS)
    return transposes and None not in ranks and not (ranks[0] == ranks[1] and (ranks[0] or 0) > 2)


def _unfold(graph: ir.Graph, node: ir.Node) -> None:
    """Transpose the operands explicitly, and make the node a plain `MatMul` if nothing else is fused into it."""
    for index, (batch, _) in enumerate(_FLAGS):
        value = node.inputs[index]
        if not node.attributes.get_int(batch, 0) or value is None or value.shape is None:
            continue
        # The first axis becomes the last but one.
        order = [*range(1, len(value.shape) - 1), 0, len(value.shape) - 1]
        shape = [value.shape[axis] for axis in order]
        moved = NodeWriter(graph, node, f"{node.name}_{batch}").node("Transpose", [value], shape, perm=order)
        node.replace_input_with(index, moved)
        node.attributes[batch] = ir.AttrInt64(batch, 0)
    if any(node.attributes.get_int(plain, 0) for _, plain in _FLAGS) or node.attributes.get_float("alpha", 1.0) != 1.0:
        return
    # A plain product is what quantizers look for.
    node.op_type, node.domain = "MatMul", ""
    for name in list(node.attributes):
        del node.attributes[name]
