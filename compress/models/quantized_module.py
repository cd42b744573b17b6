"""torch modules that compute with a checkpoint's integers; scales can be trained, integers cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import linear
from torch.nn.utils import parametrize

from compress.models.checkpoint import Checkpoint
from compress.models.experts import separate_experts
from compress.models.meta_model import build_decoder_on_meta, build_on_meta
from compress.models.structure import TransposedLinear, linear_for_conv1d
from compress.numerics.fake_quantization import dequantize, stored_as
from compress.numerics.integer_grid import QuantizedWeight
from compress.utils.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ScaledIntegers(nn.Module):
    """Integers of a matrix [rows, columns] and its scales [rows, groups], trained as ``log_ratio``.

    A scale is its initial value times exp(log_ratio), rounded to the float16 that files store. All computation, also
    during training, therefore uses values that the file can represent.
    """

    integers: torch.Tensor
    start: torch.Tensor

    def __init__(self, quantized: QuantizedWeight) -> None:
        super().__init__()
        self.shape = quantized.integers.shape
        self.group_size = quantized.group_size
        # Integers minus their zero points [rows, columns], in 8 bits if they fit.
        columns = quantized.integers.shape[1]
        zeros = quantized.zero_points.to(torch.int16)[:, torch.arange(columns) // quantized.group_size]
        centred = quantized.integers.to(torch.int16) - zeros
        if int(centred.min()) >= -128 and int(centred.max()) <= 127:
            centred = centred.to(torch.int8)
        self.register_buffer("integers", centred, persistent=False)
        self.register_buffer("start", quantized.scales.float(), persistent=False)
        self.log_ratio = nn.Parameter(torch.zeros_like(quantized.scales, dtype=torch.float32))

    def scales(self) -> torch.Tensor:
        """Return the scales [rows, groups] as float32, rounded to values of float16."""
        return stored_as(self.start * self.log_ratio.exp(), torch.float16)

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the whole dequantized matrix."""
        return dequantize(self.integers, self.scales(), self.group_size, dtype)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Return some dequantized rows in float32, [*ids.shape, columns]."""
        # Dequantize each distinct row once.
        unique_ids, inverse = ids.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        scales = stored_as(self.start[unique_ids] * self.log_ratio[unique_ids].exp(), torch.float16)
        return dequantize(self.integers[unique_ids], scales, self.group_size, torch.float32)[inverse]


class QuantizedLinear(nn.Linear):
    """Linear layer ``x W^T + b`` over integers; ``weight`` is dequantized on access.

    It subclasses `nn.Linear`, so that peft can wrap it with adapters.
    """

    grid: ScaledIntegers | _FloatWeight

    def __init__(self, grid: ScaledIntegers, bias: nn.Parameter | None = None) -> None:
        # Skip `nn.Linear.__init__`, which would allocate a float weight.
        nn.Module.__init__(self)
        self.out_features, self.in_features = grid.shape
        self.grid = grid
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """Return the weight [out_features, in_features] in float32."""
        return self.grid.weight(torch.float32)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Compute the product in the autocast's dtype, or in the input's."""
        return linear(input, self.grid.weight(compute_dtype(input)), self.bias)


class QuantizedEmbedding(nn.Embedding):
    """Embedding over integers in float32, times the factor that the original class applies (Gemma's does)."""

    grid: ScaledIntegers | _FloatWeight

    def __init__(self, grid: ScaledIntegers, padding_idx: int | None, scale: float = 1.0) -> None:
        # Skip `nn.Embedding.__init__`, which would allocate a float table.
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = grid.shape
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self.embed_scale = scale
        self.grid = grid

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """Return the table [num_embeddings, embedding_dim] in float32."""
        return self.grid.weight(torch.float32)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the rows of the ids ``input``."""
        return self.grid.rows(input) * self.embed_scale


class StoredPrecision(nn.Module):
    """Parametrization of a vector of norm weights or biases, trained in steps relative to its mean magnitude.

    The result is rounded to the dtype in which the checkpoint stores it.
    """

    start: torch.Tensor

    def __init__(self, vector: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("start", vector.detach().clone(), persistent=False)
        # A vector of zeros is trained in steps of 1.
        self.size = float(vector.abs().mean()) or 1.0
        self.dtype = dtype

    def forward(self, change: torch.Tensor) -> torch.Tensor:
        """Return the vector for a relative ``change``."""
        return stored_as(self.start + self.size * change, self.dtype)

    def right_inverse(self, vector: torch.Tensor) -> torch.Tensor:
        """Return the relative change that yields ``vector``."""
        return (vector - self.start) / self.size


def compute_dtype(input: torch.Tensor) -> torch.dtype:
    """Return the dtype of a matrix product with ``input``: the autocast's if it is enabled."""
    device = input.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype


