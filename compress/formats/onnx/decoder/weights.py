"""A checkpoint's weights as operands of a graph: products with few-bit or float matrices, and look-ups in tables."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch

from compress.checkpoints.adapter import LowRank, low_rank
from compress.checkpoints.checkpoint import Checkpoint
from compress.formats.onnx.decoder.bit_planes import join, lift, pair, split
from compress.formats.onnx.decoder.expanded import expand, multiply, whole
from compress.formats.onnx.decoder.nodes import MICROSOFT, Nodes
from compress.formats.onnx.decoder.stored_weight import INTEGERS, StoredWeight, stack, store

_NIBBLE = 4


class Weights:
    """Writes what reads a weight. A tied head and its embedding table read the same stored bytes."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        nodes: Nodes,
        accuracy_level: int,
        exact: Collection[str] = (),
        expand_on_load: bool = False,
        made: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """``exact`` names layers whose few-bit products are in fp32 whatever ``accuracy_level`` is.

        ``expand_on_load``: all are, by weights that become float when the graph is opened. ``made``: tensors that
        stand for those that the checkpoint hasn't got.
        """
        self._checkpoint = checkpoint
        self._nodes = nodes
        self._accuracy_level = accuracy_level
        self._exact = frozenset(exact)
        self._expand_on_load = expand_on_load
        self._made = made or {}
        self._operands: dict[str, tuple[ir.Value, ir.Value, ir.Value | None]] = {}
        self._whole: dict[str, ir.Value] = {}
        self._low_rank = low_rank(checkpoint)

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds that tensor."""
        return self._checkpoint.holds(name)

    def vector(self, name: str) -> ir.Value:
        """A tensor in float32, such as a norm's scale, or a matrix that a class of its own multiplies by (Falcon's)."""
        module = name.removesuffix(".weight")
        if module != name and not self.has(name) and self._checkpoint.quantized(module) is not None:
            return self._nodes.constant(name, self._checkpoint.weight(module).numpy())
        made = None if name in self._checkpoint.files else self._made.get(name)
        tensor = self._checkpoint.stored(name) if made is None else made
        return self._nodes.constant(name, tensor.float().numpy())

    def project(
        self, scope: str, leaves: Sequence[str], value: ir.Value, transposed: bool = False
    ) -> Sequence[ir.Value]:
        """The products of ``value`` with the layers ``leaves`` of ``scope``: one value where they make one matrix.

        Otherwise one value for each layer. ``transposed``: matrices are stored [in, out], as GPT-2's are.
        """
        modules = [f"{scope}.{leaf}" if scope else leaf for leaf in leaves]
        stored = [weight for weight in map(self._stored, modules) if weight is not None]
        joined = f"{'_'.join(leaf.removesuffix('_proj') for leaf in leaves)}_proj"
        name = f"{scope}.{joined if len(leaves) > 1 else leaves[0]}"
        if len(stored) == len(modules) and all(stored[0].joins(weight) for weight in stored):
            level = 1 if self._exact.issuperset(leaves) else self._accuracy_level
            product = self._few_bits(name, stack(stored), value, level, self._bias(name, modules))
            return [self._adapted(name, modules, [weight.rows for weight in stored], value, product)]
        if not stored:
            matrices = [self._checkpoint.weight(module).numpy() for module in modules]
            matrices = [matrix.T for matrix in matrices] if transposed else matrices
            matrix = self._nodes.constant(f"{name}.weight", np.concatenate(matrices).T)
            product, bias = self._nodes.op("MatMul", name, [value, matrix]), self._bias(name, modules)
            product = product if bias is None else self._nodes.op("Add", name, [product, bias])
            return [self._adapted(name, modules, [len(part) for part in matrices], value, product)]
        return [product for leaf in leaves for product in self.project(scope, [leaf], value, transposed)]

    def look_up(self, module: str, ids: ir.Value, tied: bool = False) -> ir.Value:
        """The rows ``ids`` of an embedding table, [batch, length, hidden]; ``tied``: a head reads it too."""
        stored = self._stored(module)
        if stored is None:
            return self._nodes.op("Gather", module, [self._table(module), ids])
        if self._expand_on_load and tied:
            columns = self._nodes.op("Gather", module, [self._expanded_whole(module, stored), ids], axis=1)
            return self._nodes.op("Transpose", module, [columns], perm=[1, 2, 0])
        integers, scales, zeros = self._few_bit_operands(module, stored)
        width = stored.values.shape[1]
        flat = self._nodes.integers(stored.rows, width * stored.kernel_bits // 8)
        rows = self._nodes.op(
            "GatherBlockQuantized",
            module,
            [self._nodes.op("Reshape", module, [integers, flat]), ids, scales, zeros],
            MICROSOFT,
            gather_axis=0,
            quantize_axis=1,
            block_size=stored.block_size,
            bits=stored.kernel_bits,
        )
        if width == stored.columns:
            return rows
        ends = [self._nodes.integers(end) for end in (0, stored.columns, 2)]
        return self._nodes.op("Slice", module, [rows, *ends])

    def head(self, module: str, value: ir.Value, bias: str) -> ir.Value:
        """The logits of ``value`` by the table of ``module``, which an embedding may read too, plus any ``bias``."""
        stored = self._stored(module)
        if stored is None:
            table = self._table(module)
            product = self._nodes.op(
                "MatMul", "lm_head", [value, self._nodes.op("Transpose", "lm_head", [table], perm=[1, 0])]
            )
            rows = int(table.shape[0])
        elif self._expand_on_load:
            product = self._nodes.op("MatMul", "lm_head", [value, self._expanded_whole(module, stored)])
            rows = stored.rows
        else:
            product = self._few_bits(module, stored, value, self._accuracy_level, None, "lm_head")
            rows = stored.rows
        product = self._adapted("lm_head", ["lm_head"], [rows], value, product)
        return self._nodes.op("Add", "lm_head", [product, self.vector(bias)]) if self.has(bias) else product

    def _adapted(
        self, name: str, modules: Sequence[str], outputs: Sequence[int], value: ir.Value, product: ir.Value
    ) -> ir.Value:
        """The product with what the checkpoint's adapter, if it has one, adds to it."""
        factors = [self._low_rank.get(module) for module in modules]
        return add_low_rank(self._nodes, name, value, product, list(zip(factors, outputs, strict=True)))

    def _stored(self, module: str) -> StoredWeight | None:
        quantized = self._checkpoint.quantized(module)
        return None if quantized is None else store(quantized, module)

    def _table(self, module: str) -> ir.Value:
        return self.vector(f"{module}.weight")

    def _bias(self, name: str, modules: Sequence[str]) -> ir.Value | None:
        if not any(self.has(f"{module}.bias") for module in modules):
            return None
        parts = [self._checkpoint.stored(f"{module}.bias").float().numpy() for module in modules]
        return self._nodes.constant(f"{name}.bias", np.concatenate(parts))

    def _few_bits(
        self,
        name: str,
        stored: StoredWeight,
        value: ir.Value,
        level: int,
        bias: ir.Value | None,
        scope: str | None = None,
    ) -> ir.Value:
        if self._expand_on_load:
            product = multiply(self._nodes, name, value, expand(self._nodes, name, stored))
            return product if bias is None else self._nodes.op("Add", name, [product, bias])
        integers, scales, zeros = self._few_bit_operands(name, stored)
        inputs = [value, integers, scales, zeros, None, bias]
        while inputs[-1] is None:
            inputs.pop()
        return self._nodes.op(
            "MatMulNBits",
            scope or name,
            inputs,
            MICROSOFT,
            K=stored.columns,
            N=stored.rows,
            bits=stored.kernel_bits,
            block_size=stored.block_size,
            accuracy_level=level,
        )

    def _expanded_whole(self, module: str, stored: StoredWeight) -> ir.Value:
        """A table as a matrix [hidden, rows] that is float once the graph is open."""
        if module not in self._whole:
            self._whole[module] = whole(self._nodes, module, expand(self._nodes, module, stored))
        return self._whole[module]

    def _few_bit_operands(self, name: str, stored: StoredWeight) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        """Integers, scales in float32 and zero points. On disk scales take 16 bits; the cast is done at loading."""
        if name not in self._operands:
            halves = self._nodes.constant(f"{name}.weight_scales", stored.scales)
            zeros = stored.packed_zero_points()
            self._operands[name] = (
                self._integers(name, stored),
                self._nodes.op("Cast", name, [halves], to=ir.DataType.FLOAT),
                None if zeros is None else self._nodes.constant(f"{name}.weight_zero_points", zeros),
            )
        return self._operands[name]

    def _integers(self, name: str, stored: StoredWeight) -> ir.Value:
        """As the kernels take them, or, for bits that the kernels lack, the planes and what makes them whole."""
        nodes, bits = self._nodes, stored.bits
        if bits == stored.kernel_bits:
            return nodes.constant(f"{name}{INTEGERS}{bits}", stored.integers())
        values = stored.values
        if stored.kernel_bits == _NIBBLE:
            values = np.concatenate([values[:, 0::2], values[:, 1::2]], axis=1)
        planes = [
            nodes.constant(f"{name}{INTEGERS}{bits}_plane{index}", plane)
            for index, plane in enumerate(split(values, bits))
        ]
        whole = lift(nodes, name, join(nodes, name, planes, bits, values.shape), stored.lift)
        if stored.kernel_bits == _NIBBLE:
            whole = pair(nodes, name, whole)
        return nodes.op("Reshape", f"{name}.blocks", [whole, nodes.integers(*stored.shape)])


def add_low_rank(
    nodes: Nodes,
    name: str,
    value: ir.Value,
    product: ir.Value,
    parts: Sequence[tuple[LowRank | None, int]],
) -> ir.Value:
    """``product`` of ``value`` plus b a ``value``.

    ``parts`` are the layers that the product joins, with the outputs of each; a layer may have no factors.
    """
    if all(factors is None for factors, _ in parts):
        return product
    a = np.concatenate([factors.a.numpy() for factors, _ in parts if factors is not None])
    b = np.zeros((sum(outputs for _, outputs in parts), len(a)), np.float32)
    row = column = 0
    for factors, outputs in parts:
        if factors is not None:
            rank = len(factors.a)
            b[row : row + outputs, column : column + rank] = factors.b.numpy()
            column += rank
        row += outputs
    narrow = nodes.op("MatMul", f"{name}.lora_A", [value, nodes.constant(f"{name}.lora_A.weight", a.T)])
    wide = nodes.op("MatMul", f"{name}.lora_B", [narrow, nodes.constant(f"{name}.lora_B.weight", b.T)])
    return nodes.op("Add", f"{name}.lora", [product, wide])
