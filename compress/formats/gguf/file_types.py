"""llama.cpp's file types (`Q4_K_M` and so on): which block type each tensor of a file gets.

The rules are those of its `llama-quantize`: most matrices are of one type, some that matter more of a finer one, and
where rows are not whole blocks of 256 another type of blocks of 32 stands in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from compress.formats.gguf.blocks import block_length, row_bytes

if TYPE_CHECKING:
    from compress.stages.cost_model import Shape

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.weight")
_VALUES = ("attn_v", "attn_qkv", "attn_kv_b")
"""Matrices that have a layer's values in them, all of which llama.cpp rounds as those that have nothing else."""
_STANDS_IN = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""For rows that are no whole blocks; for every other type of 256 it is IQ4_NL."""
_BLIND = ("IQ2", "IQ3_X")
"""How file types begin whose matrices, or some of them, llama.cpp refuses to round without an importance matrix."""
_WIDEST = 256
_MIXTRAL = 8
"""Experts of the mixture for which llama.cpp's rules are others."""


@dataclass(frozen=True)
class Place:
    """A matrix of a block: the ``index`` of those alike, of ``count``; and what its model has."""

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

    def middle(self) -> bool:
        """Return whether the matrix is neither in the first nor in the last eighth of the blocks."""
        return self.count // 8 <= self.index < 7 * self.count // 8


Rule = tuple[Callable[[Place], bool], str]
"""Where it holds, and the type that a matrix then gets."""


def _always(place: Place) -> bool:
    return True


def _like_mixtral(place: Place) -> bool:
    return place.experts == _MIXTRAL


def _grouped(place: Place) -> bool:
    return place.grouped


def _grouped_or_mixed(place: Place) -> bool:
    return place.grouped or place.experts >= 4


def _unweighed_first(place: Place) -> bool:
    return not place.weighed and place.first_eighth()


def _weighed_first(place: Place) -> bool:
    return place.weighed and place.first_eighth()


@dataclass(frozen=True)
class FileType:
    """Its ``number`` in files (llama_ftype), and the block type of most matrices, of the head, and of the table.

    ``rules`` are those of others by their names within a block: the first that holds counts.
    """

    number: int
    most: str
    head: str = "Q6_K"
    table: str | None = None
    rules: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)

    @property
    def below_three_bits(self) -> bool:
        """Return whether the type is one of the IQ2 types, which have rules of their own for keys and values."""
        return self.most.startswith("IQ2")


_OUTPUT_OF_MIXTRAL: Rule = (_like_mixtral, "Q5_K")
_HALF_FINER: dict[str, tuple[Rule, ...]] = {
    "attn_v": ((Place.matters, "Q6_K"),),
    "ffn_down": ((Place.matters, "Q6_K"),),
}


def _two_bits(number: int, most: str, finer: str, table: str, output: tuple[Rule, ...] = ()) -> FileType:
    rules: dict[str, tuple[Rule, ...]] = {
        "attn_v": ((_grouped_or_mixed, "Q4_K"), (_always, finer)),
        "attn_k": ((_like_mixtral, "Q4_K"),),
        "ffn_down": ((Place.first_eighth, finer),),
        "attn_output": (_OUTPUT_OF_MIXTRAL, *output),
    }
    return FileType(number, most, "Q5_K", table, rules)


