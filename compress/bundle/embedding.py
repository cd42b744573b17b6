"""Vectors of a text's tokens -> its embedding, as the model's folder says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from compress.bundle import numbers
from compress.bundle.kind import Rounding
from compress.bundle.manifest import TensorRecord
from compress.bundle.numbers import Numbers
from compress.bundle.steps import Embed, Postprocessing
from compress.checkpoints.sentence_modules import MODULES, Normalize, SentenceModules, has_modules, read_modules
from compress.errors import ModelError
from compress.runtimes.runtime import Batch, Session
from compress.tasks.task import LAST_HIDDEN_STATE, SENTENCE_EMBEDDING

_POOLED = {
    "mean": "the mean of its tokens' vectors",
    "cls": "the vector of its first token",
    "max": "the largest of each of its tokens' values",
    "lasttoken": "the vector of its last token",
}
_KOTLIN = {
    None: "values",
    "mean": "FloatArray(dimensions) { at -> "
    "(at until values.size step dimensions).map { values[it] }.average().toFloat() }",
    "cls": "values.copyOf(dimensions)",
    "max": "FloatArray(dimensions) { at -> (at until values.size step dimensions).maxOf { values[it] } }",
    "lasttoken": "values.copyOfRange(values.size - dimensions, values.size)",
}
_SWIFT = {
    None: "values",
    "mean": "(0..<count).map { at in stride(from: at, to: values.count, by: count).map { values[$0] }.reduce(0, +) "
    "* Float(count) / Float(values.count) }",
    "cls": "Array(values.prefix(count))",
    "max": "(0..<count).map { at in stride(from: at, to: values.count, by: count).map { values[$0] }.max()! }",
    "lasttoken": "Array(values.suffix(count))",
}


class _Embeddings:
    """One vector a text."""

    many = "embeddings"
    field = "embedding"
    folder = "embedding"
    meanings: Mapping[str, str] = {
        LAST_HIDDEN_STATE: "one vector a token",
        SENTENCE_EMBEDDING: "the finished embedding",
    }
    required: frozenset[str] = frozenset()

    def find_end(self, model: Path, outputs: Sequence[TensorRecord]) -> Embed:
        """See `Answers`: pooling and normalisation are those of `modules.json`, unless the graph has them in it."""
        if not has_modules(model):
            raise ModelError(
                f"There is no {MODULES}, which says how the vectors of a text's tokens become one.",
                where=str(model),
                mend="export the model with `compress`, or save it with sentence-transformers",
            )
        modules, names = read_modules(model), [entry.name for entry in outputs]
        if not {SENTENCE_EMBEDDING, LAST_HIDDEN_STATE} & set(names):
            raise ModelError(
                f"The model gives {', '.join(names)}.",
                where=str(model),
                expected=f"{SENTENCE_EMBEDDING} or {LAST_HIDDEN_STATE}",
            )
        if SENTENCE_EMBEDDING in names:
            return Embed(output=SENTENCE_EMBEDDING, pooling=None, normalize=False, dimensions=modules.dimensions)
        mode, normalize = _simple(modules, model)
        return Embed.model_validate(
            {
                "output": LAST_HIDDEN_STATE,
                "pooling": mode,
                "normalize": normalize,
                "dimensions": modules.dimensions,
            }
        )

    def rounding(self, integers: bool) -> Rounding:
        """See `Answers`: with integers, a text of two tokens came out with a cosine of 0.985 in a page."""
        return Rounding(0.1, 0.97) if integers else Rounding(1e-3, 0.9999)

    def ask(self, session: Session, end: Postprocessing, feed: Batch, known: Numbers) -> Numbers:
        """The embedding."""
        assert isinstance(end, Embed)
        found = _pooled(session.predict(feed)[end.output][0], end)
        if found.shape != (end.dimensions,):
            raise ModelError(
                f"The graph gives an embedding of shape {list(found.shape)}.",
                expected=f"{end.dimensions} values, as {MODULES} says",
            )
        return numbers.seven_figures(found / np.linalg.norm(found) if end.normalize else found)

    def span(self, found: Sequence[Numbers]) -> float:
        """See `Answers`."""
        return numbers.span(found)

    def apart(self, found: Numbers, known: Numbers) -> float:
        """See `Answers`."""
        return numbers.apart(found, known)

    def shown(self, answer: Numbers) -> str:
        """See `Answers`."""
        return numbers.shown(answer)

    def in_code(self, end: Postprocessing) -> dict[str, str]:
        """The pooling, as an expression of the graph's values, token after token."""
        assert isinstance(end, Embed)
        return {
            "dimensions": str(end.dimensions),
            "normalize": str(end.normalize).lower(),
            "pooled_kotlin": _KOTLIN[end.pooling],
            "pooled_swift": _SWIFT[end.pooling],
        }

    def in_words(self, end: Postprocessing) -> tuple[str, str]:
        """See `Answers`."""
        assert isinstance(end, Embed)
        how = "as the graph gives it" if end.pooling is None else _POOLED[end.pooling]
        length = ", brought to length 1" if end.normalize else ""
        return (
            f"gets an embedding of {end.dimensions} values: {how}{length}. Texts are near where their cosine is large",
            "A cosine ranks texts; it says which is nearest, and not whether any is near.",
        )


EMBEDDINGS = _Embeddings()


def _simple(modules: SentenceModules, model: Path) -> tuple[str, bool]:
    """The one pooling and whether a normalisation follows. Raises `ModelError` for what is more than that."""
    [mode, *more] = modules.modes
    kinds = [type(step) for step in modules.steps]
    if more or mode not in _POOLED or kinds not in ([], [Normalize]):
        steps = ", ".join((f"pooling by {' and '.join(modules.modes)}", *(kind.__name__ for kind in kinds)))
        raise ModelError(
            f"An app would have to compute what follows the graph: {steps}.",
            where=str(model / MODULES),
            expected=f"pooling by one of {', '.join(_POOLED)}, then perhaps Normalize",
            mend="export: {sentence_embedding: true} has the graph compute it, for a mean or the first token",
        )
    return mode, bool(kinds)


def _pooled(values: np.ndarray, end: Embed) -> np.ndarray:
    """Of [tokens, dimensions], or of a finished embedding."""
    if end.pooling is None:
        return values
    if end.pooling == "mean":
        return cast(np.ndarray, values.mean(axis=0))
    return cast(np.ndarray, values.max(axis=0) if end.pooling == "max" else values[0 if end.pooling == "cls" else -1])
