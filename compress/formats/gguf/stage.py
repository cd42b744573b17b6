"""Write a checkpoint as a GGUF file."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from compress.checkpoints.checkpoint import Checkpoint
from compress.errors import StageError
from compress.formats.gguf.model import GGUF_FILE, GgufModel
from compress.stage.stage import Context, Promise, Stage
from compress.tasks.capability import GENERATES

_BLOCK = 32
_MOST_BITS_WITH_ZEROS = 5


class Gguf(Stage[Checkpoint, GgufModel]):
    """GGUF for llama.cpp: quantized integers as they are, in the smallest block type that holds them exactly.

    Four bits in groups of 32, 64, ... become Q4_0, eight bits Q8_0. With zero points four bits become Q4_1, whose
    minima are rounded to float16. What isn't quantized keeps ``float_type``. The file is read back with llama.cpp's own
    Python package and held against the checkpoint.
    """

    packages = ("gguf",)
    requires = frozenset({GENERATES})
    kind: Literal["gguf"] = "gguf"
    float_type: Literal["f16", "f32"] = Field("f16", description="type of the matrices that are not quantized")

    def objects_to(self, earlier: Stage[Any, Any]) -> tuple[str | None, str] | None:
        """Groups and bits that no block type holds, and adapters, which GGUF keeps in files of their own."""
        if earlier.adapter_beside:
            return None, "merge_lora before quantization, or a recipe without GGUF"
        for weights in earlier.integers():
            if weights.group_size % _BLOCK and weights.group_size != -1:
                return weights.group_field, f"a multiple of {_BLOCK}, GGUF's blocks"
        for weights in earlier.integers():
            if weights.zero_points and weights.bits > _MOST_BITS_WITH_ZEROS:
                reason = f"GGUF has no type for {weights.bits} bits with zero points"
                return weights.zero_points_field, f"{weights.no_zero_points}: {reason}"
        return None

    def promise(self) -> Promise:
        """The weights are those of the input, in another layout."""
        return Promise(changes_weights=False)

    def run(self, model: Checkpoint, context: Context) -> GgufModel:
        """Write and read back. Raises `ModelError` for what GGUF cannot hold, `StageError` if a weight differs."""
        from compress.formats.gguf.export import write_companions, write_gguf
        from compress.formats.gguf.proof import compare_gguf

        folder = context.scratch / "gguf"
        folder.mkdir(parents=True, exist_ok=True)
        write_companions(model, folder)
        write_gguf(model, folder / GGUF_FILE, self.float_type)
        found = compare_gguf(folder / GGUF_FILE, model, self.float_type)
        worst = max(found, key=lambda one: one.largest - one.allowed)
        if worst.largest > worst.allowed:
            raise StageError(
                f"The tensor {worst.name!r} came back from the file with a difference of {worst.largest:.1e}.",
                expected=f"at most {worst.allowed:.1e} of its largest weight in {worst.kind}",
                mend="this is a defect of the stage; please report it with the recipe",
            )
        exact = sum(one.largest == 0 for one in found)
        rounded = max(one.largest for one in found)
        context.remark(
            f"gguf: {exact} of {len(found)} tensors are kept to the bit"
            + (f", the others within {rounded:.1e} of their largest weight" if exact < len(found) else "")
        )
        return GgufModel(folder)
