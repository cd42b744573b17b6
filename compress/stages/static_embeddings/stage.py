"""Replace a text encoder by one vector per token."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from compress.models.model import TorchModel
from compress.stages.base import AppliesTo, Context, Requirements, Stage
from compress.stages.cost_model import PlanContext, Prediction, Shape, predicted
from compress.stages.training.length import FLOPS_FORWARD
from compress.tasks.capability import (
    ANSWERS_PER_TOKEN,
    DUAL_ENCODER,
    EXPORTED_FROM_CHECKPOINT,
    GENERATES,
    HAS_CLASSES,
    PREDICTS_TOKENS,
    TAKES_PAIRS,
    TAKES_TEXT,
)
from compress.utils.errors import StageError

_TOKENS_OF_TEXT = 3
"""Tokens of a text of one token, with those that the tokenizer puts around it."""


class StaticEmbeddings(Stage[TorchModel, TorchModel]):
    """Replace a text encoder by a table of token vectors, whose mean is the embedding of a text.

    The encoder embeds each token of its vocabulary by itself. The vectors are rotated to their principal components
    (Tulkens and van Dongen 2024), and frequent tokens get a lower weight (Arora et al. 2017). A classifier gets a new
    head, so `distill` must follow. It also improves embeddings, which then need all dimensions of the encoder. Without
    `filters` the model does not know the order of words. Its tokens are those of the encoder; an unknown token has no
    vector.
    """

    packages = ("torch", "transformers", "tokenizers", "numpy")
    requires = frozenset({TAKES_TEXT})
    excludes = frozenset(
        {TAKES_PAIRS, ANSWERS_PER_TOKEN, PREDICTS_TOKENS, DUAL_ENCODER, GENERATES, EXPORTED_FROM_CHECKPOINT}
    )
    required_data = Requirements(splits=("train",))
    kind: Literal["static_embeddings"] = "static_embeddings"
    dimensions: int = Field(256, ge=1, description="dimensions of the vectors, at most those of the encoder")
    sif: float = Field(
        1e-3, ge=0, description="a vector is multiplied by sif / (sif + frequency of its token); 0: no weights"
    )
    whiten: bool = Field(False, description="scale every dimension to the same variance over the vocabulary")
    filters: Annotated[int, AppliesTo(requires=frozenset({HAS_CLASSES}))] = Field(
        0,
        ge=0,
        description="filters of a convolution before the classifier (Kim 2014), which reads word order within its "
        "window; 0: a linear classifier of the mean vector",
    )
    window: Annotated[int, AppliesTo(requires=frozenset({HAS_CLASSES}))] = Field(
        3, ge=1, le=9, description="tokens that a filter reads"
    )

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Return the cost: the encoder reads each token of its vocabulary once."""
        if before is None or not before.hidden:
            return predicted(before, None)
        tokens = before.embeddings / before.hidden
        after = replace(
            before,
            embeddings=tokens * min(self.dimensions, before.hidden),
            attention=0,
            feed_forward=0,
            other=self.dimensions * self.window * self.filters,
            layers=0,
            hidden=self.dimensions,
            tensors=5 if self.filters else 3,
        )
        return predicted(before, after, plan.seconds(FLOPS_FORWARD * before.working * _TOKENS_OF_TEXT * tokens))

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """Return the static model. Raises `StageError` for more dimensions than the encoder has."""
        from compress.stages.static_embeddings.vectors import (
            make_static_model,
            principal_components,
            token_vectors,
            token_weights,
        )

        vectors = token_vectors(model, context.progress)
        if self.dimensions > vectors.shape[1]:
            raise StageError(
                f"static_embeddings: the encoder has {vectors.shape[1]} dimensions, fewer than {self.dimensions}.",
                where="static_embeddings.dimensions",
                expected=f"at most {vectors.shape[1]}",
            )
        components, share = principal_components(vectors, self.dimensions, self.whiten)
        context.note(
            f"static_embeddings: {len(vectors):,} token vectors; {self.dimensions} of {vectors.shape[1]} dimensions "
            f"hold {share:.1%} of their variance"
        )
        weights = token_weights(context.encode("train", model), len(vectors), self.sif)
        return make_static_model(model, components * weights[:, None], self.filters, self.window, context)
