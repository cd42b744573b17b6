"""`Einsum` as products and turns, which other rewrites, quantizers and integer kernels know (XLNet, Funnel)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from compress.formats.onnx.fusions.graph import Writer, clean, constant


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
        if node.op_type == "Einsum" and _replace(graph, node, count):
            count += 1
    if count:
        clean(model)
    return count


def _replace(graph: ir.Graph, node: ir.Node, index: int) -> bool:
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
