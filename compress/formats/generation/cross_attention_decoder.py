"""The opened graph of a decoder behind an encoder, token by token, with its cache (`decoder_model_merged`).

The names are those that transformers.js and optimum agree on, with the prompt and every later token in one graph. Keys
and values of what the encoder gave are made with the prompt and kept; those of the tokens grow.
"""

from __future__ import annotations

import numpy as np

from compress.formats.generation.decoder import PAST, present_of
from compress.formats.runtime import Session, TensorType
from compress.utils.errors import ModelError, StageError

IDS, LOGITS = "input_ids", "logits"
_HIDDEN, _MASK, _CACHED = "encoder_hidden_states", "encoder_attention_mask", "use_cache_branch"


class PairDecoder:
    """Decoder that writes several texts at once, one per row; ``where`` names the model in messages."""

    def __init__(self, session: Session, where: str) -> None:
        """Read the graph's inputs and outputs; raise `ModelError` if it is no decoder of this form."""
        self._session, self._where = session, where
        inputs, outputs = session.input_types, session.output_types
        self._pasts = {name: _heads(kind) for name, kind in inputs.items() if name.startswith(PAST)}
        unknown = inputs.keys() - self._pasts.keys() - {_MASK} ^ {IDS, _HIDDEN, _CACHED}
        missing = [name for name in self._pasts if present_of(name) not in outputs]
        if unknown or missing or not self._pasts or LOGITS not in outputs:
            wrong = ", ".join([*sorted(unknown), *missing]) or "no cache or no logits"
            raise ModelError(
                f"The decoder lacks or adds {wrong}.",
                where=where,
                expected="a decoder of input_ids, encoder_hidden_states, use_cache_branch and "
                "past_key_values.N.decoder.key and so on",
                hint="write the model with the stage onnx",
            )
        self._feed: dict[str, np.ndarray] = {}
        self._past: dict[str, np.ndarray] = {}
        self._begun = False

    def begin(self, hidden: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Start new texts for ``hidden`` [rows, positions, hidden]; ``mask`` [rows, positions] hides some positions."""
        self._feed = {_HIDDEN: hidden} if mask is None else {_HIDDEN: hidden, _MASK: mask}
        self._past = {name: np.zeros([len(hidden), *shape], np.float32) for name, shape in self._pasts.items()}
        self._begun = False

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Return the logits [rows, vocabulary] after ``ids`` [rows, length]; raise the errors of `Session.predict`."""
        logits: np.ndarray = self.read_all(ids)[:, -1]
        return logits

    def read_all(self, ids: np.ndarray) -> np.ndarray:
        """Return the logits [rows, length, vocabulary] after each of ``ids`` [rows, length]."""
        outputs = self._session.predict({IDS: ids, _CACHED: np.array([self._begun]), **self._feed, **self._past})
        # What is of the encoder stays as it was made.
        grown = [name for name in self._past if not self._begun or ".decoder." in name]
        self._past |= {name: outputs[present_of(name)] for name in grown}
        self._begun = True
        return outputs[LOGITS]

    def follow(self, rows: np.ndarray) -> None:
        """Continue with the texts ``rows``, in that order; a row may occur several times."""
        self._feed, self._past = (
            {name: array[rows] for name, array in arrays.items()} for arrays in (self._feed, self._past)
        )

    def finite(self, best: np.floating) -> None:
        """Raise `StageError` if the largest logit is not finite; argmax selects a NaN wherever it is."""
        if not np.isfinite(best):
            raise StageError("The decoder's logits are not finite.", where=self._where, hint="write the model again")


def _heads(kind: TensorType) -> tuple[int, int, int]:
    """Return the shape [heads, 0, size] of an empty cache for an input [batch, heads, past, size]."""
    _, heads, _, size = kind.shape
    assert isinstance(heads, int) and isinstance(size, int), "the writer fixes both"
    return heads, 0, size
