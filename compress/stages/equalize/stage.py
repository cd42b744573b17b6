"""Give the weights of a language model columns of alike size, before they are quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from compress.models.checkpoint import Checkpoint
from compress.stages.base import Context, OutputSpec, Requirements, Stage
from compress.stages.gptq.settings import Quantization
from compress.stages.protocols import KeepsShape
from compress.tasks.capability import GENERATES


class Equalize(KeepsShape, Stage[Checkpoint, Checkpoint]):
    """Scale the inputs of linear layers and undo it in the preceding norm or layer: the function does not change.

    Cross-layer equalization (Nagel et al. 2019, section 4.1): weights that share a scale then use its whole range. It
    reads no text. Or SmoothQuant (Xiao et al. 2023, equation 4), for runtimes that also quantize the inputs of layers.
    The stage tests on each block where the scaling can be undone. One block is in memory at a time. Changed tensors are
    stored in float32.
    """

    version = 2
    packages = ("torch", "transformers", "accelerate", "safetensors")
    requires = frozenset({GENERATES})
    # Rescaled 16-bit weights are stored in float32.
    guarantees = OutputSpec(max_size_ratio=2.05, scales_inputs=True)
    kind: Literal["equalize"] = "equalize"
    strength: float = Field(0.5, gt=0, le=1, description="1: equal magnitude of all columns of a layer; 0.5: halfway")
    smooth_quant: float | None = Field(
        None,
        ge=0,
        le=1,
        description="SmoothQuant's alpha (0.5 in the paper), instead of `strength`: moves the magnitude of "
        "activations on calibration text into the weights",
    )
    samples: int = Field(16, ge=1, le=100_000, description="smooth_quant: calibration sequences from the train split")
    sequence_length: int = Field(512, ge=8, le=131_072, description="smooth_quant: tokens of a sequence")

    def needs(self) -> Requirements:
        """Text of the train split, for SmoothQuant."""
        return Requirements(splits=() if self.smooth_quant is None else ("train",))

    def check_data(self, start: Path, context: Context) -> None:
        """Cut the calibration text into windows."""
        from compress.stages.blockwise.calibration import calibration_sequences

        if self.smooth_quant is not None:
            calibration_sequences(context, Checkpoint(start), self.samples, self.sequence_length)

    def run(self, model: Checkpoint, context: Context) -> Checkpoint:
        """Equalize every block. Raises `StageError`, `DataError` or `ModelError`."""
        from compress.stages.equalize.equalization import equalize_checkpoint

        if self.smooth_quant is None:
            return equalize_checkpoint(model, self.strength, context)
        text = Quantization(samples=self.samples, sequence_length=self.sequence_length, precision="fp32")
        return equalize_checkpoint(model, self.smooth_quant, context, text)
