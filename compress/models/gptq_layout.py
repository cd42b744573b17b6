"""The tensors in which AutoGPTQ, gptqmodel and transformers keep a quantized linear layer.

For each layer NAME: `NAME.qweight` int32 [in_features * bits / 32, out_features], the integers of a column as one
stream of bits, least significant first; `NAME.qzeros` int32 [groups, out_features * bits / 32], packed alike along a
row; `NAME.scales` float16 [groups, out_features]; `NAME.g_idx` int32 [in_features], the group of each input.

``checkpoint_format: gptq`` stores zero points less one (a zero point of 0 cannot be held); ``gptq_v2`` as they are.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch

from compress.numerics.integer_grid import QuantizedWeight
from compress.utils.errors import ModelError

BITS = (2, 3, 4, 8)
"""What readers of the format know; three bits cross the borders of words."""
PARTS = ("qweight", "qzeros", "scales", "g_idx")
_WORD = 32


def fits(out_features: int, in_features: int) -> bool:
    """Whether both sides fill whole 32-bit words, as the format needs."""
    return out_features % _WORD == 0 and in_features % _WORD == 0


def pack_layer(
    weight: QuantizedWeight, stored_less_one: bool, known_bits: Container[int] = BITS
) -> dict[str, torch.Tensor]:
    """The four tensors of a layer [out_features, in_features] by part. Raises `ModelError` where they don't fit.

    ``known_bits`` are what those who read it know: others for tables, which the format has no place for.
    """
    rows, columns = weight.integers.shape
    if weight.bits not in known_bits or not fits(rows, columns):
        raise ModelError(
            f"A layer of {rows} x {columns} at {weight.bits} bits does not fit the GPTQ format.",
            expected=f"bits of {', '.join(map(str, BITS))}, both sides multiples of {_WORD}",
        )
    zeros = weight.zero_points.to(torch.int64) - int(stored_less_one)
    if int(zeros.min()) < 0:
        raise ModelError("A zero point of 0 cannot be stored less one.", expected="checkpoint_format gptq_v2")
    return {
        "qweight": pack_bits(weight.integers.T, weight.bits),
        "qzeros": pack_bits(zeros, weight.bits).T.contiguous(),
        "scales": weight.scales.T.to(torch.float16).contiguous(),
        "g_idx": (torch.arange(columns) // weight.group_size).to(torch.int32),
    }


def unpack_layer(
    tensors: Mapping[str, torch.Tensor], bits: int, group_size: int, stored_less_one: bool
) -> QuantizedWeight:
    """What `pack_layer` packed. Raises `ModelError` for groups that do not lie in the order of the columns."""
    columns = tensors["qweight"].shape[0] * _WORD // bits
    size = columns if group_size == -1 else group_size
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
    """[n, m] integers below 2**bits -> [n * bits / 32, m] int32: a stream of bits down each column; n: 32, 64, ..."""
    chunks = values.to(torch.uint8).reshape(-1, _WORD, values.shape[1])
    words = torch.zeros(len(chunks), bits, values.shape[1], dtype=torch.int32)
    for index in range(_WORD):
        word, shift = divmod(index * bits, _WORD)
        value = chunks[:, index].to(torch.int32)
        # Bits beyond the last are dropped, and the last is the sign: words are as if unsigned.
        words[:, word] |= value << shift
        if shift + bits > _WORD:
            words[:, word + 1] |= value >> (_WORD - shift)
    return words.flatten(0, 1)


def unpack_bits(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The uint8 values [n, m] of `pack_bits`' words [n * bits / 32, m]."""
    chunks = (words.to(torch.int64) & 0xFFFFFFFF).reshape(-1, bits, words.shape[1])
    values = torch.empty(len(chunks), _WORD, words.shape[1], dtype=torch.uint8)
    for index in range(_WORD):
        word, shift = divmod(index * bits, _WORD)
        value = chunks[:, word] >> shift
        if shift + bits > _WORD:
            value = value | chunks[:, word + 1] << (_WORD - shift)
        values[:, index] = (value & (1 << bits) - 1).to(torch.uint8)
    return values.flatten(0, 1)
