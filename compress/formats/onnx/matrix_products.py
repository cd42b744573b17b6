"""`Einsum` and `FusedMatMul` as plain products and transposes, which quantizers and integer kernels know."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from compress.formats.onnx.graph_edits import Writer, clean, constant


@dataclass(frozen=True)
class _Letters:
    """Of two operands and their result; ``batch`` stands in all three, ``summed`` in both operands alone."""

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
        """Each letter stands once in a place, and none is summed within one operand."""
        once = all(len(set(each)) == len(each) and each.isalpha() for each in (self.left, self.right, self.out))
        return once and set(self.out) == {*self.batch, *self.rows, *self.columns}


def write_einsum(model: ir.Model) -> int:
    """Replace each `Einsum` of one operand, or of two with one product in it, in place; returns how many."""
    graph, count = model.graph, 0
    for node in list(graph):
        if node.op_type == "Einsum" and _replace_einsum(graph, node, count):
            count += 1
    if count:
        clean(model)
    return count


def _replace_einsum(graph: ir.Graph, node: ir.Node, index: int) -> bool:
    given, _, out = node.attributes.get_string("equation", "").replace(" ", "").partition("->")
    parts, old = given.split(","), node.outputs[0]
    writer = Writer(graph, node, f"einsum_{index}")
    first, second = (*node.inputs, None)[:2]
    made: ir.Value | None = None
    if first is None or not out:
        return False
    if len(parts) == 1 and sorted(parts[0]) == sorted(out):
        made = _turned(writer, first, parts[0], out)
    elif len(parts) == 2 and second is not None and (letters := _Letters(parts[0], parts[1], out)).plain:
        weight = constant(second)
        if weight is not None and not letters.batch:
            made = _projected(writer, first, weight, letters)
        elif len(letters.summed) == len(letters.rows) == len(letters.columns) == 1:
            made = _multiplied(writer, first, second, letters)
    if made is None:
        return False
    made.dtype, made.shape = old.dtype, old.shape
    old.replace_all_uses_with(made, replace_graph_outputs=True)
    return True


def _turned(writer: Writer, value: ir.Value, order: str, wanted: str) -> ir.Value:
    if order == wanted:
        return value
    perm = tuple(order.index(letter) for letter in wanted)
    shape = None if value.shape is None else [value.shape[axis] for axis in perm]
    return writer.node("Transpose", [value], shape, perm=perm)


def _projected(writer: Writer, value: ir.Value, weight: np.ndarray, letters: _Letters) -> ir.Value | None:
    """[..., summed] by stored weights: a product of two axes, and a reshape where either side has more."""
    summed, columns = letters.summed, letters.columns
    if not letters.left.endswith(summed) or letters.out != letters.rows + columns or not summed or not columns:
        return None
    matrix = np.transpose(weight, [letters.right.index(letter) for letter in summed + columns])
    sizes = matrix.shape[len(summed) :]
    matrix = matrix.reshape(int(np.prod(matrix.shape[: len(summed)])), -1)
    axes = len(letters.rows)
    rows = None if value.shape is None else list(value.shape)[:axes]
    if len(summed) > 1:
        merged = writer.constant(np.array([0] * axes + [-1]))
        value = writer.node("Reshape", [value, merged], rows and [*rows, matrix.shape[0]])
    product = writer.node("MatMul", [value, writer.constant(matrix)], rows and [*rows, matrix.shape[1]])
    if len(columns) == 1:
        return product
    split = writer.constant(np.array([0] * axes + list(sizes)))
    return writer.node("Reshape", [product, split], rows and [*rows, *sizes])


def _multiplied(writer: Writer, first: ir.Value, second: ir.Value, letters: _Letters) -> ir.Value:
    batch, rows, columns, summed = letters.batch, letters.rows, letters.columns, letters.summed
    left = _turned(writer, first, letters.left, batch + rows + summed)
    right = _turned(writer, second, letters.right, batch + summed + columns)
    shape = None if left.shape is None or right.shape is None else [*left.shape[:-1], right.shape[-1]]
    product = writer.node("MatMul", [left, right], shape)
    return _turned(writer, product, batch + rows + columns, letters.out)


_FUSED, _DOMAIN = "FusedMatMul", "com.microsoft"
_FLAGS = (("transBatchA", "transA"), ("transBatchB", "transB"))


def unfold_batch_transposes(model: ir.Model) -> int:
    """Put a `Transpose` before each such product, in place; returns before how many."""
    count = 0
    for node in list(model.graph):
        if node.op_type == _FUSED and node.domain == _DOMAIN and _refused(node):
            _unfold(model.graph, node)
            count += 1
    return count


def _refused(node: ir.Node) -> bool:
    ranks = [_rank(value) for value in node.inputs]
    asked = any(node.attributes.get_int(batch, 0) for batch, _ in _FLAGS)
    return asked and None not in ranks and not (ranks[0] == ranks[1] and (ranks[0] or 0) > 2)


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _unfold(graph: ir.Graph, node: ir.Node) -> None:
    for place, (batch, _) in enumerate(_FLAGS):
        value = node.inputs[place]
        if not node.attributes.get_int(batch, 0) or value is None or value.shape is None:
            continue
        # The first axis becomes the last but one.
        order = [*range(1, len(value.shape) - 1), 0, len(value.shape) - 1]
        shape = [value.shape[axis] for axis in order]
        moved = Writer(graph, node, f"{node.name}_{batch}").node("Transpose", [value], shape, perm=order)
        node.replace_input_with(place, moved)
        node.attributes[batch] = ir.AttrInt64(batch, 0)
    if any(node.attributes.get_int(plain, 0) for _, plain in _FLAGS) or node.attributes.get_float("alpha", 1.0) != 1.0:
        return
    # A plain product is what quantizers look for.
    node.op_type, node.domain = "MatMul", ""
    for name in list(node.attributes):
        del node.attributes[name]
