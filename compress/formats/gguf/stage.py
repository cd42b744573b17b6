"""Write a checkpoint as a GGUF file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field

from compress.formats.gguf.model import GGUF_FILE, GgufModel
from compress.models.checkpoint import Checkpoint
from compress.stages.base import Context, OutputSpec, Stage
from compress.stages.cost_model import PlanContext, Prediction, Shape, predicted
from compress.stages.protocols import integer_weights
from compress.tasks.capability import GENERATES
from compress.utils.errors import ModelError, StageError

if TYPE_CHECKING:
    from compress.formats.gguf.export import Difference, Types

_BLOCK = 32
_MOST_BITS_WITH_ZEROS = 5
# fmt: off
_FileType = Literal[
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S",
    "Q5_K_M", "Q6_K", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS",
]
# fmt: on
_RUNTIME = "xllamacpp"
"""The package that ggml comes with."""


class Gguf(Stage[Checkpoint, GgufModel]):
    """GGUF for llama.cpp: quantized integers as they are, in the smallest block type that holds them exactly.

    Four bits in groups of 32, 64, ... become Q4_0, eight bits Q8_0. With zero points four bits become Q4_1, whose
    minima are rounded to float16. What isn't quantized keeps ``float_type``. The file is read back with llama.cpp's own
    Python package and held against the checkpoint.

    With a ``type`` weights in float are rounded by ggml itself, each to the type that `llama-quantize` gives it, so
    that errors are small where the stage `imatrix` before it found inputs large.
    """

    packages = ("gguf",)
    requires = frozenset({GENERATES})
    kind: Literal["gguf"] = "gguf"
    float_type: Literal["f16", "f32"] = Field("f16", description="type of the matrices that are not quantized")
    type: _FileType | None = Field(
        None,
        description="round the weights, which are in float, by llama.cpp's rules for a file of that type: `Q4_K_M`",
    )

    k_quants: bool = Field(
        False,
        description="keep integers of 2 and 3 bits as Q2_K and Q3_K, where rows are a multiple of 256: their scales "
        "are rounded to 4 or 6 bits; otherwise they take 4 bits, exactly",
    )

    def called_packages(self) -> tuple[str, ...]:
        """Return the distributions that the stage calls, with the one that contains ggml if it rounds."""
        return self.packages if self.type is None else (*self.packages, _RUNTIME)

    def conflicts_with(self, earlier: Stage[Any, Any]) -> tuple[str | None, str] | None:
        """Groups and bits that no block type holds, and adapters, which GGUF keeps in files of their own.

        Where it rounds itself, any integers.
        """
        if earlier.output_spec().adapter_beside:
            return None, "merge_lora before quantization, or a recipe without GGUF"
        if self.type is not None and integer_weights(earlier):
            return (
                None,
                f"weights in float, which gguf rounds to {self.type}; or gguf without type, which keeps integers",
            )
        for weights in integer_weights(earlier):
            if weights.group_size % _BLOCK and weights.group_size != -1:
                return weights.group_field, f"a multiple of {_BLOCK}, GGUF's blocks"
        for weights in integer_weights(earlier):
            if weights.zero_points and weights.bits > _MOST_BITS_WITH_ZEROS:
                reason = f"GGUF has no type for {weights.bits} bits with zero points"
                return weights.zero_points_field, f"{weights.no_zero_points}: {reason}"
        return None

    def check_widths(self, start: Path, before: Sequence[Stage[Any, Any]]) -> None:
        """Raises `ModelError` for a type that is garbage without an importance matrix, where there will be none."""
        from compress.models.safetensors_file import IMATRIX

        self._check_weighed(before[-1].output_spec().imatrix_beside if before else (start / IMATRIX).is_file())

    def _check_weighed(self, weighed: bool) -> None:
        from compress.formats.gguf.file_types import needs_imatrix

        if self.type is not None and needs_imatrix(self.type) and not weighed:
            raise ModelError(
                f"Rounding to {self.type} needs to know which inputs are large, and there is no importance matrix.",
                where="gguf.type",
                expected="the stage imatrix right before gguf, or a type that does without, such as Q3_K_M",
            )

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Bytes by the rules of the type, or of the blocks that hold the integers; floats have 16 or 32 bits."""
        if before is None:
            return predicted(None, None)
        from compress.formats.gguf.file_types import bytes_of

        if self.type is not None:
            size, note = bytes_of(self.type, before), f"about, by the rules of {self.type}, and the processor's files"
        else:
            matrices, tables = (self._stored_bits(bits) for bits in (before.matrix_bits, before.table_bits))
            size = (before.working * matrices + before.embeddings * tables) / 8
            note = f"about: {matrices:g} bits a weight, {tables:g} of tables, and the processor's files"
        after = replace(before, packed_bytes=round(size) + before.processor_bytes)
        return predicted(before, after, disk_note=note)

    @property
    def _float_bits(self) -> int:
        return 32 if self.float_type == "f32" else 16

    def _stored_bits(self, bits: int) -> float:
        """Of a weight in the smallest block of 32 that holds its integer, with the scale; of a float its own."""
        return next((each + 0.5 for each in (4, 5, 8) if bits <= each), self._float_bits)

    def search_values(self, before: Shape | None, timed: bool = False) -> dict[str, tuple[Any, ...]]:
        """File types from the smallest on, where the stage rounds at all."""
        from compress.formats.gguf.file_types import FILE_TYPES, bytes_of

        if self.type is None or before is None:
            return {}
        return {"type": tuple(sorted(FILE_TYPES, key=lambda name: bytes_of(name, before)))}

    def without_rounding(self) -> Self:
        """Floats as they are, and integers to the bit."""
        return self.model_copy(update={"type": None, "k_quants": False})

    def output_spec(self) -> OutputSpec:
        """The weights are those of the input in another layout, or rounded."""
        return OutputSpec(changes_weights=self.type is not None or self.k_quants)

    def run(self, model: Checkpoint, context: Context) -> GgufModel:
        """Write and read back. Raises `ModelError` for what GGUF cannot hold, `StageError` if a weight differs."""
        from compress.formats.gguf.export import Types, write_companions
        from compress.models.folder_checks import refuse_quantized
        from compress.models.safetensors_file import read_imatrix

        weighed = self.type is not None and bool(read_imatrix(model.folder))
        if self.type is not None:
            refuse_quantized(model.folder)
            self._check_weighed(weighed)
        folder = context.scratch / "gguf"
        folder.mkdir(parents=True, exist_ok=True)
        types = Types(self.float_type, self.type, self.k_quants)
        write_companions(model, folder)
        found = _written(model, folder / GGUF_FILE, types)
        context.note(_kept(found) if self.type is None else _rounded(found, self.type, weighed))
        return GgufModel(folder)


