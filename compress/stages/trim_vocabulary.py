"""Drop the tokens that the data never uses."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Literal

from pydantic import Field

from compress.models.model import TorchModel
from compress.stages.base import SEARCH, Context, Requirements, Stage
from compress.stages.cost_model import Estimate, PlanContext, Prediction, Shape, predicted
from compress.tasks.capability import DUAL_ENCODER, EXPORTED_FROM_CHECKPOINT, PREDICTS_TOKENS, TAKES_TEXT

_MANY_MISSING = 0.03
"""Share of removed tokens in new texts from which on the accuracy can suffer."""


class TrimVocabulary(Stage[TorchModel, TorchModel]):
    """Keep the embedding rows that training text uses, and rewrite the tokenizer to match.

    Special tokens and all single characters (bytes, for a byte-level tokenizer) stay, so that unseen text still
    splits into known pieces. Position embeddings beyond the recipe's ``max_length`` are removed too.
    """

    packages = ("torch", "transformers", "tokenizers")
    requires = frozenset({TAKES_TEXT})
    excludes = frozenset({PREDICTS_TOKENS, DUAL_ENCODER, EXPORTED_FROM_CHECKPOINT})
    kind: Literal["trim_vocabulary"] = "trim_vocabulary"
    min_count: int = Field(
        1,
        ge=1,
        description="minimum occurrences of a token in the training text to keep it",
        json_schema_extra={SEARCH: [1, 2, 3, 5]},
    )
    use_unlabeled: bool = Field(False, description="also count the recipe's unlabeled text")
    characters: Literal["all", "seen"] = Field(
        "all",
        description="single-character tokens to keep for unseen text; `seen`: those of the training text and ASCII",
        json_schema_extra={SEARCH: ["all", "seen"]},
    )

    def needs(self) -> Requirements:
        """Return the text whose tokens are counted."""
        return Requirements(splits=("train",), unlabeled=self.use_unlabeled)

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Return the input's shape as an upper bound, since the tokens have not been counted yet."""
        memory = None
        if before is not None:
            memory = Estimate(value=round(8 * before.parameters), note="the model before and after, in fp32")
        note = "at most: the number of removed tokens is known after counting the text"
        return predicted(before, before, memory=memory, disk_note=note)

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """Trim ``model`` in place. Raises `StageError` for a tokenizer that is not supported."""
        size_before = model.module.config.vocab_size
        counts = self._count(model, context)
        size_after = self._trim(model, counts, context.max_length)
        context.note(f"trim_vocabulary: {size_after} of {size_before} tokens kept")
        if (missing := self._missing_share(counts)) > _MANY_MISSING:
            context.note(
                f"trim_vocabulary: about {missing:.0%} of the tokens of new texts were removed, which can lower the "
                "accuracy; leave the stage out, or count more texts (use_unlabeled: true)"
            )
        return model

    def infer_shapes(self, model: TorchModel, context: Context) -> TorchModel:
        """Return the trimmed model; token counts are cached for a text and tokenizer."""
        key_parts = [model.tokenizer.backend_tokenizer.to_str(), context.max_length, self.use_unlabeled]
        key_parts.append(context.data.digest("train", unlabeled=self.use_unlabeled))
        file = context.scratch / f"tokens-{hashlib.sha256(json.dumps(key_parts).encode()).hexdigest()[:16]}.json"
        if file.is_file():
            counts = Counter({int(token): count for token, count in json.loads(file.read_text()).items()})
        else:
            counts = self._count(model, context)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(counts))
        self._trim(model, counts, context.max_length)
        return model

    def _count(self, model: TorchModel, context: Context) -> Counter[int]:
        examples = [context.encode("train", model)]
        unlabeled = context.encode_unlabeled(model) if self.use_unlabeled else None
        examples += [unlabeled] if unlabeled is not None else []
        return Counter(int(token) for part in examples for row in part.inputs for token in row["input_ids"])

    def _missing_share(self, counts: Counter[int]) -> float:
        """Return the estimated share of the tokens of new texts that are removed (Good 1953, equation 2).

        A token that occurs r times in N has the expected probability (r + 1) n(r + 1) / (n(r) N) in new texts, with
        n(r) tokens that occur r times. The sum over all removed r is the share of tokens up to `min_count`.
        """
        return sum(count for count in counts.values() if count <= self.min_count) / max(counts.total(), 1)

    def _trim(self, model: TorchModel, counts: Counter[int], max_length: int) -> int:
        """Cut ``model`` in place; how many tokens are left."""
        from compress.models.vocabulary import trim, trim_positions

        used = {token for token, count in counts.items() if count >= self.min_count}
        size_after = trim(model, used, self.characters == "all")
        trim_positions(model, max_length)
        return len(size_after)
