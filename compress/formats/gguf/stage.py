"""Write a checkpoint as a GGUF file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field

from compress.formats.gguf.model import GGUF_FILE, GgufModel
from compress.models.checkpoint import Checkpoint
from compress.stages.base import AnyStage, Context, OutputSpec, Stage
from compress.stages.cost_model import PlanContext, Prediction, Shape, predicted
from compress.stages.protocols import integer_weights
from compress.tasks.capability import GENERATES
from compress.utils.errors import StageError

if TYPE_CHECKING:
    from compress.formats.gguf.export import Difference

_BLOCK = 32
_MOST_BITS_WITH_ZEROS = 5
# fmt: off
_FileType = Literal[
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S",
    "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS",
]
# fmt: on
_RUNTIME = "xllamacpp"
"""Package that contains ggml."""


class Gguf(Stage[Checkpoint, GgufModel]):
    """GGUF for llama.cpp: quantized integers unchanged, in the smallest block type that stores them exactly.

    Four bits in groups of 32, 64, ... become Q4_0, and eight bits Q8_0. Four bits with zero points become Q4_1, whose
    minima are rounded to float16. Weights that are not quantized are stored as ``float_type``. The file is read back
    with llama.cpp's own Python package and compared with the checkpoint.

    If ``type`` is set, ggml rounds float weights, each to the type that `llama-quantize` chooses. With the stage
    `imatrix` before it, errors are smaller for large inputs.
    """

    packages = ("gguf",)
    requires = frozenset({GENERATES})
    kind: Literal["gguf"] = "gguf"
    float_type: Literal["f16", "f32"] = Field("f16", description="data type of matrices that are not quantized")
    type: _FileType | None = Field(
        None, description="quantize float weights as llama.cpp does for this file type, such as `Q4_K_M`"
    )

    def called_packages(self) -> tuple[str, ...]:
        """Return the distributions that the stage calls, with the one that contains ggml if it rounds."""
        return self.packages if self.type is None else (*self.packages, _RUNTIME)

    def conflicts_with(self, earlier: AnyStage) -> tuple[str | None, str] | None:
        """Return the field and the remedy for groups, bits or adapters that GGUF cannot store.

        With a ``type``, any integers conflict.
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

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Predict bytes by the rules of the type, or by the blocks that hold the integers."""
        if before is None:
            return predicted(None, None)
        from compress.formats.gguf.file_types import estimate_bytes

        if self.type is not None:
            size = estimate_bytes(self.type, before)
            note = f"about, by the rules of {self.type}, and the processor's files"
        else:
            # The bits of a weight with its scale in the smallest block of 32 that holds it.
            float_bits = 32 if self.float_type == "f32" else 16
            matrices, tables = (
                next((width + 0.5 for width in (4, 5, 8) if bits <= width), float_bits)
                for bits in (before.matrix_bits, before.table_bits)
            )
            size = (before.working * matrices + before.embeddings * tables) / 8
            note = f"about: {matrices:g} bits a weight, {tables:g} of tables, and the processor's files"
        return predicted(before, replace(before, packed_bytes=round(size) + before.processor_bytes), disk_note=note)

    def search_values(self, before: Shape | None, timed: bool = False) -> dict[str, tuple[Any, ...]]:
        """Return the file types by increasing size, if the stage rounds."""
        from compress.formats.gguf.file_types import FILE_TYPES, estimate_bytes

        if self.type is None or before is None:
            return {}
        return {"type": tuple(sorted(FILE_TYPES, key=lambda name: estimate_bytes(name, before)))}

    def without_rounding(self) -> Self:
        """Return the stage with floats and integers stored exactly."""
        return self.model_copy(update={"type": None})

    def output_spec(self) -> OutputSpec:
        """Return the output specification; weights change if they are rounded."""
        return OutputSpec(changes_weights=self.type is not None)

    def run(self, model: Checkpoint, context: Context) -> GgufModel:
        """Write the file and read it back.

        Raises:
            ModelError: GGUF cannot hold the checkpoint.
            StageError: A weight differs by more than its type allows.
        """
        from compress.formats.gguf.export import GgufTypes, compare_gguf, write_companions, write_gguf
        from compress.models.folder_checks import refuse_quantized
        from compress.models.safetensors_file import read_imatrix

        weighed = self.type is not None and bool(read_imatrix(model.folder))
        if self.type is not None:
            refuse_quantized(model.folder)
        folder = context.scratch / "gguf"
        folder.mkdir(parents=True, exist_ok=True)
        types = GgufTypes(self.float_type, self.type)
        write_companions(model, folder)
        write_gguf(model, folder / GGUF_FILE, types)
        # Read the file back; no tensor may differ by more than its type explains.
        differences = compare_gguf(folder / GGUF_FILE, model, types)
        worst = max(differences, key=lambda difference: difference.largest - difference.allowed)
        if worst.largest > worst.allowed:
            raise StageError(
                f"The tensor {worst.name!r} came back from the file with a difference of {worst.largest:.1e}.",
                expected=f"at most {worst.allowed:.1e} of its largest weight in {worst.kind}",
                hint="this is a defect of the stage; please report it with the recipe",
            )
        summary = _exact_summary(differences) if self.type is None else self._rounded_summary(differences, weighed)
        context.note(f"gguf: {summary}")
        return GgufModel(folder)

    def _rounded_summary(self, differences: Sequence[Difference], weighed: bool) -> str:
        rounded = [difference for difference in differences if difference.rounded]
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(one.kind for one in rounded).most_common())
        worst = max(rounded, key=lambda difference: difference.largest)
        weighting = "by the importance matrix" if weighed else "without an importance matrix"
        error = f"the largest error {worst.largest:.1%} of the weights in {worst.name}"
        return f"{self.type}, {weighting}: {kinds}; {error}"


def _exact_summary(differences: Sequence[Difference]) -> str:
    errors = [difference.largest for difference in differences]
    exact = errors.count(0)
    summary = f"{exact} of {len(errors)} tensors are stored exactly"
    return summary + (f", the others within {max(errors):.1e} of their largest weight" if exact < len(errors) else "")
