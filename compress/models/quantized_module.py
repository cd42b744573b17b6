"""A quantized checkpoint as a torch module that computes with its integers; scales may learn, integers never."""

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
from compress.models.meta_model import hollow_decoder, hollow_model
from compress.models.transposed_linear import TransposedLinear, linear_for_conv1d
from compress.numerics.fake_quantization import dequantize, stored_as
from compress.numerics.integer_grid import QuantizedWeight
from compress.utils.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Grid(nn.Module):
    """Integers of a matrix [rows, columns] and its scales [rows, groups], learned as ``log_ratio``.

    A scale is its starting value times exp(log_ratio), rounded to the float16 that files store: whatever is computed,
    while training too, is computed with numbers that the file can hold.
    """

    integers: torch.Tensor
    start: torch.Tensor

    def __init__(self, quantized: QuantizedWeight) -> None:
        super().__init__()
        self.shape = quantized.integers.shape
        self.group_size = quantized.group_size
        self.register_buffer("integers", _without_zero_points(quantized), persistent=False)
        self.register_buffer("start", quantized.scales.float(), persistent=False)
        self.log_ratio = nn.Parameter(torch.zeros_like(quantized.scales, dtype=torch.float32))

    def scales(self) -> torch.Tensor:
        """[rows, groups] float32, each a value that float16 has."""
        return stored_as(self.start * self.log_ratio.exp(), torch.float16)

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole matrix."""
        return dequantize(self.integers, self.scales(), self.group_size, dtype)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Some rows in float32, [*ids.shape, columns]."""
        wanted, flat = ids.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        scales = stored_as(self.start[wanted] * self.log_ratio[wanted].exp(), torch.float16)
        return dequantize(self.integers[wanted], scales, self.group_size, torch.float32)[flat]


class QuantizedLinear(nn.Linear):
    """``x W^T + b``. A `nn.Linear`, so that peft puts its adapters around it; ``weight`` is made when asked for."""

    grid: Grid | _FloatWeight

    def __init__(self, grid: Grid, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = grid.shape
        self.grid = grid
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """[out_features, in_features] float32."""
        return self.grid.weight(torch.float32)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The product in the autocast's dtype, or in the input's."""
        return linear(input, self.grid.weight(computed_in(input)), self.bias)


class QuantizedEmbedding(nn.Embedding):
    """Rows of a table of integers, in float32, times what the table's own class multiplies them by (Gemma's does)."""

    grid: Grid | _FloatWeight

    def __init__(self, grid: Grid, padding_idx: int | None, scale: float = 1.0) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = grid.shape
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self.embed_scale = scale
        self.grid = grid

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """[num_embeddings, embedding_dim] float32."""
        return self.grid.weight(torch.float32)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The rows of the ids ``input``."""
        return self.grid.rows(input) * self.embed_scale


