"""Set single weights to zero."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from compress.models.checkpoint import Checkpoint
from compress.models.model import TorchModel
from compress.stages.base import Context, OutputSpec, Requirements, Stage
from compress.stages.cost_model import PlanContext, Prediction, Shape
from compress.stages.protocols import KeepsShape
from compress.stages.prune_decoder.settings import decoder_sparsity_prediction
from compress.stages.sparsify.settings import DecoderSparsity, GradualSparsity, Sparsity
from compress.stages.training.length import FLOPS_TRAINING, training_prediction
from compress.tasks.capability import EXPORTED_FROM_CHECKPOINT, GENERATES, HAS_LABELS


class Sparsify(Sparsity, KeepsShape, Stage[TorchModel, TorchModel]):
    """Unstructured pruning by magnitude: the smallest weights of convolutions and linear layers become zero.

    Zeros can follow a pattern, N of every M (Mishra et al. 2021, section 3). The first convolution, depthwise
    convolutions and the head stay dense.
    """

    packages = ("torch", "transformers", "accelerate")
    requires = frozenset({HAS_LABELS})
    excludes = frozenset({EXPORTED_FROM_CHECKPOINT})
    guarantees = OutputSpec(sparse=True)
    kind: Literal["sparsify"] = "sparsify"

    def infer_shapes(self, model: TorchModel, context: Context) -> TorchModel:
        """Return the model itself."""
        return model

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """Set weights of ``model`` to zero in place. Raises `StageError` for layers that the pattern does not fit."""
        from compress.stages.sparsify.magnitude import sparsify

        sparsify(model, self, context)
        return model


class SparsifyGradually(GradualSparsity, Stage[TorchModel, TorchModel]):
    """Unstructured pruning by magnitude while training, along a cubic schedule (Zhu and Gupta 2017, section 3).

    The smallest weights of convolutions and linear layers become zero, more of them with each step. Zeros can follow a
    pattern, as in `sparsify`. The result is the last epoch, since earlier ones are less sparse.
    """

    packages = ("torch", "transformers", "accelerate")
    requires = frozenset({HAS_LABELS})
    excludes = frozenset({EXPORTED_FROM_CHECKPOINT})
    required_data = Requirements(splits=("train",), labels=True)
    required_data = Requirements(splits=("train",), labels=True)
    guarantees = OutputSpec(sparse=True)
    kind: Literal["sparsify_gradually"] = "sparsify_gradually"

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Return the cost of the training."""

        def flops(before: Shape, after: Shape, tokens: float) -> float:
            return FLOPS_TRAINING * after.working * tokens * self.epochs

        return training_prediction(self.batch_size, before, before, plan, flops, trained=before)

    def infer_shapes(self, model: TorchModel, context: Context) -> TorchModel:
        """Return the model itself."""
        return model

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """Train and prune ``model`` in place. Raises `StageError` for layers that the pattern does not fit."""
        from compress.stages.sparsify.magnitude import sparsify

        sparsify(model, self, context)
        return model


class SparsifyDecoder(DecoderSparsity, Stage[Checkpoint, Checkpoint]):
    """Unstructured pruning of a language model, one block in memory at a time.

    Weights of the blocks' linear layers become zero by magnitude, by Wanda (Sun et al. 2023, section 3) or by SparseGPT
    (Frantar and Alistarh 2023, section 3). Zeros can follow a pattern, N of every M.
    """

    packages = ("torch", "transformers", "accelerate")
    requires = frozenset({GENERATES})
    uses_device = True
    guarantees = OutputSpec(sparse=True)
    kind: Literal["sparsify_decoder"] = "sparsify_decoder"

    def needs(self) -> Requirements:
        """Return the training split, unless magnitudes alone decide."""
        return Requirements(splits=() if self.method == "magnitude" else ("train",))

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Return the cost of one pass over the calibration text."""
        return decoder_sparsity_prediction(self, before, plan)

    def check_model(self, start: Path) -> None:
        """Raise `StageError` for layers that the pattern does not fit."""
        from compress.stages.sparsify.decoder import check_sparsifiable

        check_sparsifiable(Checkpoint(start), self)

    def infer_shapes(self, model: Checkpoint, context: Context) -> Checkpoint:
        """Return the model itself."""
        return model

    def run(self, model: Checkpoint, context: Context) -> Checkpoint:
        """Write the sparse model into other files, which one process does for all."""
        from compress.stages.sparsify.decoder import sparsify_checkpoint
        from compress.stages.training.processes import is_first

        return sparsify_checkpoint(model, self, context) if is_first() else model
