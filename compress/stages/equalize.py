"""Give the weights of a language model columns of alike size, before they are quantized."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.checkpoints.checkpoint import Checkpoint
from compress.stage.stage import Context, Promise, Stage
from compress.tasks.capability import GENERATES


class Equalize(Stage[Checkpoint, Checkpoint]):
    """Scale the inputs of linear layers and take it back in the norm or layer before: the same function.

    Cross-layer equalization (Nagel et al. 2019, section 4.1): weights that share a scale then fill its range. Where
    factors can be taken back is found by trying it on each block; one block is in memory at a time, and no text is
    read. What changes is stored in float32.
    """

    packages = ("torch", "transformers", "accelerate", "safetensors")
    requires = frozenset({GENERATES})
    scales_inputs = True
    keeps_shape = True
    promised = Promise(max_size_ratio=2.05)
    """At most float32 in place of 16-bit weights."""
    kind: Literal["equalize"] = "equalize"
    strength: float = Field(0.5, gt=0, le=1, description="1 makes all columns of a layer alike, 0.5 goes half the way")

    def run(self, model: Checkpoint, context: Context) -> Checkpoint:
        """Equalize every block. Raises `StageError` or `ModelError`."""
        from compress.quantization.equalize import equalize_checkpoint

        return equalize_checkpoint(model, self.strength, context)
