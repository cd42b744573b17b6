"""Answers to images and texts with three opened graphs, always the likeliest token: what sees, a table, and a decoder.

The names are transformers.js': `vision_encoder` makes `image_features` of `pixel_values`, `embed_tokens` makes
`inputs_embeds` of `input_ids`, and `decoder_model_merged` reads these, the features in place of the image's tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.formats.generation import seq2seq
from compress.formats.generation.decoder import PAST, present_of
from compress.formats.generation.seq2seq import MASK, PLAIN, SEQUENCES, TEXTS, said_of, token_ids
from compress.formats.generation.speech_recognition import open_pair
from compress.formats.runtime import Batch, Session, TensorType, check_inputs
from compress.models.json_file import read_json, wrong_fields
from compress.models.pipeline_folder import image_generation_hook, is_pipeline
from compress.utils.errors import InputError, ModelError, StageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


IDS, PIXELS = "input_ids", "pixel_values"
FEATURES, EMBEDS, LOGITS = "image_features", "inputs_embeds", "logits"
_LONGEST = 256
"""Tokens of an answer where nothing says how many: those of transformers' own pipeline."""
_GREEDY: dict[str, float | None] = {
    **PLAIN,
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
}
"""What changes an answer and is not followed, at the values that change nothing."""


@dataclass(frozen=True)
class AnswerRules:
    """``image`` is the token that stands for a feature of the image; ``ends`` end an answer of ``longest`` tokens.

    ``positions`` is how many tokens the model reads at most, prompt and answer; None where nothing says so.
    """

    image: int
    ends: tuple[int, ...]
    longest: int
    positions: int | None

    def room(self, prompt: int) -> int:
        """Return the largest number of tokens of an answer to a prompt of ``prompt`` tokens."""
        return max(1, self.longest if self.positions is None else min(self.longest, self.positions - prompt))


def read_rules(folder: Path) -> AnswerRules:
    """Return the rules of a folder's config.json and generation_config.json; raise `ModelError` if they are invalid."""
    settings, config = said_of(folder), read_json(folder / "config.json")
    with wrong_fields(folder / "config.json"):
        return _rules(folder, settings, config)


def _rules(folder: Path, settings: Mapping[str, Any], config: Mapping[str, Any]) -> AnswerRules:
    image = config.get("image_token_id", config.get("image_token_index"))
    text = config.get("text_config") or {}
    ends = token_ids(settings.get("eos_token_id", text.get("eos_token_id")))
    if image is None or not ends:
        raise ModelError(
            f"Nothing says which token {'ends an answer' if image is not None else 'stands for an image'}.",
            where=str(folder),
            expected="image_token_id in config.json, and eos_token_id in generation_config.json",
        )
    longest, positions = settings.get("max_new_tokens") or _LONGEST, text.get("max_position_embeddings")
    return AnswerRules(
        operator.index(image), ends, operator.index(longest), None if positions is None else operator.index(positions)
    )


def refuse_unfollowed(folder: Path) -> None:
    """Raise `ModelError` if a folder's generation_config.json requests more than greedy decoding."""
    config = said_of(folder)
    odd = [name for name, plain in _GREEDY.items() if config.get(name) not in (None, plain, [])]
    if odd:
        raise ModelError(
            f"The model's answers are to be made with {', '.join(odd)}.",
            where=str(folder / "generation_config.json"),
            expected="the likeliest token each time, without penalties and beams",
            hint="take it out of the file, or judge the model on the target torch, where transformers follows it",
        )