def load_quantized_module(checkpoint: Checkpoint) -> PreTrainedModel:
    """Load the causal model of ``checkpoint`` in float32, with integers where it is quantized, nothing trainable.

    Raises `ModelError` for an architecture that transformers does not have, a missing tensor, or quantized tensors that
    belong to no linear layer or embedding.
    """
    module = build_empty_module(checkpoint, build_on_meta)
    quantized = _put_integers(module, checkpoint)
    # Quantized tensors that no module reads would be lost silently.
    stray = {name for name in {*checkpoint.integer_layers, *checkpoint.tables} if name not in quantized}
    if stray:
        raise ModelError(
            f"{len(stray)} quantized tensors belong to no linear layer or embedding, such as {min(stray)!r}.",
            where=str(checkpoint.folder),
            expected=f"the modules of {type(module).__name__}",
        )
    # Load every float weight from the checkpoint's tensors; tied parameters stay tied.
    # Most buffers are computed; some checkpoints store them.
    for name, tensor in module.named_buffers():
        if name in checkpoint.files:
            tensor.copy_(_stored(checkpoint, name, tensor.shape))
    names_of: dict[torch.Tensor, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.is_meta:
            names_of.setdefault(parameter, []).append(name)
    for parameter, names in names_of.items():
        # A tied parameter is stored under one of its names.
        name = next((name for name in names if name in checkpoint.files), names[0])
        owner, _, leaf = name.rpartition(".")
        holder: Any = module.get_submodule(owner)
        is_transposed = leaf == "weight" and isinstance(holder, TransposedLinear)
        if name not in checkpoint.files and hasattr(holder, "create_weight"):  # positions that no file of Marian has
            stored = holder.create_weight()
        else:
            stored = _stored(checkpoint, name, parameter.shape[::-1] if is_transposed else parameter.shape)
        new_parameter = nn.Parameter(stored.T.contiguous() if is_transposed else stored)
        for alias in names:
            _replace(module, alias, new_parameter)
    return module.requires_grad_(False).eval()


def build_empty_module(checkpoint: Checkpoint, build: Callable[[Path], Any] = build_decoder_on_meta) -> PreTrainedModel:
    """Build the checkpoint's architecture with ``build``, with parameters on the meta device. Raises `ModelError`."""
    module: PreTrainedModel = build(checkpoint.folder)
    # Tie before modules are replaced, so that shared parameters stay shared.
    module.tie_weights()
    separate_experts(module, checkpoint)
    linear_for_conv1d(module)
    return module


class _FloatWeight(nn.Module):
    """Dequantized values of a `ScaledIntegers`, computed once instead of on each call."""

    def __init__(self, grid: ScaledIntegers) -> None:
        super().__init__()
        self.values = nn.Parameter(grid.weight(torch.float32), requires_grad=False)
        self.shape = grid.shape

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the whole matrix."""
        return self.values.to(dtype)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Return some rows, [*ids.shape, columns]."""
        return nn.functional.embedding(ids, self.values)


def dequantize_weights(module: PreTrainedModel) -> PreTrainedModel:
    """Replace the integers of a module from `load_quantized_module` by floats, in place; sharing is preserved."""
    float_weights: dict[ScaledIntegers, _FloatWeight] = {}
    for child in list(module.modules()):
        if isinstance(child, QuantizedLinear | QuantizedEmbedding) and isinstance(child.grid, ScaledIntegers):
            if child.grid not in float_weights:
                float_weights[child.grid] = _FloatWeight(child.grid)
            child.grid = float_weights[child.grid]
    return module


def named_scaled_integers(module: nn.Module) -> Iterator[tuple[str, ScaledIntegers]]:
    """Yield each integer matrix once, with the name of the module whose weight it is."""
    # `named_modules` yields a shared grid only once.
    for name, child in module.named_modules():
        if isinstance(child, ScaledIntegers):
            yield name.removesuffix(".grid"), child


def make_vectors_trainable(module: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Make every vector of weights or biases trainable, in place, and return their names."""
    names = [name for name, parameter in module.named_parameters() if parameter.ndim == 1]
    for name in names:
        owner, _, attribute = name.rpartition(".")
        target = module.get_submodule(owner)
        vector = getattr(target, attribute)
        parametrize.register_parametrization(target, attribute, StoredPrecision(vector, checkpoint.stored(name).dtype))
        target.parametrizations[attribute].original.requires_grad_(True)  # type: ignore[index, union-attr]
    return names


def _put_integers(module: PreTrainedModel, checkpoint: Checkpoint) -> set[str]:
    """Replace every quantized layer in place and return the names."""
    replaced: dict[str, ScaledIntegers] = {}
    tied = getattr(module.config, "tie_word_embeddings", False) and module.get_output_embeddings() is not None
    table = module.get_input_embeddings()
    for name, child in list(module.named_modules()):
        # Only these modules have quantized weights in either layout.
        if not isinstance(child, nn.Linear | nn.Embedding):
            continue
        quantized = checkpoint.quantized(name)
        if quantized is None:
            continue
        grid = replaced[name] = ScaledIntegers(quantized)
        if isinstance(child, nn.Embedding):
            # Gemma multiplies embeddings by a constant.
            scale = float(getattr(child, "embed_scale", 1.0))
            _replace(module, name, QuantizedEmbedding(grid, child.padding_idx, scale))
        else:
            _replace(module, name, QuantizedLinear(grid, child.bias))
        # A tied head shares the integers of the embedding.
        if child is table and tied:
            module.set_output_embeddings(QuantizedLinear(grid, module.get_output_embeddings().bias))
    return set(replaced)


def _replace(module: nn.Module, name: str, child: nn.Module | nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, child)


def _stored(checkpoint: Checkpoint, name: str, shape: torch.Size) -> torch.Tensor:
    """Return a stored tensor in float32 after a check of its shape."""
    stored = checkpoint.stored(name)
    if stored.shape != shape:
        raise ModelError(
            f"The tensor {name!r} is {list(stored.shape)}, but config.json expects {list(shape)}.",
            where=str(checkpoint.folder),
            expected="weights and config.json of the same model",
        )
    return stored.float().clone()
