"""Train a draft head for a language model, for speculative decoding."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from compress.checkpoints.checkpoint import Checkpoint
from compress.checkpoints.head_checkpoint import HeadCheckpoint, heard_blocks
from compress.stage.prediction import SIZE_UNKNOWN, Estimate, PlanContext, Prediction, Shape, predicted
from compress.stage.stage import Context, Stage
from compress.tasks.capability import GENERATES
from compress.training.eagle3_config import HeadTraining
from compress.training.prediction import FLOPS_FORWARD


class Eagle3(HeadTraining, Stage[Checkpoint, HeadCheckpoint]):
    """One block that goes on with a language model's own states (EAGLE-3; Li et al. 2025, section 3).

    Given what the model has at an early, a middle and a late block, and the token that it wrote, the head foretells the
    tokens behind; it learns to by its own states too, as it has nothing else for the second and later ones
    (training-time test). `openvino: {draft_of: ...}` ships it beside the model, and openvino-genai reads several of its
    tokens at once: the answers are the model's own. The folder has the authors' names, which vLLM and SGLang read.
    """

    requires = frozenset({GENERATES})
    kind: Literal["eagle3"] = "eagle3"
    version: ClassVar[int] = 2

    def check_model(self, start: Path) -> None:
        """Raises `StageError` for a model of too few blocks."""
        config = Checkpoint(start).config
        blocks = (config.get("text_config") or config).get("num_hidden_layers")
        if blocks is not None:
            heard_blocks(blocks)

    def check_data(self, start: Path, context: Context) -> None:
        """Cut the text into windows, and see that the model can write. Raises `DataError`."""
        from compress.training.recovery import check_windows

        check_windows(start, self, context)

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """The model reads every window, and writes; the head is small beside it, and what it has is not foretold."""
        if before is None:
            return predicted(None, None, Estimate.unknown(SIZE_UNKNOWN))
        own = self.teacher_writes
        read = self.steps * self.batch_size * self.sequence_length
        written = 0 if own is None else own.tokens(self.sequence_length)
        return predicted(before, None, plan.seconds(FLOPS_FORWARD * (read + written) * before.parameters))

    def run(self, model: Checkpoint, context: Context) -> HeadCheckpoint:
        """Train on the ``train`` split, and what the model writes. Raises `StageError` or `DataError`."""
        from compress.training.eagle3 import train_head

        return train_head(model, self, context)
