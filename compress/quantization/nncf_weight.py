"""Reading what NNCF left in a torch module: the integers and scales of each weight, and what else it changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress.checkpoints.checkpoint import Checkpoint
from compress.errors import StageError
from compress.numerics.quantized_weight import QuantizedWeight


@dataclass(frozen=True)
class Compressed:
    """``weights`` by module, ``changed`` float tensors by name: AWQ folds its factors into the layer before."""

    weights: Mapping[str, QuantizedWeight]
    changed: Mapping[str, torch.Tensor]


def read_compressed(module: nn.Module, source: Checkpoint) -> Compressed:
    """What ``module``, compressed in place, has in place of ``source``'s tensors.

    Raises `StageError` for what no checkpoint can hold: a factor that is applied to activations at run time, and
    weights that are no matrix.
    """
    from nncf.torch.function_hook.hook_storage import decode_hook_name
    from nncf.torch.function_hook.wrapper import get_hook_storage

    # A tied weight has one parameter and two names; the first is the embedding's.
    names = {parameter: name for name, parameter in module.named_parameters()}
    weights: dict[str, QuantizedWeight] = {}
    for hook_name, hook in get_hook_storage(module).named_hooks():
        kind, operation, _ = decode_hook_name(hook_name)
        if kind == "pre_hooks":
            raise StageError(
                f"NNCF's AWQ scales the inputs of {operation} at run time, which a checkpoint has no place for.",
                expected="an architecture whose feed-forward part multiplies by a gate, as Llama's and Qwen's do",
                mend="set awq: false",
            )
        name = names[module.get_parameter(operation)]
        weights[name.removesuffix(".weight")] = unpacked(hook, module.get_parameter(name), name)
    return Compressed(weights, dict(_changed(module, source)))


def unpacked(decompressor: Any, packed: torch.Tensor, name: str) -> QuantizedWeight:
    """The integers of one of NNCF's weights [rows, columns]; ``decompressor`` is the hook that expands them.

    Scales are NNCF's own float16, which may be negative: four bits reach from -8 to 7, and the end that reaches farther
    is given to the side that needs it.
    """
    from nncf.torch.quantization import layers
    from nncf.torch.quantization.quantize_functions import unpack_int4, unpack_uint4

    shape = getattr(decompressor, "result_shape", None) or packed.shape
    if len(shape) != 2:
        raise StageError(
            f"NNCF quantized {name} {list(shape)}, which is no matrix, so that the GPTQ format has no place for it.",
            mend="quantize this model with the stage gptq",
        )
    rows, columns = shape
    scales = decompressor._scale.float().reshape(rows, -1)
    zeros: torch.Tensor | int
    if isinstance(decompressor, layers.INT4SymmetricWeightsDecompressor):
        bits, zeros, integers = 4, 8, unpack_int4(packed) + 8
    elif isinstance(decompressor, layers.INT4AsymmetricWeightsDecompressor):
        bits, zeros, integers = 4, unpack_uint4(decompressor._zero_point), unpack_uint4(packed)
    elif isinstance(decompressor, layers.INT8SymmetricWeightsDecompressor):
        bits, zeros, integers = 8, 128, packed.to(torch.int16) + 128
    elif isinstance(decompressor, layers.INT8AsymmetricWeightsDecompressor):
        bits, zeros, integers = 8, decompressor._zero_point, packed
    else:
        raise StageError(f"NNCF left a {type(decompressor).__name__} at {name}.", expected="4 or 8-bit integers")
    return QuantizedWeight(
        integers=integers.reshape(rows, columns).to(torch.uint8),
        scales=scales,
        zero_points=_zero_points(zeros, scales),
        bits=bits,
        group_size=columns // scales.shape[1],
    )


def _zero_points(zeros: torch.Tensor | int, scales: torch.Tensor) -> torch.Tensor:
    if isinstance(zeros, int):
        return torch.full(scales.shape, zeros, dtype=torch.uint8)
    return zeros.reshape(scales.shape).to(torch.uint8)


def _changed(module: nn.Module, source: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in module.named_parameters():
        floats = parameter.is_floating_point() and name in source.files
        if floats and not torch.equal(parameter.data, source.stored(name).float()):
            yield name, parameter.data
