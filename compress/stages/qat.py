"""Train a model through the integers that it will ship with."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from compress.checkpoints.torch_model import TorchModel
from compress.formats.onnx.model import QUANTIZED_GRAPH, OnnxModel
from compress.stage.stage import Context, Needs, Promise, Stage
from compress.targets import find_processor
from compress.training.config import Training

_FOUR_BITS_FROM = 21


class Qat(Training, Stage[TorchModel, OnnxModel]):
    """Quantization-aware training of linear layers and convolutions, the float model teaching meanwhile; gives ONNX.

    Activations are 8-bit with learned steps, weights 8-bit or, with learned steps, 4-bit (LSQ: Esser et al. 2020,
    sections 2.1 to 2.3); batch normalisation is folded before (Jacob et al. 2018, section 3.2). A layer computes in
    training what ONNX Runtime's integer kernel gives, bit for bit. The loss on logits is that of distillation (Hinton
    et al. 2015, section 2).
    """

    packages = ("torch", "transformers", "accelerate", "onnx", "onnx_ir", "onnxscript", "onnxruntime")
    tasks = ("text-classification", "image-classification")
    kind: Literal["qat"] = "qat"
    bits: Literal[4, 8] = Field(8, description="bits of the weights; activations have 8")
    reduce_range: bool | Literal["auto"] = Field(
        "auto",
        description="7-bit weights in place of 8-bit ones, whose products may saturate on x86 processors without VNNI; "
        "auto: unless the processors of all targets add them in 32 bits",
    )
    learning_rate: float = Field(1e-4, gt=0, le=1, description="peak learning rate")
    calibration_examples: int = Field(256, ge=1, description="training examples from which the first steps are taken")
    temperature: float = Field(2.0, gt=0, description="softens both sides of the loss on logits")
    labels_weight: float = Field(0.5, ge=0, le=1, description="share of the task's own loss in the whole")
    format: Literal["qoperator", "qdq"] = Field(
        "qoperator",
        description="products as ONNX Runtime's integer operators, or all as QuantizeLinear and DequantizeLinear "
        "around standard operators, for other runtimes",
    )
    opset: int | None = Field(
        None, ge=17, description="ONNX operator set; 4-bit weights need 21. Default: the exporter's newest"
    )
    tolerance: float = Field(
        0.05,
        gt=0,
        description="largest accepted difference of a probability between training and the exported graph: a rounding "
        "that falls to the other side moves some",
    )

    @model_validator(mode="after")
    def _four_bits_are_known(self) -> Qat:
        if self.bits == 4 and self.opset is not None and self.opset < _FOUR_BITS_FROM:
            raise ValueError(f"opset {_FOUR_BITS_FROM} or newer, since bits: 4 needs integers of 4 bits")
        return self

    def settled(self, sums_in_32_bits: bool) -> Qat:
        """`reduce_range: auto` takes 7 bits where 8 may saturate on a target."""
        return self if self.reduce_range != "auto" else self.model_copy(update={"reduce_range": not sums_in_32_bits})

    def key_fields(self) -> dict[str, Any]:
        """Without `reduce_range` where weights have all their bits, as before there was a choice."""
        fields = super().key_fields()
        return fields if self.narrow else {name: value for name, value in fields.items() if name != "reduce_range"}

    @property
    def narrow(self) -> bool:
        """`reduce_range`; what is left to the processors is decided by this one, where no recipe did."""
        return not find_processor("cpu").sums_in_32_bits if self.reduce_range == "auto" else self.reduce_range

    def needs(self) -> Needs:
        """Labeled training examples."""
        return Needs(splits=("train",))

    def promise(self) -> Promise:
        """Smaller; how much depends on what share of the model its embedding tables are."""
        return Promise(max_size_ratio=0.95)

    def run(self, model: TorchModel, context: Context) -> OnnxModel:
        """Train and export. Raises `StageError`, or `IntegrityError` where the graph computes otherwise."""
        from compress.training.qat_lesson import QatLesson

        graph = QatLesson(self, model, context).teach()
        return OnnxModel(graph, QUANTIZED_GRAPH, model.companions())
