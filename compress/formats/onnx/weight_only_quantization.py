"""Weight-only quantization of any ONNX graph: constant matrices in few bits, for ONNX Runtime's `MatMulNBits`.

A table that is looked up and also multiplied with (a head tied to its embedding) is stored once for both. Weights
may be expanded to float when the graph is opened, for runtimes whose few-bit kernels are slow; the products then
stay as they are (`compress.formats.onnx.decoder.stored_weight` explains the reason).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import torch

from compress.formats.onnx.decoder.stored_weight import StoredWeight, store, typed_integers
from compress.formats.onnx.graph_edits import MICROSOFT, constant, without_absent_end
from compress.formats.onnx.int8.fuse_integer_ops import pack_attention, unpack_attention
from compress.numerics.integer_grid import find_grid, round_columns

_SMALLEST = 1024
"""Smallest number of elements of a matrix that is quantized."""
_SPLITS_IN_THREE = 18
"""ONNX operator set from which `Split` has an attribute for the number of its outputs."""
_CASTS_FOUR_BITS = 21
"""ONNX operator set from which `Cast` accepts 4-bit integers."""
_HALVED = 1024
"""Smallest number of elements of a float tensor that is stored in half the bytes where nothing is lost."""


@dataclass(frozen=True)
class WeightOnlySettings:
    """Storage of weights. ``accuracy_level`` of `MatMulNBits`: 4 rounds activations to 8 bits, 1 does not.

    ``expand_on_load``: weights become float when the graph is opened, instead of using such a kernel.
    """

    bits: int
    block_size: int
    symmetric: bool = True
    accuracy_level: int = 4
    expand_on_load: bool = False

    def of(self, weight: np.ndarray, name: str) -> StoredWeight:
        """Quantize ``weight`` [rows, columns] in blocks along its rows, with the best of several scales per block."""
        columns = torch.from_numpy(np.array(weight.T, order="C"))
        grid = find_grid(columns, self.bits, min(self.block_size, len(columns)), self.symmetric, None, search=True)
        return store(grid.weight(round_columns(columns, grid)), name)


def quantize_matrices(
    model: onnx.ModelProto, how: WeightOnlySettings, only_tied: bool = False
) -> tuple[onnx.ModelProto, list[str]]:
    """Return a copy of ``model`` whose constant matrices have few bits, and their names; branches of `If` included.

    ``only_tied`` skips matrices that are not both looked up and multiplied with. `Attention` takes float weights, so it
    is unpacked into a product first, unless weights are expanded when the graph is opened.
    """
    graph = ir.from_proto(model)
    # Older operator sets cannot express the split of an unpacked attention.
    attentions = [] if only_tied or graph.opset_imports.get("", 0) < _SPLITS_IN_THREE else unpack_attention(graph)
    writer = _Writer(graph, how)
    names = writer.tables(only_tied)
    if not only_tied:
        names += writer.products()
    if how.expand_on_load:
        pack_attention(graph, attentions)
    return ir.to_proto(writer.finished(halve=not only_tied)), names


class _Writer:
    """Quantization of one graph, in place."""

    def __init__(self, model: ir.Model, how: WeightOnlySettings) -> None:
        self._model, self._how = model, how
        self._operands: dict[str, tuple[StoredWeight, list[ir.Value | None]]] = {}

    def tables(self, only_tied: bool) -> list[str]:
        """Quantize tables that are looked up, and those that are multiplied with too; return their names."""
        done = []
        for table in [value for value in self._model.graph.initializers.values() if _is_matrix(value)]:
            readers = [use.node for use in table.uses()]
            lookups = [node for node in readers if node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0]
            # A matrix has one order of axes other than its own.
            turned = [node for node in readers if node.op_type == "Transpose"]
            turned = [node for node in turned if list(node.attributes.get_ints("perm", [1, 0])) == [1, 0]]
            products = [use.node for node in turned for use in node.outputs[0].uses()]
            # A table with any other reader stays float, and so does one whose transpose is not the right operand of a
            # product.
            if not lookups or (only_tied and not products) or len(lookups) + len(turned) < len(readers):
                continue
            if any(node.op_type != "MatMul" or node.inputs[1].producer() not in turned for node in products):
                continue
            done.append(str(table.name))
            if self._how.expand_on_load:
                self._expand(table, _array(table), turned=False)
                continue
            self._store(table, _array(table))
            for node in lookups:
                # Replace a lookup by `GatherBlockQuantized`.
                stored, (integers, scales, zeros) = self._operands[str(table.name)]
                # `GatherBlockQuantized` takes the integers as a matrix, `MatMulNBits` in blocks.
                flat = np.array([stored.rows, stored.shape[1] * stored.shape[2]], np.int64)
                shape = self._constant(f"{table.name}_flat_shape", flat)
                reshaped = self._first("Reshape", [integers, shape], f"{table.name}_flat")
                attributes = {"gather_axis": 0, "quantize_axis": 1}
                attributes |= {"block_size": stored.block_size, "bits": stored.kernel_bits}
                inputs = [reshaped, node.inputs[1], scales, zeros]
                self._replace(node, "GatherBlockQuantized", inputs, attributes)
            for node in products:
                self._multiply(node, table)
        return done

    def products(self) -> list[str]:
        """Quantize matrices that are only multiplied with; return their names."""
        done: dict[str, None] = {}
        for node in list(ir.traversal.RecursiveGraphIterator(self._model.graph)):
            matrix = node.inputs[1] if node.op_type == "MatMul" and node.domain == "" else None
            if matrix is None or not _is_matrix(matrix):
                continue
            done[str(matrix.name)] = None
            if self._how.expand_on_load:
                self._expand(matrix, _array(matrix).T, turned=True)
                continue
            if str(matrix.name) not in self._operands:
                self._store(matrix, _array(matrix).T)
            self._multiply(node, matrix)
        return list(done)

    def finished(self, halve: bool) -> ir.Model:
        """Return the model without unused nodes and initializers."""
        graph = self._model.graph
        # Backwards, so that producers of removed nodes are removed too.
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
        """Store float tensors as float16 where that is exact; ONNX Runtime casts them when it loads the graph."""
        for name, value in list(self._model.graph.initializers.items()):
            if value.dtype != ir.DataType.FLOAT or value.const_value is None or value.const_value.size < _HALVED:
                continue
            # Values beyond float16 become infinite, which the comparison detects.
            with np.errstate(over="ignore"):
                half = _array(value).astype(np.float16)
            if (half.astype(np.float32) == _array(value)).all():
                cast = self._cast(self._constant(f"{name}_float16", half))
                ir.convenience.replace_all_uses_with(value, cast)
                del self._model.graph.initializers[name]

    def _store(self, value: ir.Value, weight: np.ndarray) -> None:
        """Store a quantized weight with its scales and zero points."""
        name = str(value.name)
        stored = self._how.of(weight, name)
        zeros = stored.packed_zero_points()
        integers = self._constant(f"{name}_Q{stored.bits}", stored.integers())
        scales = self._cast(self._constant(f"{name}_scales", stored.scales))
        zero_points = None if zeros is None else self._constant(f"{name}_zero_points", zeros)
        self._operands[name] = stored, [integers, scales, zero_points]

    def _expand(self, value: ir.Value, weight: np.ndarray, turned: bool) -> None:
        """Store integers that become float in place of ``value``.

        Args:
            value: The initializer to replace.
            weight: Its values as [rows, columns].
            turned: Whether ``value`` is the transposed matrix.
        """
        name, graph = str(value.name), self._model.graph
        self._model.opset_imports[""] = max(self._model.opset_imports.get("", 0), _CASTS_FOUR_BITS)
        stored = self._how.of(weight, name)
        blocks, kind = typed_integers(stored, name)
        # Integers are stored in the order in which the operand is read, so that no transpose is needed.
        order, of_block = ((1, 2, 0), (1, 0)) if turned else ((0, 1, 2), (0, 1))
        beside = 1 if turned else 2

        def each_block(values: np.ndarray) -> np.ndarray:
            return np.expand_dims(values.transpose(of_block), beside)

        names = (f"{name}_integers", f"{name}_scale", f"{name}_zero")
        stored_values = [self._constant(f"{name}_Q{stored.bits}", blocks.transpose(order), kind)]
        stored_values.append(self._constant(f"{name}_scales", each_block(stored.scales)))
        if stored.zero_points is not None:
            stored_values.append(self._constant(f"{name}_zero_points", each_block(stored.zero_points)))
        nodes = [
            ir.node("Cast", [source], {"to": ir.DataType.FLOAT}, name=output_name, outputs=[ir.val(output_name)])
            for output_name, source in zip(names, stored_values, strict=False)
        ]
        integers, scales, *zeros = (node.outputs[0] for node in nodes)
        # An asymmetric weight subtracts its zero points first.
        for zero in zeros:
            nodes.append(ir.node("Sub", [integers, zero], name=f"{name}_about", outputs=[ir.val(f"{name}_about")]))
            integers = nodes[-1].outputs[0]
        nodes.append(ir.node("Mul", [integers, scales], name=f"{name}_scaled", outputs=[ir.val(f"{name}_scaled")]))
        shape = self._constant(f"{name}_shape", np.array(value.const_value.shape, np.int64))
        last = ir.val(f"{name}_float32")
        nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], shape], name=f"{name}_whole", outputs=[last]))
        graph.insert_before(graph[0], nodes)
        ir.convenience.replace_all_uses_with(value, last)

    def _multiply(self, node: ir.Node, matrix: ir.Value) -> None:
        """Replace a product by `MatMulNBits`."""
        stored, operands = self._operands[str(matrix.name)]
        attributes = {"K": stored.columns, "N": stored.rows, "bits": stored.kernel_bits}
        attributes |= {"block_size": stored.block_size, "accuracy_level": self._how.accuracy_level}
        self._replace(node, "MatMulNBits", [node.inputs[0], *operands], attributes)

    def _replace(self, old: ir.Node, kind: str, inputs: Sequence[ir.Value | None], attributes: dict[str, int]) -> None:
        """Replace the node ``old`` by one of ONNX Runtime's operators."""
        new = ir.node(kind, without_absent_end(inputs), attributes, domain=MICROSOFT, name=old.name)
        graph = old.graph
        assert graph is not None, "the node stands in a graph"
        ir.convenience.replace_nodes_and_values(graph, old, [old], [new], old.outputs, new.outputs)

    def _constant(self, name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
        """Store an array under a name, once, and return its value."""
        graph = self._model.graph
        if name not in graph.initializers:
            tensor = ir.Tensor(np.ascontiguousarray(array), dtype=dtype, name=name)
            graph.register_initializer(ir.val(name, const_value=tensor))
        return graph.initializers[name]

    def _cast(self, half: ir.Value) -> ir.Value:
        """Cast a stored float16 tensor to float32."""
        return self._first("Cast", [half], f"{half.name}_float32", to=ir.DataType.FLOAT)

    def _first(self, kind: str, inputs: Sequence[ir.Value | None], name: str, **attributes: int) -> ir.Value:
        """Insert a node before all others, since branches may read it too."""
        node = ir.node(kind, inputs, attributes, name=name, outputs=[ir.val(name)])
        self._model.graph.insert_before(self._model.graph[0], node)
        return node.outputs[0]


def _is_matrix(value: ir.Value | None) -> bool:
    """Return whether a value is a stored float matrix that is large enough."""
    if value is None or not value.is_initializer() or value.const_value is None or value.dtype != ir.DataType.FLOAT:
        return False
    return len(value.const_value.shape) == 2 and value.const_value.size >= _SMALLEST


def _array(value: ir.Value) -> np.ndarray:
    """Return the array of an initializer."""
    array = constant(value)
    assert array is not None, "initializers have values"
    return array
