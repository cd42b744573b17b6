"""llama.cpp's file types, such as `Q4_K_M`: the block type of each tensor of a file.

The rules are those of `llama-quantize`. Most matrices have one type and some sensitive ones have a wider type. Rows
that do not fill blocks of 256 get another type with blocks of 32.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

from compress.formats.gguf.blocks import block_length, row_bytes

if TYPE_CHECKING:
    from compress.stages.cost_model import Shape

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.weight")
_VALUES = ("attn_v", "attn_qkv", "attn_kv_b")
"""Matrices that contain a layer's values; llama.cpp applies the rules for values to all of them."""
_REPLACEMENTS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""Types for rows that do not fill blocks of 256; IQ4_NL replaces all others."""
_WIDEST = 256
_MIXTRAL = 8
"""Number of experts for which llama.cpp has separate rules."""


@dataclass(frozen=True)
class MatrixPosition:
    """Position of a matrix among those of its kind, and properties of the model.

    Attributes:
        index: Index among the matrices of its kind.
        count: Number of those matrices.
        grouped: Whether at least four query heads share a key head.
        experts: Number of experts.
        weighed: Whether there is an importance matrix.
    """

    index: int
    count: int
    grouped: bool
    experts: int
    weighed: bool

    def first_eighth(self) -> bool:
        """Return whether the matrix is in the first eighth of the blocks."""
        return self.index < self.count // 8

    def matters(self) -> bool:
        """Return whether llama.cpp's mixtures store the matrix in a finer type: first, last and every third one."""
        eighth = self.count // 8
        return self.first_eighth() or self.index >= 7 * self.count // 8 or (self.index - eighth) % 3 == 2


def _always(place: MatrixPosition) -> bool:
    return True


def _like_mixtral(place: MatrixPosition) -> bool:
    return place.experts == _MIXTRAL


def _weighed_first_eighth(place: MatrixPosition) -> bool:
    return place.weighed and place.first_eighth()


_grouped = attrgetter("grouped")


@dataclass(frozen=True)
class FileType:
    """File type of llama.cpp.

    Attributes:
        number: Number in files (llama_ftype).
        most: Block type of most matrices.
        head: Block type of the output head.
    """

    number: int
    most: str
    head: str = "Q6_K"


FILE_TYPES: dict[str, FileType] = {
    "Q4_0": FileType(2, "Q4_0"),
    "Q4_1": FileType(3, "Q4_1"),
    "Q5_0": FileType(8, "Q5_0"),
    "Q5_1": FileType(9, "Q5_1"),
    "Q8_0": FileType(7, "Q8_0", "Q8_0"),
    "Q2_K": FileType(10, "Q2_K"),
    "Q3_K_S": FileType(11, "Q3_K"),
    "Q3_K_M": FileType(12, "Q3_K"),
    "Q3_K_L": FileType(13, "Q3_K"),
    "Q4_K_S": FileType(14, "Q4_K"),
    "Q4_K_M": FileType(15, "Q4_K"),
    "Q5_K_S": FileType(16, "Q5_K"),
    "Q5_K_M": FileType(17, "Q5_K"),
    "Q6_K": FileType(18, "Q6_K"),
    "IQ4_NL": FileType(25, "IQ4_NL"),
    "IQ4_XS": FileType(30, "IQ4_XS"),
}
"""File types that need no importance matrix, by the names that `llama-quantize` accepts."""

