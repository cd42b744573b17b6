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


def _find_transcription(model: Path, outputs: Sequence[TensorRecord]) -> Transcribe:
    """Return the step for greedy decoding with the token rules of the generation config."""
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


def _predict_transcript(session: Session, step: Transcribe, feed: Batch, known: str) -> str:
    return str(session.predict(feed)[TRANSCRIPTS][0])


def _word_span(predicted: Sequence[str]) -> float:
    """Return 1, since the tolerance is a share of all words."""
    return 1.0


def _word_error_rate(predicted: str, known: str) -> float:
    """Return the word error rate."""
    return word_errors(known.split(), predicted.split()) / max(1, len(known.split()))


TRANSCRIPTS_OF_SPEECH = Answers(
    plural="transcripts",
    field="transcript",
    folder="transcript",
    meanings={HIDDEN: "what the decoder reads of the recording"},
    required=frozenset({HIDDEN}),
    # The share of words. With integers a token that was nearly as likely may come first.
    rounding=(Rounding(0.01), Rounding(0.2)),
    find_postprocessing=_find_transcription,
    predict=_predict_transcript,
    span=_word_span,
    difference=_word_error_rate,
    shown=repr,
)


def _find_rewrite(model: Path, outputs: Sequence[TensorRecord]) -> Rewrite:
    """Return the step for greedy decoding with the token rules of the generation config.

    Raises:
        ModelError: The model needs beam search or penalties.
    """
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


def _predict_rewrite(session: Session, step: Rewrite, feed: Batch, known: str) -> str:
    return str(session.predict(feed)[seq2seq.TEXTS][0])


WRITTEN_TEXTS = replace(
    TRANSCRIPTS_OF_SPEECH,
    plural="texts",
    field="written",
    meanings={seq2seq.HIDDEN: "what the decoder reads of the text"},
    find_postprocessing=_find_rewrite,
    predict=_predict_rewrite,
)