class AsStored(nn.Module):
    """A parametrization: a vector of norm weights or biases, learned in steps relative to its mean magnitude.

    What comes out is rounded to the dtype that the checkpoint stores it in.
    """

    start: torch.Tensor

    def __init__(self, vector: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("start", vector.detach().clone(), persistent=False)
        self.size = float(vector.abs().mean()) or 1.0
        self.dtype = dtype

    def forward(self, change: torch.Tensor) -> torch.Tensor:
        """The vector for a relative ``change``."""
        return stored_as(self.start + self.size * change, self.dtype)

    def right_inverse(self, vector: torch.Tensor) -> torch.Tensor:
        """The relative change that gives ``vector``."""
        return (vector - self.start) / self.size


def computed_in(input: torch.Tensor) -> torch.dtype:
    """The dtype in which a matrix product with ``input`` is taken: the autocast's, where there is one."""
    device = input.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype


def load_module(checkpoint: Checkpoint) -> PreTrainedModel:
    """The causal model of ``checkpoint`` in float32, with integers where it is quantized, and nothing trainable.

    Raises `ModelError` for an architecture that transformers does not know, a tensor that is missing, and quantized
    tensors that belong to no linear layer or embedding.
    """
    module = empty_module(checkpoint, hollow_model)
    quantized = _put_integers(module, checkpoint)
    stray = {name for name in _quantized_names(checkpoint) if name not in quantized}
    if stray:
        raise ModelError(
            f"{len(stray)} quantized tensors belong to no linear layer or embedding, such as {min(stray)!r}.",
            where=str(checkpoint.folder),
            expected=f"the modules of {type(module).__name__}",
        )
    _fill(module, checkpoint)
    return module.requires_grad_(False).eval()


def empty_module(checkpoint: Checkpoint, build: Callable[[Path], Any] = hollow_decoder) -> PreTrainedModel:
    """The checkpoint's architecture, its parameters on the meta device, as ``build`` gives it. Raises `ModelError`."""
    module: PreTrainedModel = build(checkpoint.folder)
    module.tie_weights()
    separate_experts(module, checkpoint)
    linear_for_conv1d(module)
    return module


class _FloatWeight(nn.Module):
    """What a `Grid` holds, as floats: made once, where a grid makes them at each call."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.values = nn.Parameter(grid.weight(torch.float32), requires_grad=False)
        self.shape = grid.shape

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole matrix."""
        return self.values.to(dtype)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Some rows, [*ids.shape, columns]."""
        return nn.functional.embedding(ids, self.values)


def with_float_weights(module: PreTrainedModel) -> PreTrainedModel:
    """``module`` as `load_module` gives it, its integers made float in place; what shared them shares the floats."""
    made: dict[Grid, _FloatWeight] = {}
    for child in list(module.modules()):
        if isinstance(child, QuantizedLinear | QuantizedEmbedding) and isinstance(child.grid, Grid):
            if child.grid not in made:
                made[child.grid] = _FloatWeight(child.grid)
            child.grid = made[child.grid]
    return module


def grids(module: nn.Module) -> Iterator[tuple[str, Grid]]:
    """Each grid once, with the name of the module that it is the weight of."""
    for name, child in module.named_modules():
        if isinstance(child, Grid):
            yield name.removesuffix(".grid"), child


def learn_vectors(module: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Let every vector of weights or biases learn, in place; returns their names."""
    names = [name for name, parameter in module.named_parameters() if parameter.ndim == 1]
    for name in names:
        owner, _, attribute = name.rpartition(".")
        target = module.get_submodule(owner)
        vector = getattr(target, attribute)
        parametrize.register_parametrization(target, attribute, AsStored(vector, checkpoint.stored(name).dtype))
        target.parametrizations[attribute].original.requires_grad_(True)  # type: ignore[index, union-attr]
    return names


def _without_zero_points(quantized: QuantizedWeight) -> torch.Tensor:
    """Integers less their zero points [rows, columns], in 8 bits where they fit."""
    columns = quantized.integers.shape[1]
    zeros = quantized.zero_points.to(torch.int16)[:, torch.arange(columns) // quantized.group_size]
    centred = quantized.integers.to(torch.int16) - zeros
    return centred.to(torch.int8) if int(centred.min()) >= -128 and int(centred.max()) <= 127 else centred


def _put_integers(module: PreTrainedModel, checkpoint: Checkpoint) -> set[str]:
    """Replace every quantized layer in place; returns their names."""
    replaced: dict[str, Grid] = {}
    tied = getattr(module.config, "tie_word_embeddings", False) and module.get_output_embeddings() is not None
    table = module.get_input_embeddings()
    for name, child in list(module.named_modules()):
        if not isinstance(child, nn.Linear | nn.Embedding):
            continue
        quantized = checkpoint.quantized(name)
        if quantized is None:
            continue
        grid = replaced[name] = Grid(quantized)
        if isinstance(child, nn.Embedding):
            scale = float(getattr(child, "embed_scale", 1.0))
            _replace(module, name, QuantizedEmbedding(grid, child.padding_idx, scale))
        else:
            _replace(module, name, QuantizedLinear(grid, child.bias))
        if child is table and tied:
            module.set_output_embeddings(QuantizedLinear(grid, module.get_output_embeddings().bias))
    return set(replaced)


def _replace(module: nn.Module, name: str, child: nn.Module | nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, child)


def _quantized_names(checkpoint: Checkpoint) -> set[str]:
    return {*checkpoint.integer_layers, *checkpoint.tables}


def _fill(module: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Every weight that is no integer, from the checkpoint's tensors; tied ones stay one."""
    for name, tensor in module.named_buffers():
        if name in checkpoint.files:
            tensor.copy_(_stored(checkpoint, name, tensor.shape))
    places: dict[torch.Tensor, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.is_meta:
            places.setdefault(parameter, []).append(name)
    for parameter, names in places.items():
        name = next((name for name in names if name in checkpoint.files), names[0])
        owner, _, leaf = name.rpartition(".")
        holder: Any = module.get_submodule(owner)
        turned = leaf == "weight" and isinstance(holder, TransposedLinear)
        if name not in checkpoint.files and hasattr(holder, "create_weight"):  # positions that no file of Marian has
            stored = holder.create_weight()
        else:
            stored = _stored(checkpoint, name, parameter.shape[::-1] if turned else parameter.shape)
        filled = nn.Parameter(stored.T.contiguous() if turned else stored)
        for place in names:
            _replace(module, place, filled)


def _stored(checkpoint: Checkpoint, name: str, shape: torch.Size) -> torch.Tensor:
    stored = checkpoint.stored(name)
    if stored.shape != shape:
        raise ModelError(
            f"The tensor {name!r} is {list(stored.shape)}, and config.json makes it {list(shape)}.",
            where=str(checkpoint.folder),
            expected="weights and config.json of the same model",
        )
    return stored.float().clone()