_RULES: tuple[tuple[str, str, Callable[[MatrixPosition], bool], str], ...] = (
    ("Q2_K Q3_K_S Q3_K_M Q4_K_S Q4_K_M IQ4_NL IQ4_XS", "attn_output", _like_mixtral, "Q5_K"),
    ("Q2_K", "attn_output", _always, "Q3_K"),
    ("Q3_K_M", "attn_output", _always, "Q4_K"),
    ("Q3_K_L", "attn_output", lambda place: not _like_mixtral(place), "Q5_K"),
    ("Q2_K", "attn_v", _grouped, "Q4_K"),
    ("Q2_K", "attn_v", _always, "Q3_K"),
    ("Q3_K_M", "attn_v", lambda place: place.index < 2, "Q5_K"),
    ("Q3_K_M", "attn_v", _always, "Q4_K"),
    ("Q3_K_L", "attn_v", _always, "Q5_K"),
    ("Q4_K_S", "attn_v", lambda place: place.index < 4, "Q5_K"),
    ("Q4_K_M Q5_K_M", "attn_v", MatrixPosition.matters, "Q6_K"),
    ("IQ4_NL IQ4_XS", "attn_v", _grouped, "Q5_K"),
    ("Q2_K", "ffn_down", _always, "Q3_K"),
    ("Q3_K_M", "ffn_down", lambda place: place.index < place.count // 16, "Q5_K"),
    ("Q3_K_M", "ffn_down", _always, "Q4_K"),
    ("Q3_K_L", "ffn_down", _always, "Q5_K"),
    ("Q4_K_S", "ffn_down", MatrixPosition.first_eighth, "Q5_K"),
    ("Q4_K_M Q5_K_M", "ffn_down", MatrixPosition.matters, "Q6_K"),
    ("IQ4_NL IQ4_XS", "ffn_down", lambda place: place.first_eighth() and not place.weighed, "Q5_K"),
    ("Q4_0", "ffn_down", _weighed_first_eighth, "Q4_1"),
    ("Q5_0", "ffn_down", _weighed_first_eighth, "Q5_1"),
)
"""File types, matrix of a block, condition, and the block type instead of `FileType.most`; the first match applies."""


@dataclass(frozen=True)
class TensorTypes:
    """Block types of a model's tensors in a file type.

    Attributes:
        name: Name of the file type.
        tensors: Names of all tensors.
        layers: Number of layers.
        heads: Attention heads per key-value head.
        experts: Number of experts.
        weighed: Whether there is an importance matrix.
    """

    name: str
    tensors: Sequence[str]
    layers: int
    heads: float
    experts: int
    weighed: bool

    def kind(self, name: str, columns: int) -> str:
        """Return the block type of a matrix with that name and number of columns."""
        # llama.cpp stores a head whose rows do not fill blocks in 8 bits.
        if self._is_head(name) and columns % block_length(FILE_TYPES[self.name].most):
            return self.fitting("Q8_0", columns)
        return self.fitting(self._preferred(name), columns)

    def _is_head(self, name: str) -> bool:
        return name == "output.weight" or (name == "token_embd.weight" and "output.weight" not in self.tensors)

    @staticmethod
    def fitting(kind: str, columns: int) -> str:
        """Return the type, or its replacement if the rows do not fill its blocks."""
        if columns % block_length(kind):
            kind = _REPLACEMENTS.get(kind, "IQ4_NL")
        return "F16" if columns % block_length(kind) else kind

    def _preferred(self, name: str) -> str:
        kind = FILE_TYPES[self.name]
        if self._is_head(name):
            return kind.head
        match = _BLOCK.fullmatch(name)
        if match is None:
            return kind.most
        leaf = "attn_v" if match[2] in _VALUES else re.sub(r"(ffn_\w+?)_(sh)?exps?$", r"\1", match[2])
        # The position of a matrix; values are counted among the layers that have some.
        layer = int(match[1])
        index, count = layer, self.layers
        if leaf == "attn_v":
            parts = (_BLOCK.fullmatch(name) for name in self.tensors)
            having = sorted(int(part[1]) for part in parts if part and part[2] in _VALUES)
            index, count = having.index(layer), len(having)
        position = MatrixPosition(index, count, self.heads >= 4, self.experts, self.weighed)
        if leaf in ("attn_v", "attn_k") and _like_mixtral(position):
            return "Q8_0"
        exceptions = (
            other
            for names, matrix, holds, other in _RULES
            if matrix == leaf and self.name in names.split() and holds(position)
        )
        preferred = next(exceptions, kind.most)
        # Models with 80 layers and shared key-value heads have few values, and llama.cpp gives them at least 5 bits.
        few = leaf == "attn_v" and self.layers == 80 and self.heads > 1
        return "Q5_K" if few and preferred in ("Q3_K", "Q4_K") else preferred


def estimate_bytes(name: str, shape: Shape) -> float:
    """Return the approximate bytes of all tensors of a model, which is exact for a Llama.

    Small tensors are counted with the matrices beside them. If the shape does not distinguish keys and values from
    queries, attention has the type of most matrices.
    """
    layers = max(shape.layers, 1)
    square, attention = shape.hidden**2, shape.attention / layers
    shared = attention / 2 - square
    # Query and output are square, and key and value have the same size.
    parts = {"attn": attention}
    if shape.intermediate and 0 < shared <= square:
        parts = {"attn_q": square, "attn_k": shared, "attn_v": shared, "attn_output": square}
    parts |= dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), shape.feed_forward / layers / 3)
    sizes = {f"blk.{layer}.{part}.weight": count for layer in range(layers) for part, count in parts.items()}
    sizes["token_embd.weight"] = shape.embeddings
    if shape.other >= shape.embeddings:
        sizes["output.weight"] = shape.other
    # A norm that is named after attention is counted with it.
    heads = float(round(square / shared)) if "attn_v" in parts else 1.0
    typed = TensorTypes(name, tuple(sizes), layers, heads, 0, True)
    total = 0.0 if "output.weight" in sizes else 4 * shape.other
    for tensor, count in sizes.items():
        columns = (shape.intermediate if ".ffn_down." in tensor else shape.hidden) or _WIDEST
        total += count * row_bytes(typed.kind(tensor, columns), columns) / columns
    return total
