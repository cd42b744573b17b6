"""Turn the inner coordinates of a language model, before its weights are quantized."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from compress.models.checkpoint import Checkpoint
from compress.stages.base import Context, Promise, Stage
from compress.tasks.capability import GENERATES


class Rotate(Stage[Checkpoint, Checkpoint]):
    """Multiply weights by orthogonal matrices that take each other back: the same function, at no cost when it runs.

    QuaRot's rotations that fold into weights (Ashkboos et al. 2024, section 4): of the hidden states between blocks
    (R1), with the weights of norms folded into the layers behind them, and of the values of each head (R2). That the
    function stays is proven on every block and on the whole; one block is in memory at a time, and no text is read.
    What changes is stored in float32. A head that is tied to the embedding table gets weights of its own from `hidden`,
    since the last norm's weights go into it alone.
    """

    packages = ("torch", "transformers", "accelerate", "safetensors")
    requires = frozenset({GENERATES})
    scales_inputs = True
    promised = Promise(max_size_ratio=4.1)
    """At most float32 in place of 16-bit weights, and a head beside the table."""
    kind: Literal["rotate"] = "rotate"
    hidden: bool = Field(True, description="rotate the hidden states between blocks (R1)")
    heads: bool = Field(True, description="rotate the values of each head (R2)")
    matrix: Literal["hadamard", "random"] = Field(
        "hadamard", description="entries of one size, as far as the width has factors of 2, or drawn altogether"
    )

    @model_validator(mode="after")
    def _something_turns(self) -> Self:
        if not (self.hidden or self.heads):
            raise ValueError("hidden, heads, or both")
        return self

    def run(self, model: Checkpoint, context: Context) -> Checkpoint:
        """Rotate every block. Raises `StageError` where that would change the function, or `ModelError`."""
        from compress.quantization.rotate import rotate_checkpoint

        return rotate_checkpoint(model, self.hidden, self.heads, self.matrix == "hadamard", context)
