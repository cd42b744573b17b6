"""Weight-only quantization of any ONNX graph: constant matrices in few bits, for ONNX Runtime's `MatMulNBits`.

A table that is looked up and also multiplied with (a head tied to its embedding) is stored once for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import torch

from compress.models.onnx_decoder.nodes import MICROSOFT
from compress.models.onnx_decoder.stored_weight import StoredWeight, store
from compress.numerics.integer_grid import find_grid, round_columns

_SMALLEST = 1024
"""Elements of a matrix that is worth it."""
_HALVED = 1024
"""Elements of a float tensor that is worth storing in half the bytes where nothing is lost."""


@dataclass(frozen=True)
class FewBits:
    """How weights are stored. ``accuracy_level`` of `MatMulNBits`: 4 rounds activations to 8 bits, 1 does not."""

    bits: int
    block_size: int
    symmetric: bool = True
    accuracy_level: int = 4

    def of(self, weight: np.ndarray, name: str) -> StoredWeight:
        """``weight`` [rows, columns] in blocks along its rows, each scale the best of several."""
        columns = torch.from_numpy(np.array(weight.T, order="C"))
        grid = find_grid(columns, self.bits, min(self.block_size, len(columns)), self.symmetric, None, search=True)
        return store(grid.weight(round_columns(columns, grid)), name)


def quantize_matrices(
    model: onnx.ModelProto, how: FewBits, only_tied: bool = False
) -> tuple[onnx.ModelProto, list[str]]:
    """A copy of ``model`` whose constant matrices are stored in few bits, and their names; branches of `If` included.

    ``only_tied`` leaves alone what is not both looked up and multiplied with.
    """
    writer = _Writer(ir.from_proto(model), how)
    names = writer.tables(only_tied)
    if not only_tied:
        names += writer.products()
    return ir.to_proto(writer.finished(halve=not only_tied)), names


class _Writer:
    def __init__(self, model: ir.Model, how: FewBits) -> None:
        self._model, self._how = model, how
        self._operands: dict[str, tuple[StoredWeight, list[ir.Value | None]]] = {}

    def tables(self, only_tied: bool) -> list[str]:
        """Tables that are looked up and, turned, multiplied with; or looked up alone."""
        done = []
        for table in [value for value in self._model.graph.initializers.values() if _is_matrix(value)]:
            readers = [use.node for use in table.uses()]
            lookups = [node for node in readers if node.op_type == "Gather" and _axis(node) == 0]
            turned = [node for node in readers if _turns(node)]
            products = [use.node for node in turned for use in node.outputs[0].uses()]
            if not lookups or (only_tied and not products) or len(lookups) + len(turned) < len(readers):
                continue
            if any(node.op_type != "MatMul" or node.inputs[1].producer() not in turned for node in products):
                continue
            self._store(table, _array(table))
            for node in lookups:
                self._look_up(node, table)
            for node in products:
                self._multiply(node, table)
            done.append(str(table.name))
        return done

    def products(self) -> list[str]:
        """Matrices that something is multiplied with, and nothing else reads."""
        done: dict[str, None] = {}
        for node in list(_nodes(self._model.graph)):
            matrix = node.inputs[1] if node.op_type == "MatMul" and node.domain == "" else None
            if matrix is None or not _is_matrix(matrix):
                continue
            if str(matrix.name) not in self._operands:
                self._store(matrix, _array(matrix).T)
            self._multiply(node, matrix)
            done[str(matrix.name)] = None
        return list(done)

    def finished(self, halve: bool) -> ir.Model:
        """The model without what nothing reads any more."""
        graph = self._model.graph
        for node in reversed(list(graph)):
            if not any(output.uses() or output.is_graph_output() for output in node.outputs):
                graph.remove(node, safe=True)
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del graph.initializers[name]
        if halve:
            self._halve()
        self._model.opset_imports.setdefault(MICROSOFT, 1)
        return self._model

    def _halve(self) -> None:
        """Store float tensors as float16 where every value of theirs is one; ONNX Runtime casts them at loading."""
        for name, value in list(self._model.graph.initializers.items()):
            if value.dtype != ir.DataType.FLOAT or value.const_value is None or value.const_value.size < _HALVED:
                continue
            with np.errstate(over="ignore"):
                half = _array(value).astype(np.float16)
            if (half.astype(np.float32) == _array(value)).all():
                cast = self._cast(self._constant(f"{name}_float16", half))
                ir.convenience.replace_all_uses_with(value, cast)
                del self._model.graph.initializers[name]

    def _store(self, value: ir.Value, weight: np.ndarray) -> None:
        name = str(value.name)
        stored = self._how.of(weight, name)
        zeros = stored.packed_zero_points()
        self._operands[name] = (
            stored,
            [
                self._constant(f"{name}_Q{stored.bits}", stored.integers()),
                self._cast(self._constant(f"{name}_scales", stored.scales)),
                None if zeros is None else self._constant(f"{name}_zero_points", zeros),
            ],
        )

    def _multiply(self, node: ir.Node, matrix: ir.Value) -> None:
        stored, operands = self._operands[str(matrix.name)]
        attributes = {
            "K": stored.columns,
            "N": stored.rows,
            "bits": stored.kernel_bits,
            "block_size": stored.block_size,
            "accuracy_level": self._how.accuracy_level,
        }
        self._replace(node, "MatMulNBits", [node.inputs[0], *_without_end(operands)], attributes)

    def _look_up(self, node: ir.Node, table: ir.Value) -> None:
        stored, (integers, scales, zeros) = self._operands[str(table.name)]
        flat = np.array([stored.rows, stored.shape[1] * stored.shape[2]], np.int64)
        shape = self._constant(f"{table.name}_flat_shape", flat)
        reshaped = self._first("Reshape", [integers, shape], f"{table.name}_flat")
        attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": stored.block_size, "bits": stored.kernel_bits}
        inputs = [reshaped, node.inputs[1], scales, zeros]
        self._replace(node, "GatherBlockQuantized", _without_end(inputs), attributes)

    def _replace(self, old: ir.Node, kind: str, inputs: Sequence[ir.Value | None], attributes: dict[str, int]) -> None:
        new = ir.node(kind, inputs, attributes, domain=MICROSOFT, name=old.name)
        graph = old.graph
        assert graph is not None, "the node stands in a graph"
        ir.convenience.replace_nodes_and_values(graph, old, [old], [new], old.outputs, new.outputs)

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        graph = self._model.graph
        if name not in graph.initializers:
            graph.register_initializer(ir.val(name, const_value=ir.Tensor(np.ascontiguousarray(array), name=name)))
        return graph.initializers[name]

    def _cast(self, half: ir.Value) -> ir.Value:
        return self._first("Cast", [half], f"{half.name}_float32", to=ir.DataType.FLOAT)

    def _first(self, kind: str, inputs: Sequence[ir.Value | None], name: str, **attributes: int) -> ir.Value:
        """A node before all others, since branches may read it too."""
        node = ir.node(kind, inputs, attributes, name=name, outputs=[ir.val(name)])
        self._model.graph.insert_before(self._model.graph[0], node)
        return node.outputs[0]


def _nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    yield from ir.traversal.RecursiveGraphIterator(graph)


def _is_matrix(value: ir.Value | None) -> bool:
    if value is None or not value.is_initializer() or value.const_value is None or value.dtype != ir.DataType.FLOAT:
        return False
    return len(value.const_value.shape) == 2 and value.const_value.size >= _SMALLEST


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None, "initializers have values"
    array: np.ndarray = value.const_value.numpy()
    return array


def _axis(node: ir.Node) -> int:
    found = node.attributes.get("axis")
    return 0 if found is None else found.as_int()


def _turns(node: ir.Node) -> bool:
    if node.op_type != "Transpose":
        return False
    found = node.attributes.get("perm")
    return found is None or list(found.as_ints()) == [1, 0]


def _without_end(values: Sequence[ir.Value | None]) -> list[ir.Value | None]:
    """``values`` without inputs at the end that are left out."""
    kept = list(values)
    while kept and kept[-1] is None:
        kept.pop()
    return kept