def _written(model: Checkpoint, file: Path, types: Types) -> list[Difference]:
    """How the tensors of the ``file`` differ, once it is there. Raises `StageError` where it is more than allowed."""
    from compress.formats.gguf.export import compare_gguf, write_gguf

    write_gguf(model, file, types)
    found = list(compare_gguf(file, model, types))
    worst = max(found, key=lambda one: one.largest - one.allowed)
    if worst.largest > worst.allowed:
        raise StageError(
            f"The tensor {worst.name!r} came back from the file with a difference of {worst.largest:.1e}.",
            expected=f"at most {worst.allowed:.1e} of its largest weight in {worst.kind}",
            hint="this is a defect of the stage; please report it with the recipe",
        )
    return found


def _kept(found: Sequence[Difference]) -> str:
    plain, scaled = ([one for one in found if one.rounded == told] for told in (False, True))
    exact, largest = sum(one.largest == 0 for one in plain), max(one.largest for one in plain)
    said = f"gguf: {exact} of {len(found)} tensors are kept to the bit"
    if scaled:
        worst = max(one.largest for one in scaled)
        said += f", the integers of {len(scaled)} with rounded scales, which moves a tensor by {worst:.1%} at most"
    return said + (f", the others within {largest:.1e} of their largest weight" if exact < len(plain) else "")


def _rounded(found: Sequence[Difference], file_type: str, weighed: bool) -> str:
    counts = Counter(one.kind for one in found if one.rounded)
    worst = max((one for one in found if one.rounded), key=lambda one: one.largest)
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    by = "by the importance matrix" if weighed else "without an importance matrix"
    return f"gguf: {file_type}, {by}: {kinds}; the largest error {worst.largest:.1%} of the weights in {worst.name}"
