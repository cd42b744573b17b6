"""Train a model through the integers that it will ship with."""

from __future__ import annotations

from typing import Literal

from compress.formats.onnx.model import QUANTIZED_GRAPH, OnnxModel
from compress.models.model import TorchModel
from compress.stages.base import Context, OutputSpec, Requirements, Stage
from compress.stages.cost_model import PlanContext, Prediction, Shape
from compress.stages.qat.settings import QuantizationAwareTraining
from compress.stages.training.length import FLOPS_FORWARD, FLOPS_TRAINING, training_prediction
from compress.tasks.capability import EXPORTED_FROM_CHECKPOINT, HAS_LABELS, VARIABLE_LENGTH


class Qat(QuantizationAwareTraining, Stage[TorchModel, OnnxModel]):
    """Quantization-aware training of linear layers and convolutions, with the float model as teacher; writes ONNX.

    Activations have 8 bits with learned step sizes, weights 8 bits or, with learned step sizes, 4 bits (LSQ: Esser et
    al. 2020, sections 2.1 to 2.3). Batch normalization is folded before (Jacob et al. 2018, section 3.2). In training,
    a layer computes bit for bit what ONNX Runtime's integer kernel computes. The loss on logits is that of distillation
    (Hinton et al. 2015, section 2).
    """

    packages = ("torch", "transformers", "accelerate", "onnx", "onnx_ir", "onnxscript", "onnxruntime")
    requires = frozenset({HAS_LABELS})
    # Of wav2vec2 and its like the exported graph answers otherwise than the model in training.
    excludes = frozenset({EXPORTED_FROM_CHECKPOINT, VARIABLE_LENGTH})
    required_data = Requirements(splits=("train",), labels=True)
    required_data = Requirements(splits=("train",), labels=True)
    # Embedding tables may stay float; their share of the model decides how much smaller the output is.
    guarantees = OutputSpec(max_size_ratio=0.95, integer_graph=True)
    kind: Literal["qat"] = "qat"

    def resolved(self, sums_in_32_bits: bool) -> Qat:
        """`reduce_range: auto` takes 7 bits where 8 may saturate on a target."""
        return self if self.reduce_range != "auto" else self.model_copy(update={"reduce_range": not sums_in_32_bits})

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Every epoch goes forwards and backwards, and the float model answers once."""

        def flops(before: Shape, after: Shape, tokens: float) -> float:
            return FLOPS_TRAINING * after.working * tokens * self.epochs + FLOPS_FORWARD * before.working * tokens

        after = before and before.in_bits(self.bits, 32)
        return training_prediction(self.batch_size, before, after, plan, flops, trained=after)

    def run(self, model: TorchModel, context: Context) -> OnnxModel:
        """Train and export. Raises `StageError`, or `IntegrityError` where the graph computes otherwise."""
        from compress.stages.qat.trainer import QatTrainer

        graph = QatTrainer(self, model, context).train()
        return OnnxModel(graph, QUANTIZED_GRAPH, model.companions())