FILE_TYPES: dict[str, FileType] = {
    "Q4_0": FileType(2, "Q4_0", rules={"ffn_down": ((_weighed_first, "Q4_1"),)}),
    "Q4_1": FileType(3, "Q4_1"),
    "Q5_0": FileType(8, "Q5_0", rules={"ffn_down": ((_weighed_first, "Q5_1"),)}),
    "Q5_1": FileType(9, "Q5_1"),
    "Q8_0": FileType(7, "Q8_0", "Q8_0"),
    "Q2_K": FileType(
        *(10, "Q2_K"),
        rules={
            "attn_v": ((_grouped, "Q4_K"), (_always, "Q3_K")),
            "ffn_down": ((_always, "Q3_K"),),
            "attn_output": (_OUTPUT_OF_MIXTRAL, (_always, "Q3_K")),
        },
    ),
    "Q3_K_S": FileType(11, "Q3_K", rules={"attn_output": (_OUTPUT_OF_MIXTRAL,)}),
    "Q3_K_M": FileType(
        *(12, "Q3_K"),
        rules={
            "attn_v": ((lambda place: place.index < 2, "Q5_K"), (_always, "Q4_K")),
            "ffn_down": ((lambda place: place.index < place.count // 16, "Q5_K"), (_always, "Q4_K")),
            "attn_output": (_OUTPUT_OF_MIXTRAL, (_always, "Q4_K")),
        },
    ),
    "Q3_K_L": FileType(
        *(13, "Q3_K"),
        rules={
            "attn_v": ((_always, "Q5_K"),),
            "ffn_down": ((_always, "Q5_K"),),
            "attn_output": ((lambda place: not _like_mixtral(place), "Q5_K"),),
        },
    ),
    "Q4_K_S": FileType(
        *(14, "Q4_K"),
        rules={
            "attn_v": ((lambda place: place.index < 4, "Q5_K"),),
            "ffn_down": ((Place.first_eighth, "Q5_K"),),
            "attn_output": (_OUTPUT_OF_MIXTRAL,),
        },
    ),
    "Q4_K_M": FileType(15, "Q4_K", rules=_HALF_FINER | {"attn_output": (_OUTPUT_OF_MIXTRAL,)}),
    "Q5_K_S": FileType(16, "Q5_K"),
    "Q5_K_M": FileType(17, "Q5_K", rules=_HALF_FINER),
    "Q6_K": FileType(18, "Q6_K"),
    "IQ2_XXS": _two_bits(19, "IQ2_XXS", "Q2_K", "Q2_K"),
    "IQ2_XS": _two_bits(20, "IQ2_XS", "Q2_K", "Q2_K"),
    "IQ2_S": _two_bits(28, "IQ2_XS", "IQ3_S", "IQ3_S", ((_always, "IQ3_S"),)),
    "IQ2_M": _two_bits(29, "IQ2_S", "IQ3_S", "IQ3_S", ((_always, "IQ3_S"),)),
    "IQ3_XXS": FileType(
        *(23, "IQ3_XXS", "Q5_K", "IQ3_S"),
        rules={
            "attn_v": ((_grouped, "Q4_K"),),
            "attn_q": ((_always, "IQ2_S"),),
            "attn_k": ((_always, "IQ2_S"),),
            "attn_output": (_OUTPUT_OF_MIXTRAL, (_always, "IQ3_S")),
        },
    ),
    "IQ3_XS": FileType(
        *(22, "IQ3_S"),
        rules={
            "attn_v": ((_grouped, "Q4_K"),),
            "attn_q": ((_always, "IQ3_XXS"),),
            "attn_k": ((_always, "IQ3_XXS"),),
            "ffn_gate": ((Place.middle, "IQ3_XXS"),),
            "ffn_up": ((Place.middle, "IQ3_XXS"),),
            "attn_output": (_OUTPUT_OF_MIXTRAL,),
        },
    ),
    "IQ3_S": FileType(26, "IQ3_S", rules={"attn_v": ((_grouped, "Q4_K"),), "attn_output": (_OUTPUT_OF_MIXTRAL,)}),
    "IQ3_M": FileType(
        *(27, "IQ3_S"),
        rules={
            "attn_v": ((_always, "Q4_K"),),
            "ffn_down": ((lambda place: place.first_eighth() or (_like_mixtral(place) and place.matters()), "Q4_K"),),
            "attn_output": (_OUTPUT_OF_MIXTRAL, (_always, "Q4_K")),
        },
    ),
    **{
        name: FileType(
            *(number, name),
            rules={
                "attn_v": ((_grouped, "Q5_K"),),
                "ffn_down": ((_unweighed_first, "Q5_K"),),
                "attn_output": (_OUTPUT_OF_MIXTRAL,),
            },
        )
        for name, number in {"IQ4_NL": 25, "IQ4_XS": 30}.items()
    },
}
"""File types by the names that `llama-quantize` accepts."""


def needs_imatrix(name: str) -> bool:
    """Return whether a file type destroys the weights if there is no importance matrix."""
    return name.startswith(_BLIND)


@dataclass(frozen=True)
class Typed:
    """The block types of one model's tensors in a file type.

    ``tensors`` are the names of all; ``heads`` those of attention for each head of keys and values; ``weighed`` says
    whether there is an importance matrix.
    """

    file_type: FileType
    tensors: Sequence[str]
    layers: int
    heads: float
    experts: int
    weighed: bool

    def kind(self, name: str, columns: int) -> str:
        """Return the block type of a matrix with that name and number of columns."""
        if self._is_head(name) and columns % block_length(self.file_type.most):
            return self.fitting("Q8_0", columns)
        return self.fitting(self._wanted(name), columns)

    def _is_head(self, name: str) -> bool:
        return name == "output.weight" or (name == "token_embd.weight" and "output.weight" not in self.tensors)

    @staticmethod
    def fitting(kind: str, columns: int) -> str:
        """Return the type, or its replacement if the rows are not whole blocks of it."""
        if columns % block_length(kind):
            kind = _STANDS_IN.get(kind, "IQ4_NL")
        return "F16" if columns % block_length(kind) else kind

    def _wanted(self, name: str) -> str:
        kind = self.file_type
        if self._is_head(name):
            return kind.head
        if name in ("token_embd.weight", "per_layer_token_embd.weight"):
            return kind.table or kind.most
        found = _BLOCK.fullmatch(name)
        if found is None:
            return kind.most
        leaf = "attn_v" if found[2] in _VALUES else re.sub(r"(ffn_\w+?)_(sh)?exps?$", r"\1", found[2])
        place = self._place(int(found[1]), leaf)
        if leaf in ("attn_v", "attn_k") and _like_mixtral(place) and not kind.below_three_bits:
            return "Q8_0"
        wanted = next((other for holds, other in kind.rules.get(leaf, ()) if holds(place)), kind.most)
        # Of eighty layers that share keys and values the values are few, and llama.cpp never leaves them below 5 bits.
        few = leaf == "attn_v" and self.layers == 80 and self.heads > 1 and not kind.below_three_bits
        return "Q5_K" if few and wanted in ("Q3_K", "Q4_K") else wanted

    def _place(self, layer: int, leaf: str) -> Place:
        """Values are counted among the layers that have some; feed-forward parts by the layer."""
        index, count = layer, self.layers
        if leaf == "attn_v":
            parts = (_BLOCK.fullmatch(name) for name in self.tensors)
            having = sorted(int(part[1]) for part in parts if part and part[2] in _VALUES)
            index, count = having.index(layer), len(having)
        return Place(index, count, self.heads >= 4, self.experts, self.weighed)


def bytes_of(name: str, shape: Shape) -> float:
    """Return the approximate bytes of all tensors of a model of that shape, which is exact for a Llama.

    Small tensors are counted with the matrices beside them. If the shape does not tell keys and values apart from
    queries, attention has the type of most matrices.
    """
    layers = max(shape.layers, 1)
    square, attention = shape.hidden**2, shape.attention / layers
    shared = attention / 2 - square
    """Keys, or values, of a layer."""
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
    typed = Typed(FILE_TYPES[name], tuple(sizes), layers, heads, 0, True)
    found = 0.0 if "output.weight" in sizes else 4 * shape.other
    for tensor, count in sizes.items():
        columns = (shape.intermediate if ".ffn_down." in tensor else shape.hidden) or _WIDEST
        found += count * row_bytes(typed.kind(tensor, columns), columns) / columns
    return found
