"""What an encoder of recordings gives -> text, token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from compress.bundle.kind import Rounding
from compress.bundle.manifest import MODEL_FOLDER, TensorRecord
from compress.bundle.steps import Postprocessing, Transcribe
from compress.formats.onnx.model import find_graphs
from compress.numerics.word_errors import word_errors
from compress.runtimes.runtime import Batch, Session
from compress.runtimes.speech_rules import read_rules
from compress.runtimes.transcriber import HIDDEN, TRANSCRIPTS


class _Transcripts:
    """What is said."""

    many = "transcripts"
    field = "transcript"
    folder = "transcript"
    meanings: Mapping[str, str] = {HIDDEN: "what the decoder reads of the recording"}
    required = frozenset(meanings)

    def find_end(self, model: Path, outputs: Sequence[TensorRecord]) -> Transcribe:
        """See `Answers`: as the generation config says, by the rules that the model was judged by."""
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

    def rounding(self, integers: bool) -> Rounding:
        """See `Answers`: the share of words. With integers a token that was nearly as likely may come first."""
        return Rounding(0.2 if integers else 0.01)

    def ask(self, session: Session, end: Postprocessing, feed: Batch, known: str) -> str:
        """The transcript."""
        return str(session.predict(feed)[TRANSCRIPTS][0])

    def span(self, found: Sequence[str]) -> float:
        """All words of a text."""
        return 1.0

    def apart(self, found: str, known: str) -> float:
        """The share of words that are others."""
        return word_errors(known.split(), found.split()) / max(1, len(known.split()))

    def shown(self, answer: str) -> str:
        """See `Answers`."""
        return repr(answer)

    def in_code(self, end: Postprocessing) -> dict[str, str]:
        """Nothing: no snippet is written for phones."""
        return {}

    def in_words(self, end: Postprocessing) -> tuple[str, str]:
        """See `Answers`."""
        return "gets what is said in it", "Where nothing is said, it makes words up."


TRANSCRIPTS_OF_SPEECH = _Transcripts()
