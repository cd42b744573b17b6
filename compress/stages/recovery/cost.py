"""Cost of recovering a quantized model."""

from __future__ import annotations

from compress.stages.cost_model import SIZE_UNKNOWN, Estimate, PlanContext, Prediction, Shape, predicted
from compress.stages.recovery.settings import Recovery
from compress.stages.training.cost import FLOPS_FORWARD, FLOPS_TRAINING


def recovery_prediction(settings: Recovery, before: Shape | None, plan: PlanContext) -> Prediction:
    """Return the cost: student and teacher on every sequence; the student is judged twice, the teacher once."""
    if before is None:
        return predicted(None, None, Estimate.unknown(SIZE_UNKNOWN))
    judged = 3 * settings.validation_windows * FLOPS_FORWARD
    learned = settings.steps * settings.batch_size * (FLOPS_TRAINING + FLOPS_FORWARD)
    own = settings.teacher_writes
    written = 0 if own is None else FLOPS_FORWARD * own.tokens(settings.sequence_length)
    flops = ((judged + learned) * settings.sequence_length + written) * before.parameters
    return predicted(before, before, plan.seconds(flops))
