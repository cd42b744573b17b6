"""Cost of recovering a quantized model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from compress.models.checkpoint import Checkpoint, QuantizedCheckpoint
from compress.stages.base import Context, OutputSpec, Stage
from compress.stages.cost_model import SIZE_UNKNOWN, Estimate, PlanContext, Prediction, Shape, predicted
from compress.stages.recovery.settings import AdapterTraining, Recovery, ScaleTuning
from compress.stages.training.length import FLOPS_FORWARD, FLOPS_TRAINING
from compress.tasks.capability import GENERATES


class Recovers(Recovery, Stage[QuantizedCheckpoint, QuantizedCheckpoint]):
    """Base of stages in which a quantized checkpoint is trained on sequences of text."""

    requires = frozenset({GENERATES})

    def check_data(self, start: Path, context: Context) -> None:
        """Split the text into sequences. Raises `DataError` for too little text."""
        from compress.stages.recovery.trainer import recovery_sequences

        recovery_sequences(Checkpoint(start), self, context)

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Return the cost; every step runs student and teacher, and the files keep their size."""
        if before is None:
            return predicted(None, None, Estimate.unknown(SIZE_UNKNOWN))
        # The student is judged twice, the teacher once.
        judged = 3 * self.validation_windows * FLOPS_FORWARD
        learned = self.steps * self.batch_size * (FLOPS_TRAINING + FLOPS_FORWARD)
        return predicted(before, before, plan.seconds((judged + learned) * self.sequence_length * before.parameters))


class TuneScales(ScaleTuning, Recovers):
    """Train the scales end to end; integers do not change, so size and format of the files stay the same.

    The second phase of EfficientQAT (Chen et al. 2024, section 3.3). It also trains norms, as NormTweaking does (Li et
    al. 2023), and embedding tables. The loss is the KL divergence from the model before quantization, so that the
    content of the text is not learned; the paper's own loss, that of the text, has the weight ``labels_weight``.
    Training computes with the float16 values that the file will store.
    """

    guarantees = OutputSpec(changes_weights=False, max_size_ratio=1.001)
    kind: Literal["tune_scales"] = "tune_scales"

    def run(self, model: QuantizedCheckpoint, context: Context) -> QuantizedCheckpoint:
        """Train on the ``train`` split; where that does not help, the model stays as it was, and that is told."""
        from compress.stages.recovery.quantized_recovery import tune_scales

        return tune_scales(model, self, context)


class LoraRecovery(AdapterTraining, Recovers):
    """Train a low-rank adapter on the frozen quantized model (QLoRA: Dettmers et al. 2023, section 3).

    It learns the predictions of the model before quantization. The quantized weights do not change. The peft adapter is
    written to the folder `adapter/` of the checkpoint: `PeftModel.from_pretrained(model, "CHECKPOINT/adapter")` applies
    it to the quantized model.
    """

    packages = ("torch", "transformers", "accelerate", "peft")
    guarantees = OutputSpec(changes_weights=False, adapter_beside=True)
    kind: Literal["lora_recovery"] = "lora_recovery"

    def run(self, model: QuantizedCheckpoint, context: Context) -> QuantizedCheckpoint:
        """Train on the ``train`` split. Raises `StageError` where it does not help."""
        from compress.stages.recovery.quantized_recovery import train_adapter

        return train_adapter(model, self, context)
