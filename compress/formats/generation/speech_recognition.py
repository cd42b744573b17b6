"""Speech recognition with two opened graphs, encoder and decoder: always the likeliest token."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.formats.generation.seq2seq import PairDecoder, TextWriter, padded_sequences, said_of, token_ids
from compress.formats.runtime import Batch, Session, TensorType, check_inputs
from compress.models.json_file import wrong_fields
from compress.models.processor import read_tokenizer
from compress.utils.errors import InputError, ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


GENERATION_CONFIG = "generation_config.json"
_POSITIONS = 448
_LANGUAGE, _TASK = "en", "transcribe"
"""Language and task for a multilingual model whose generation config names none."""


@dataclass(frozen=True)
class SpeechRules:
    """Greedy transcription, as transformers' `generate` does it without timestamps.

    ``prompt`` are the tokens that each window begins with; ``ends`` end it. Tokens ``never`` are not said, and those
    of ``not_first`` not at once. ``longest`` counts the prompt.
    """

    prompt: tuple[int, ...]
    ends: tuple[int, ...]
    never: np.ndarray
    not_first: np.ndarray
    longest: int


def read_rules(folder: Path) -> SpeechRules:
    """Return the rules of a folder's generation_config.json and config.json; raise `ModelError` if they are invalid."""
    with wrong_fields(folder / GENERATION_CONFIG):
        return _rules(folder, said_of(folder))


def _rules(folder: Path, config: Mapping[str, Any]) -> SpeechRules:
    start, ends = config.get("decoder_start_token_id"), token_ids(config.get("eos_token_id"))
    if start is None or not ends:
        raise ModelError(
            "Nothing says with which token a transcript begins and ends.",
            where=str(folder / GENERATION_CONFIG),
            expected="decoder_start_token_id and eos_token_id",
            hint=f"copy {GENERATION_CONFIG} of the model that the graphs were made of",
        )
    prompt = (start, *_after_start(config, folder))
    positions = config.get("max_target_positions") or _POSITIONS
    never, not_first = (
        np.array(token_ids(config.get(key)), dtype=np.int64) for key in ("suppress_tokens", "begin_suppress_tokens")
    )
    return SpeechRules(
        prompt=token_ids(list(prompt)),
        ends=ends,
        never=never,
        not_first=not_first,
        # transformers' `generate` counts the prompt on top of max_length.
        longest=operator.index(min(positions, (config.get("max_length") or _POSITIONS) + len(prompt))),
    )


def _after_start(said: Mapping[str, Any], folder: Path) -> list[int]:
    """Return the language and task tokens of a multilingual model, and the no-timestamps token if there is one."""
    prompt = []
    if said.get("is_multilingual"):
        names = (f"<|{said.get('language') or _LANGUAGE}|>", said.get("task") or _TASK)
        for name, key in zip(names, ("lang_to_id", "task_to_id"), strict=True):
            ids = said.get(key) or {}
            if name not in ids:
                raise ModelError(
                    f"The model has no {name!r}.",
                    where=str(folder / GENERATION_CONFIG),
                    expected=f"one of {', '.join(ids) or 'none'}, as {key} has them",
                )
            prompt.append(ids[name])
    if (silent := said.get("no_timestamps_token_id")) is not None:
        prompt.append(silent)
    return prompt


FEATURES, HIDDEN = "input_features", "last_hidden_state"
SEQUENCES, TRANSCRIPTS = "sequences", "transcripts"
_TOKENIZER = "tokenizer.json"


class Transcriber:
    """Session that transcribes audio; a recording longer than the encoder's window is split into windows."""

    inputs = (FEATURES,)
    output_types = {SEQUENCES: TensorType("int64", (None, None)), TRANSCRIPTS: TensorType("str", (None,))}

    def __init__(self, encoder: Session, decoder: Session, folder: Path) -> None:
        """Read the tokenizer and the generation config of ``folder``; raise `ModelError` for graphs of another kind."""
        self.encoder, self._where = encoder, str(folder)
        self._decoder = PairDecoder(decoder, self._where)
        self._rules = read_rules(folder)
        self._tokenizer = _tokenizer(folder)
        # The encoder's window has a fixed number of features and frames.
        shape = encoder.input_types[FEATURES].shape if FEATURES in encoder.input_types else ()
        fixed = [axis for axis in shape[1:] if isinstance(axis, int)]
        if len(shape) != 3 or len(fixed) != 2 or HIDDEN not in encoder.output_types:
            raise ModelError(
                f"The graphs cannot transcribe: the encoder has the inputs {dict(encoder.input_types)}.",
                where=self._where,
                expected="an encoder from input_features to last_hidden_state, and its decoder",
                hint="write the model with the stage onnx",
            )
        self._shape = (fixed[0], fixed[1])
        self.input_types = {FEATURES: TensorType("float32", (None, self._shape[0], None))}
        self.provider = encoder.provider
        self.settings: dict[str, Any] = {**encoder.settings, "decoding": "greedy"}

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """Return the `sequences` and `transcripts` [n] of `input_features` [n, bins, windows * frames].

        `sequences` [n, longest] are tokens, padded with -1. Raises `InputError` for features of another shape, and the
        errors of the graphs.
        """
        check_inputs(self.inputs, batch, self._where)
        features = np.asarray(batch[FEATURES], np.float32)
        bins, frames = self._shape
        if features.ndim != 3 or features.shape[1] != bins or features.shape[2] % frames or not features.size:
            raise InputError(
                f"{FEATURES} has the shape {list(features.shape)}.",
                where=self._where,
                expected=f"[n, {bins}, a multiple of {frames}], as the model's feature extractor gives them",
            )
        windows = [np.split(row, row.shape[1] // frames, axis=1) for row in features]
        rows = [[token for window in row for token in self.tokens(np.ascontiguousarray(window))] for row in windows]
        return {SEQUENCES: padded_sequences(rows), TRANSCRIPTS: np.array([self.text(row) for row in rows])}

    def tokens(self, window: np.ndarray) -> list[int]:
        """Return the tokens of one window [features, frames], without the prompt and the end token."""
        rules, tokens = self._rules, []
        ids = list(rules.prompt)
        self._decoder.begin(self.encode(window))
        for position in range(rules.longest - len(rules.prompt)):
            allowed = self._decoder.read(np.array([ids]))[0].copy()
            allowed[rules.never] = -np.inf
            if position == 0:
                allowed[rules.not_first] = -np.inf
            token = int(allowed.argmax())
            self._decoder.finite(allowed[token])
            if token in rules.ends:
                break
            tokens.append(token)
            ids = [token]
        return tokens

    def text(self, tokens: list[int]) -> str:
        """Return the tokens as text."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()

    def encode(self, window: np.ndarray) -> np.ndarray:
        """Return the encoder's output [1, positions, hidden] for one window [features, frames]."""
        return self.encoder.predict({FEATURES: window[np.newaxis]})[HIDDEN]


def _tokenizer(folder: Path) -> Tokenizer:
    if not (folder / _TOKENIZER).is_file():
        raise ModelError(
            f"The model folder has no {_TOKENIZER}.",
            where=str(folder),
            expected="the tokenizer beside the graphs",
            hint="write it with save_pretrained of the model's tokenizer",
        )
    return read_tokenizer(folder / _TOKENIZER)


def open_pair(encoder: Session, decoder: Session, folder: Path) -> Session:
    """Return a session for an encoder and its decoder: a transcriber of recordings, or a writer of text."""
    if FEATURES in encoder.input_types:
        return Transcriber(encoder, decoder, folder)
    return TextWriter(encoder, decoder, folder)
