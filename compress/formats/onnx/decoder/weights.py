"""A checkpoint's weights as operands: products with few-bit or float matrices, and lookups in tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from compress.formats.onnx.decoder.graph_builder import GraphBuilder
from compress.formats.onnx.decoder.stored_weight import (
    StoredWeight,
    expand_weight,
    multiply_expanded,
    stack,
    store,
    write_integers,
)
from compress.formats.onnx.graph_edits import MICROSOFT, without_absent_end
from compress.models.checkpoint import Checkpoint
from compress.models.lora_adapter import low_rank


@dataclass(frozen=True)
class GraphSettings:
    """Settings of a decoder's graph.

    ``accuracy_level`` of few-bit products: 4 rounds activations to 8 bits in each block, 1 computes in fp32.
    ``last_token_only``: logits [batch, 1, vocabulary] of the last position, enough to generate but not to score.
    ``expand_on_load``: few-bit weights become float when the graph is opened (`decoder.stored_weight`).
    ``planes``: integers of odd bits are stored without waste, else in the next width of the kernels.
    """

    accuracy_level: int = 4
    last_token_only: bool = False
    expand_on_load: bool = False
    planes: bool = True


class Weights:
    """Writer of nodes that read weights. A tied head and its embedding table read the same stored bytes."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        nodes: GraphBuilder,
        settings: GraphSettings,
        created_tables: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Start with no weight written.

        Args:
            checkpoint: The checkpoint.
            nodes: The graph.
            settings: Settings of the graph.
            created_tables: Tensors for names that the checkpoint lacks.
        """
        self._checkpoint, self._nodes, self._settings, self._made = checkpoint, nodes, settings, created_tables or {}
        self._operands: dict[str, tuple[ir.Value, ir.Value, ir.Value | None]] = {}
        self._whole: dict[str, ir.Value] = {}
        self._low_rank = low_rank(checkpoint)

    def vector(self, name: str) -> ir.Value:
        """Store a tensor as float32, such as a norm's scale, or a matrix that a model multiplies by itself (Falcon)."""
        # A class of its own may multiply by a weight directly; it is then dequantized.
        module = name.removesuffix(".weight")
        if module != name and not self._checkpoint.holds(name) and self._checkpoint.quantized(module) is not None:
            return self._nodes.constant(name, self._checkpoint.weight(module).numpy())
        created = None if name in self._checkpoint.files else self._made.get(name)
        tensor = self._checkpoint.stored(name) if created is None else created
        return self._nodes.constant(name, tensor.float().numpy())

    def project(
        self, scope: str, leaves: Sequence[str], value: ir.Value, transposed: bool = False
    ) -> Sequence[ir.Value]:
        """Write the products of ``value`` with the layers ``leaves`` of ``scope``.

        Args:
            scope: Name of the layers' parent module.
            leaves: Names of the layers in it.
            value: Left operand.
            transposed: Whether matrices are stored as [in, out], as GPT-2's are.

        Returns:
            One value if the layers form one matrix, otherwise one for each layer.
        """
        modules = [f"{scope}.{leaf}" if scope else leaf for leaf in leaves]
        stored = [weight for weight in map(self._stored, modules) if weight is not None]
        joined = f"{'_'.join(leaf.removesuffix('_proj') for leaf in leaves)}_proj"
        name = f"{scope}.{joined if len(leaves) > 1 else leaves[0]}"
        # Layers of one bit width and block size become one matrix; others are written one by one.
        if len(stored) == len(modules) and all(stored[0].can_stack(weight) for weight in stored):
            rows = [weight.rows for weight in stored]
            product = self._few_bits(name, stack(stored), value, self._bias(name, modules))
        elif stored:
            return [product for leaf in leaves for product in self.project(scope, [leaf], value, transposed)]
        else:
            matrices = [self._checkpoint.weight(module).numpy() for module in modules]
            matrices = [matrix.T for matrix in matrices] if transposed else matrices
            rows = [len(matrix) for matrix in matrices]
            matrix = self._nodes.constant(f"{name}.weight", np.concatenate(matrices).T)
            product, bias = self._nodes.op("MatMul", name, [value, matrix]), self._bias(name, modules)
            product = product if bias is None else self._nodes.op("Add", name, [product, bias])
        return [self._adapted(name, modules, rows, value, product)]

    def look_up(self, module: str, ids: ir.Value, tied: bool = False) -> ir.Value:
        """Write the rows ``ids`` of an embedding table [batch, length, hidden]; ``tied``: a head reads it too."""
        stored = self._stored(module)
        if stored is None:
            return self._nodes.op("Gather", module, [self.vector(f"{module}.weight"), ids])
        if self._settings.expand_on_load and tied:
            columns = self._nodes.op("Gather", module, [self._expanded_whole(module, stored), ids], axis=1)
            return self._nodes.op("Transpose", module, [columns], perm=[1, 2, 0])
        integers, scales, zeros = self._few_bit_operands(module, stored)
        width = stored.values.shape[1]
        flat = self._nodes.integers(stored.rows, width * stored.kernel_bits // 8)
        inputs = [self._nodes.op("Reshape", module, [integers, flat]), ids, scales, zeros]
        axes = {"gather_axis": 0, "quantize_axis": 1}
        blocks = {"block_size": stored.block_size, "bits": stored.kernel_bits}
        rows = self._nodes.op("GatherBlockQuantized", module, inputs, MICROSOFT, **axes, **blocks)
        # Padding of the last block is cut off.
        if width == stored.columns:
            return rows
        ends = [self._nodes.integers(end) for end in (0, stored.columns, 2)]
        return self._nodes.op("Slice", module, [rows, *ends])

    def head(self, module: str, value: ir.Value, bias: str) -> ir.Value:
        """Write the logits of ``value`` by the table of ``module``, which an embedding may share, plus any ``bias``."""
        stored = self._stored(module)
        if stored is None:
            table = self.vector(f"{module}.weight")
            # A float table is transposed in the graph; ONNX Runtime folds that when it loads the graph.
            turned, rows = self._nodes.op("Transpose", "lm_head", [table], perm=[1, 0]), int(table.shape[0])
            product = self._nodes.op("MatMul", "lm_head", [value, turned])
        else:
            rows = stored.rows
            if self._settings.expand_on_load:
                product = self._nodes.op("MatMul", "lm_head", [value, self._expanded_whole(module, stored)])
            else:
                product = self._few_bits(module, stored, value, scope="lm_head")
        product = self._adapted("lm_head", ["lm_head"], [rows], value, product)
        held = self._checkpoint.holds(bias)
        return self._nodes.op("Add", "lm_head", [product, self.vector(bias)]) if held else product

    def _adapted(
        self, name: str, modules: Sequence[str], rows: Sequence[int], value: ir.Value, product: ir.Value
    ) -> ir.Value:
        """Add the low-rank product b a ``value`` of the checkpoint's adapter, if it has one for any of the layers.

        Args:
            name: Name of the joined product.
            modules: The layers that the product joins.
            rows: Number of rows of each layer.
            value: Left operand.
            product: Product with the base weights.
        """
        nodes, factors = self._nodes, [self._low_rank.get(module) for module in modules]
        held = [factor for factor in factors if factor is not None]
        if not held:
            return product
        a = torch.cat([factor.a for factor in held]).numpy()
        along = zip(factors, rows, strict=True)
        # A layer without an adapter gets no columns of b.
        blocks = [torch.zeros(count, 0) if factor is None else factor.b for factor, count in along]
        b = torch.block_diag(*blocks).numpy()  # type: ignore[no-untyped-call]  # torch's own
        narrow = nodes.op("MatMul", f"{name}.lora_A", [value, nodes.constant(f"{name}.lora_A.weight", a.T)])
        wide = nodes.op("MatMul", f"{name}.lora_B", [narrow, nodes.constant(f"{name}.lora_B.weight", b.T)])
        return nodes.op("Add", f"{name}.lora", [product, wide])

    def _stored(self, module: str) -> StoredWeight | None:
        """Return a layer's quantized weight, or None if it is float."""
        quantized = self._checkpoint.quantized(module)
        return None if quantized is None else store(quantized, module)

    def _bias(self, name: str, modules: Sequence[str]) -> ir.Value | None:
        """Store the joined biases of layers, or return None if none has a bias."""
        if not any(self._checkpoint.holds(f"{module}.bias") for module in modules):
            return None
        parts = [self._checkpoint.stored(f"{module}.bias").float().numpy() for module in modules]
        return self._nodes.constant(f"{name}.bias", np.concatenate(parts))

    def _few_bits(
        self,
        name: str,
        stored: StoredWeight,
        value: ir.Value,
        bias: ir.Value | None = None,
        scope: str | None = None,
    ) -> ir.Value:
        """Write a product with a few-bit weight.

        Args:
            name: Name of the product.
            stored: The weight.
            value: Left operand.
            bias: Bias of the layer.
            scope: Name of the node if it is not the product's.
        """
        if self._settings.expand_on_load:
            product = multiply_expanded(self._nodes, name, value, stored)
            return product if bias is None else self._nodes.op("Add", name, [product, bias])
        inputs = without_absent_end([value, *self._few_bit_operands(name, stored), None, bias])
        sizes = {"K": stored.columns, "N": stored.rows, "bits": stored.kernel_bits, "block_size": stored.block_size}
        level = self._settings.accuracy_level
        return self._nodes.op("MatMulNBits", scope or name, inputs, MICROSOFT, **sizes, accuracy_level=level)

    def _expanded_whole(self, module: str, stored: StoredWeight) -> ir.Value:
        """Return a table as a matrix [hidden, rows] that is float once the graph is open."""
        if module not in self._whole:
            self._whole[module] = expand_weight(self._nodes, module, stored)
        return self._whole[module]

    def _few_bit_operands(self, name: str, stored: StoredWeight) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        """Return integers, float32 scales and zero points.

        Scales are stored in 16 bits and cast when the graph is loaded.
        """
        if name not in self._operands:
            halves = self._nodes.constant(f"{name}.weight_scales", stored.scales)
            zeros = stored.packed_zero_points()
            self._operands[name] = (
                write_integers(self._nodes, name, stored, self._settings.planes),
                self._nodes.op("Cast", name, [halves], to=ir.DataType.FLOAT),
                None if zeros is None else self._nodes.constant(f"{name}.weight_zero_points", zeros),
            )
        return self._operands[name]
