"""Settings of quantization-aware training. Importing this imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from compress.formats.target_profile import find_processor
from compress.stages.training.settings import KEEP_BEST, Training

_FOUR_BITS_FROM = 21


class QuantizationAwareTraining(Training):
    """A training through integers, with the float model as the teacher, and the graph that they are written into."""

    bits: Literal[4, 8] = Field(8, description="bits of the weights; activations have 8 bits")
    reduce_range: bool | Literal["auto"] = Field(
        "auto",
        description="7-bit weights instead of 8-bit weights, whose products may saturate on x86 processors without "
        "VNNI; auto: only if a target's processor may saturate",
    )
    learning_rate: float = Field(1e-4, gt=0, le=1, description="peak learning rate")
    calibration_examples: int = Field(256, ge=1, description="training examples that initialize the activation ranges")
    temperature: float = Field(2.0, gt=0, description="temperature of the loss on logits")
    labels_weight: float = Field(0.5, ge=0, le=1, description="weight of the task's own loss on labels")
    format: Literal["qoperator", "qdq"] = Field(
        "qoperator",
        description="ONNX Runtime's integer operators, or QuantizeLinear and DequantizeLinear around standard "
        "operators for other runtimes",
    )
    keep_best: bool = KEEP_BEST
    opset: int | None = Field(
        None,
        ge=17,
        description="ONNX operator set; 4-bit weights need 21. Default: the newest one that the exporter supports",
    )
    tolerance: float = Field(
        0.05,
        gt=0,
        description="maximum difference of a probability between the trained model and the exported graph, as some "
        "roundings may differ",
    )

    @model_validator(mode="after")
    def _four_bits_are_known(self) -> Self:
        if self.bits == 4 and self.opset is not None and self.opset < _FOUR_BITS_FROM:
            raise ValueError(f"opset {_FOUR_BITS_FROM} or newer, since bits: 4 needs integers of 4 bits")
        return self

    @property
    def narrow(self) -> bool:
        """`reduce_range`; what is left to the processors is decided by this one, where no recipe did."""
        return not find_processor("cpu").sums_in_32_bits if self.reduce_range == "auto" else self.reduce_range