def each_length(batch: Batch) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Yield the indices of rows whose prompts are equally long, with these rows of ``batch`` without padding."""
    lengths = np.asarray(batch[MASK]).sum(axis=1)
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        row_batch = {name: np.asarray(array)[rows] for name, array in batch.items()}
        yield rows, row_batch | {name: row_batch[name][:, :length] for name in (IDS, MASK)}


class ImageAnswers:
    """Session that answers token ids and pixels with text and passes on prompts of one length at a time."""

    inputs = (IDS, MASK, PIXELS)
    output_types = {SEQUENCES: TensorType("int64", (None, None)), TEXTS: TensorType("str", (None,))}

    def __init__(
        self,
        write: Callable[[dict[str, np.ndarray]], Sequence[np.ndarray]],
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        opened: Session,
    ) -> None:
        """Store the parts of the session.

        Args:
            write: Function that returns the new tokens of each row.
            folder: Folder with the configs.
            tokenizer: Tokenizer that decodes the answers.
            opened: Session with the settings and the element type of the pixels.
        """
        self._write, self._where, self._tokenizer = write, str(folder), tokenizer
        pixels = opened.input_types.get(PIXELS, TensorType("float32", (None, None, None, None)))
        self.input_types = {**dict.fromkeys((IDS, MASK), TensorType("int64", (None, None))), PIXELS: pixels}
        self.provider = opened.provider
        self.settings: dict[str, Any] = {**opened.settings, "decoding": "greedy"}

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """Return `texts` [n], and `sequences` [n, longest] of their tokens, padded with -1.

        ``batch``: `input_ids` [n, length], whose padding `attention_mask` hides, and `pixel_values`. Raises
        `InputError` for a batch without these, and the errors of the model.
        """
        check_inputs(self.inputs, batch, self._where)
        answers: dict[int, list[int]] = {}
        for rows, row_batch in each_length({name: batch[name] for name in self.inputs}):
            answers |= {int(row): tokens.tolist() for row, tokens in zip(rows, self._write(row_batch), strict=True)}
        ordered = [answers[row] for row in sorted(answers)]
        texts = self._tokenizer.batch_decode(ordered, skip_special_tokens=True)
        return {SEQUENCES: seq2seq.padded_sequences(ordered), TEXTS: np.array([text.strip() for text in texts])}


def until_ended(tokens: np.ndarray, ends: Sequence[int]) -> list[np.ndarray]:
    """Return rows of tokens [n, length], each up to and including the first token that ends it."""
    texts = []
    for row in tokens:
        last = np.flatnonzero(np.isin(row, ends))
        texts.append(row[: last[0] + 1] if len(last) else row)
    return texts


class EmbeddedDecoder:
    """Decoder of three graphs that writes several answers at once to equally long prompts."""

    def __init__(self, vision: Session, table: Session, decoder: Session, image: int, where: str) -> None:
        """``image`` is the token in whose place features stand. Raises `ModelError` for graphs of another kind."""
        self._vision, self._table, self._decoder, self._image, self._where = vision, table, decoder, image, where
        inputs, outputs = decoder.input_types, decoder.output_types
        self._pasts = {name: kind for name, kind in inputs.items() if name.startswith(PAST)}
        wrong = sorted(inputs.keys() - self._pasts.keys() ^ {EMBEDS, MASK})
        wrong += [name for name in self._pasts if present_of(name) not in outputs]
        wrong += [*({FEATURES} - vision.output_types.keys()), *({EMBEDS} - table.output_types.keys())]
        if wrong or not self._pasts or LOGITS not in outputs:
            raise ModelError(
                f"The graphs lack or add {', '.join(wrong) or 'a cache or logits'}.",
                where=where,
                expected="image_features of pixel_values, inputs_embeds of input_ids, and a decoder of inputs_embeds, "
                "attention_mask and past_key_values.N.key and so on",
                hint="write the model with the stage onnx",
            )
        self._past: dict[str, np.ndarray] = {}
        self._seen = 0

    def begin(self, ids: np.ndarray, pixels: np.ndarray) -> np.ndarray:
        """Return the logits [rows, length, vocabulary] of prompts ``ids`` [rows, length] with one image each."""
        features = self._vision.predict({PIXELS: pixels})[FEATURES]
        features = features.reshape(-1, features.shape[-1])
        self._past, self._seen = seq2seq.empty_cache(self._pasts, len(ids)), 0
        embeds, places = np.array(self._table.predict({IDS: ids})[EMBEDS]), ids == self._image
        if int(places.sum()) != len(features):
            raise InputError(
                f"The prompts have {int(places.sum())} tokens for images that have {len(features)} features.",
                where=self._where,
                expected="prompts as the model's processor writes them",
            )
        embeds[places] = features
        return self._read(embeds)

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Return the logits [rows, length, vocabulary] of ``ids`` [rows, length] after the tokens read so far."""
        return self._read(self._table.predict({IDS: ids})[EMBEDS])

    def _read(self, embeds: np.ndarray) -> np.ndarray:
        rows, length = embeds.shape[:2]
        self._seen += length
        mask = np.ones((rows, self._seen), np.int64)
        outputs = self._decoder.predict({EMBEDS: embeds, MASK: mask, **self._past})
        self._past = {name: outputs[present_of(name)] for name in self._past}
        return outputs[LOGITS]

    def write(self, ids: np.ndarray, pixels: np.ndarray, rules: AnswerRules) -> list[np.ndarray]:
        """Return the greedy tokens after each prompt, up to one that ends the answer; raise `StageError` on failure."""
        logits = self.begin(ids, pixels)
        written = np.zeros((len(ids), 0), np.int64)
        while True:
            tokens = logits[:, -1].argmax(axis=-1)
            # A NaN anywhere is what argmax finds.
            if not np.isfinite(np.take_along_axis(logits[:, -1], tokens[:, None], axis=-1)).all():
                raise StageError(
                    "The decoder's logits are not finite.", where=self._where, hint="write the model again"
                )
            written = np.concatenate([written, tokens[:, None]], axis=1)
            if written.shape[1] >= rules.room(ids.shape[1]) or np.isin(written, rules.ends).any(axis=1).all():
                return until_ended(written, rules.ends)
            logits = self.read(tokens[:, None])


def open_together(sessions: Sequence[Session], folder: Path) -> Session:
    """Return a session for the opened graphs of ``folder``.

    The graphs are a single graph, an encoder and its decoder, or three that read or draw images. Raises
    `ModelError` for graphs that do not belong together.
    """
    if len(sessions) == 1:
        return sessions[0]
    if len(sessions) == len(("encoder", "decoder")):
        return open_pair(sessions[0], sessions[1], folder)
    if is_pipeline(folder):
        session: Session = image_generation_hook("open_components")(sessions, folder)
        return session
    from compress.models.processor import load_tokenizer

    refuse_unfollowed(folder)
    rules = read_rules(folder)
    vision, table, decoder = sessions
    graphs, tokenizer = EmbeddedDecoder(vision, table, decoder, rules.image, str(folder)), load_tokenizer(folder)
    return ImageAnswers(lambda batch: graphs.write(batch[IDS], batch[PIXELS], rules), folder, tokenizer, vision)
