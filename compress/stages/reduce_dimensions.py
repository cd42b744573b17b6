"""Fewer dimensions of an embedding, by a rotation that is learned from text."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.models.model import TorchModel
from compress.stages.base import Context, Requirements, Stage
from compress.stages.protocols import KeepsShape
from compress.tasks.capability import EMBEDS, TAKES_TEXT
from compress.utils.errors import StageError


class ReduceDimensions(KeepsShape, Stage[TorchModel, TorchModel]):
    """Rotate embeddings to their principal components (not centered) and keep the first dimensions.

    The rotation is a linear layer before the final normalization: a module `Dense` of sentence-transformers, or, with
    `onnx: {sentence_embedding: true}`, a part of the graph. It saves bytes of the index, and time per comparison.
    """

    packages = ("torch", "numpy")
    requires = frozenset({EMBEDS, TAKES_TEXT})
    required_data = Requirements(splits=("train",))
    kind: Literal["reduce_dimensions"] = "reduce_dimensions"
    dimensions: int = Field(ge=1, description="dimensions of the reduced embedding")
    examples: int = Field(10_000, ge=2, description="maximum number of training texts for the rotation")

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """Put the rotation at the end of ``model``'s modules, in place. Raises `StageError` for too many dimensions."""
        import numpy as np

        from compress.models.sentence_modules import Dense
        from compress.numerics.embeddings import principal_rotation, retained_share
        from compress.tasks.inference import predict

        modules = model.processor.modules
        if self.dimensions >= modules.dimensions:
            raise StageError(
                f"reduce_dimensions: {self.dimensions} of {modules.dimensions} dimensions leaves all of them.",
                where="reduce_dimensions.dimensions",
                expected=f"less than {modules.dimensions}",
            )
        examples = context.encode("train", model)
        order = np.random.default_rng(context.seed).permutation(len(examples))[: self.examples]
        chosen = examples.subset(np.sort(order))
        if len(chosen) < self.dimensions:
            raise StageError(
                f"reduce_dimensions: {len(chosen)} training texts do not span {self.dimensions} dimensions.",
                expected="as many texts as dimensions, better ten times as many",
                hint="give more training text, or keep fewer dimensions",
            )
        embeddings = predict(model.module, chosen)
        rotation = principal_rotation(embeddings, self.dimensions)
        retained = retained_share(embeddings, rotation)
        context.note(f"reduce_dimensions: {self.dimensions} of {modules.dimensions} hold {retained:.1%}")
        model.processor.modules = modules.followed_by(Dense(rotation))
        return model
