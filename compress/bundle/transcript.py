"""What an encoder of recordings gives -> text, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compress.bundle.kind import Answers, Rounding
from compress.bundle.manifest import MODEL_FOLDER, TensorRecord
from compress.bundle.steps import Transcribe
from compress.formats.onnx.model import find_graphs
from compress.numerics.word_errors import word_errors
from compress.runtimes.runtime import Batch, Session
from compress.runtimes.transcriber import HIDDEN, TRANSCRIPTS, read_rules


def _find_end(model: Path, outputs: Sequence[TensorRecord]) -> Transcribe:
    """As the generation config says, by the rules that the model was judged by."""
    rules, (_, decoder) = read_rules(model), find_graphs(model)
    return Transcribe(
        output=HIDDEN,
        decoder=f"{MODEL_FOLDER}/{decoder.relative_to(model).as_posix()}",
        tokenizer=f"{MODEL_FOLDER}/tokenizer.json",
        prompt_ids=rules.prompt,
        end_ids=tuple(sorted(rules.ends)),
        never_ids=tuple(rules.never.tolist()),
        not_first_ids=tuple(rules.not_first.tolist()),
        max_length=rules.longest,
    )


def _ask(session: Session, end: Transcribe, feed: Batch, known: str) -> str:
    return str(session.predict(feed)[TRANSCRIPTS][0])


def _span(found: Sequence[str]) -> float:
    """All words of a text."""
    return 1.0


def _apart(found: str, known: str) -> float:
    """The share of words that are others."""
    return word_errors(known.split(), found.split()) / max(1, len(known.split()))


TRANSCRIPTS_OF_SPEECH = Answers(
    many="transcripts",
    field="transcript",
    folder="transcript",
    meanings={HIDDEN: "what the decoder reads of the recording"},
    required=frozenset({HIDDEN}),
    # The share of words. With integers a token that was nearly as likely may come first.
    rounding=(Rounding(0.01), Rounding(0.2)),
    find_end=_find_end,
    ask=_ask,
    span=_span,
    apart=_apart,
    shown=repr,
)
