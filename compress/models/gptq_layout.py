"""Tensor layout of a quantized linear layer in AutoGPTQ, gptqmodel and transformers.

For each layer NAME: `NAME.qweight` int32 [in_features * bits / 32, out_features], the integers of a column as one
stream of bits, least significant first; `NAME.qzeros` int32 [groups, out_features * bits / 32], packed alike along
a row; `NAME.scales` float16 [groups, out_features]; `NAME.g_idx` int32 [in_features], the group of each input.

``checkpoint_format: gptq`` stores zero points minus one (a zero point of 0 cannot be stored); ``gptq_v2`` stores
them unchanged.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch

from compress.numerics.integer_grid import QuantizedWeight
from compress.utils.errors import ModelError

BITS = (2, 3, 4, 8)
"""Widths that readers of the format support; at three bits, values cross the borders of words."""
PARTS = ("qweight", "qzeros", "scales", "g_idx")
_WORD = 32


def fits(out_features: int, in_features: int) -> bool:
    """Return True if both sizes fill whole 32-bit words, as the format requires."""
    return out_features % _WORD == 0 and in_features % _WORD == 0


def pack_layer(
    weight: QuantizedWeight, stored_less_one: bool, known_bits: Container[int] = BITS
) -> dict[str, torch.Tensor]:
    """Return the four stored tensors of a layer by part.

    Args:
        weight: Integers [out_features, in_features] with scales and zero points.
        stored_less_one: Store zero points minus one (`checkpoint_format: gptq`).
        known_bits: Bits that the reader supports; tables, which the format does not have, allow others.

    Raises:
        ModelError: If sizes, bits or zero points do not fit the format.
    """
    rows, columns = weight.integers.shape
    if weight.bits not in known_bits or not fits(rows, columns):
        raise ModelError(
            f"A layer of {rows} x {columns} at {weight.bits} bits does not fit the GPTQ format.",
            expected=f"bits of {', '.join(map(str, BITS))}, both sides multiples of {_WORD}",
        )
    # The first version of the format stores zero points minus one.
    zeros = weight.zero_points.to(torch.int64) - int(stored_less_one)
    if int(zeros.min()) < 0:
        raise ModelError("A zero point of 0 cannot be stored minus one.", expected="checkpoint_format gptq_v2")
    return {
        "qweight": pack_bits(weight.integers.T, weight.bits),
        "qzeros": pack_bits(zeros, weight.bits).T.contiguous(),
        "scales": weight.scales.T.to(torch.float16).contiguous(),
        "g_idx": (torch.arange(columns) // weight.group_size).to(torch.int32),
    }


def unpack_layer(
    tensors: Mapping[str, torch.Tensor], bits: int, group_size: int, stored_less_one: bool
) -> QuantizedWeight:
    """Return the integers, scales and zero points that `pack_layer` packed.

    Args:
        tensors: Stored tensors by part.
        bits: Bits of an integer.
        group_size: Columns that share a scale; -1 for all.
        stored_less_one: Zero points are stored minus one.

    Raises:
        ModelError: If groups are not consecutive columns (`desc_act`).
    """
    columns = tensors["qweight"].shape[0] * _WORD // bits
    size = columns if group_size == -1 else group_size
    # Permuted groups would need a gather per layer at inference.
    if not torch.equal(tensors["g_idx"].to(torch.int64), torch.arange(columns) // size):
        raise ModelError("The layer's groups are permuted (desc_act).", expected="groups of neighbouring columns")
    zeros = unpack_bits(tensors["qzeros"].T, bits).to(torch.int16) + int(stored_less_one)
    return QuantizedWeight(
        integers=unpack_bits(tensors["qweight"], bits).T.contiguous(),
        scales=tensors["scales"].T.float().contiguous(),
        zero_points=zeros.to(torch.uint8).contiguous(),
        bits=bits,
        group_size=size,
    )


def pack_bits(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack integers below 2**bits [n, m] into int32 [n * bits / 32, m]: a bit stream down each column.

    The number of rows ``n`` must be a multiple of 32.
    """
    chunks = values.to(torch.uint8).reshape(-1, _WORD, values.shape[1])
    words = torch.zeros(len(chunks), bits, values.shape[1], dtype=torch.int32)
    for index in range(_WORD):
        word, shift = divmod(index * bits, _WORD)
        value = chunks[:, index].to(torch.int32)
        # Bits beyond the last are dropped, and the last is the sign: words are as if unsigned.
        # Shifting within int32 drops the bits that belong to the next word.
        words[:, word] |= value << shift
        # The high bits of a value that crosses a word's border go into the next word.
        if shift + bits > _WORD:
            words[:, word + 1] |= value >> (_WORD - shift)
    return words.flatten(0, 1)


def unpack_bits(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the uint8 values [n, m] that `pack_bits` packed into words [n * bits / 32, m]."""
    # Mask the sign extension of int32.
    chunks = (words.to(torch.int64) & 0xFFFFFFFF).reshape(-1, bits, words.shape[1])
    values = torch.empty(len(chunks), _WORD, words.shape[1], dtype=torch.uint8)
    for index in range(_WORD):
        word, shift = divmod(index * bits, _WORD)
        value = chunks[:, word] >> shift
        if shift + bits > _WORD:
            value = value | chunks[:, word + 1] << (_WORD - shift)
        values[:, index] = (value & (1 << bits) - 1).to(torch.uint8)
    return values.flatten(0, 1)
