"""The tensors in which compressed-tensors keeps a quantized linear layer, for vLLM, SGLang and transformers.

For each layer NAME `NAME.weight_scale` float16 [out_features, groups], and its integers less 2**(bits - 1): as 8-bit
`NAME.weight` [out_features, in_features] where inputs are rounded too (`int-quantized`); else packed along a row into
`NAME.weight_packed` int32 [out_features, in_features * bits / 32], with `NAME.weight_shape` int64 [2]
(`pack-quantized`). Packed words are those of `gptq_layout`, turned: what they hold is counted from 0 there as here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from compress.models.gptq_layout import pack_bits, unpack_bits
from compress.numerics.integer_grid import QuantizedWeight

PARTS = ("weight", "weight_packed", "weight_scale")


def pack_layer(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """Return the stored tensors of a layer [out_features, in_features] without zero points, by part.

    Both sizes must be multiples of 32.
    """
    return {
        "weight_packed": pack_bits(weight.integers.T, weight.bits).T.contiguous(),
        "weight_scale": weight.scales.half(),
        "weight_shape": torch.tensor(weight.integers.shape),
    }


def store_int8_layer(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """Return the stored tensors of an 8-bit layer without zero points whose inputs are quantized too."""
    return {"weight": (weight.integers.to(torch.int16) - 128).to(torch.int8), "weight_scale": weight.scales.half()}


def unpack_layer(tensors: Mapping[str, torch.Tensor], bits: int, group_size: int) -> QuantizedWeight:
    """Return the integers and scales that `pack_layer` or `store_int8_layer` stored.

    Args:
        tensors: Stored tensors by part.
        bits: Bits of an integer.
        group_size: Columns that share a scale; -1 for all.
    """
    scales, middle = tensors["weight_scale"].float(), 1 << (bits - 1)
    if "weight_packed" in tensors:
        integers = unpack_bits(tensors["weight_packed"].T, bits).T.contiguous()
    else:
        integers = (tensors["weight"].to(torch.int16) + middle).to(torch.uint8)
    zeros = torch.full_like(scales, middle).to(torch.uint8)
    return QuantizedWeight(integers, scales, zeros, bits, integers.shape[1] if group_size == -1 else group_size)
