"""What an encoder gives -> text, token by token: what a recording says, or another text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from compress.formats.generation import seq2seq
from compress.formats.generation.speech_recognition import HIDDEN, TRANSCRIPTS, read_rules
from compress.formats.onnx.model import find_graphs
from compress.formats.runtime import Batch, Session
from compress.numerics.token_metrics import word_errors
from compress.plugins.apps.app_type import Answers, Rounding
from compress.plugins.apps.manifest import MODEL_FOLDER, TensorRecord
from compress.plugins.apps.postprocess import Rewrite, Transcribe
from compress.utils.errors import ModelError


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
    plural="transcripts",
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


def _find_rewrite(model: Path, outputs: Sequence[TensorRecord]) -> Rewrite:
    """As the generation config says. Raises `ModelError` for what is not the likeliest token each time."""
    rules, (_, decoder) = seq2seq.read_rules(model), find_graphs(model)
    if rules.beams > 1 or rules.no_repeat or rules.shortest > 1:
        raise ModelError(
            "The model writes by beam search, or with penalties, which an app does not.",
            where=str(model / "generation_config.json"),
            expected="the likeliest token each time: no num_beams above 1, no_repeat_ngram_size or min_length",
            hint="set them so in generation_config.json, and evaluate the model anew: it writes otherwise then",
        )
    return Rewrite(
        output=seq2seq.HIDDEN,
        decoder=f"{MODEL_FOLDER}/{decoder.relative_to(model).as_posix()}",
        tokenizer=f"{MODEL_FOLDER}/tokenizer.json",
        prompt_ids=(rules.start,) if rules.first is None else (rules.start, rules.first),
        end_ids=rules.ends,
        never_ids=rules.never,
        last_ids=rules.last,
        max_length=rules.longest,
    )


def _ask_rewrite(session: Session, end: Rewrite, feed: Batch, known: str) -> str:
    return str(session.predict(feed)[seq2seq.TEXTS][0])


WRITTEN_TEXTS = replace(
    TRANSCRIPTS_OF_SPEECH,
    plural="texts",
    field="written",
    meanings={seq2seq.HIDDEN: "what the decoder reads of the text"},
    find_end=_find_rewrite,
    ask=_ask_rewrite,
)
