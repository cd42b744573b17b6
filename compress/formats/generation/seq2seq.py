"""Text from text with two opened graphs, encoder and decoder: the likeliest token each time, or beam search.

What is written equals what transformers' `generate` writes by the same generation_config.json.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.formats.generation.decoder import PAST, present_of
from compress.formats.runtime import Batch, Session, TensorType, check_inputs
from compress.models.json_file import read_json, wrong_fields
from compress.utils.errors import ModelError, StageError

IDS, LOGITS = "input_ids", "logits"
_HIDDEN, _MASK, _CACHED = "encoder_hidden_states", "encoder_attention_mask", "use_cache_branch"


class PairDecoder:
    """Decoder that writes several texts at once, one per row; ``where`` names the model in messages."""

    def __init__(self, session: Session, where: str) -> None:
        """Read the graph's inputs and outputs; raise `ModelError` if it is no decoder of this form."""
        self._session, self._where = session, where
        inputs, outputs = session.input_types, session.output_types
        self._pasts = {name: kind for name, kind in inputs.items() if name.startswith(PAST)}
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
        self._past = empty_cache(self._pasts, len(hidden))
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


def empty_cache(pasts: Mapping[str, TensorType], rows: int) -> dict[str, np.ndarray]:
    """Return an empty cache of ``rows`` texts for inputs [batch, heads, past, size], whose free axes become 0."""
    return {
        name: np.zeros([rows, *(axis if isinstance(axis, int) else 0 for axis in kind.shape[1:])], kind.dtype)
        for name, kind in pasts.items()
    }


MASK, HIDDEN = "attention_mask", "last_hidden_state"
SEQUENCES, TEXTS = "sequences", "texts"
_GENERATION = "generation_config.json"
_LONGEST = 20
"""Tokens after the start where nothing says how many: transformers' own default."""
_LOW = np.float32(-1e9)
PLAIN: dict[str, float | None] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "penalty_alpha": 0.0,
    "constraints": None,
    "force_words_ids": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
}
"""What changes a text and is not followed, at the values that change nothing."""


@dataclass(frozen=True)
class WritingRules:
    """Generation settings of a text-to-text model.

    ``start`` begins a text, ``ends`` end it; ``longest`` and ``shortest`` count the start. ``first`` and ``last``
    are tokens that must stand after the start and at the longest length. Tokens ``never`` are not written, nor any
    ``no_repeat`` tokens twice in the same order. ``beams`` above 1: beam search, with scores divided by the length
    to the power of ``length_penalty``, and ``early_stopping`` as in transformers.
    """

    start: int
    ends: tuple[int, ...]
    longest: int
    shortest: int = 0
    first: int | None = None
    last: tuple[int, ...] = ()
    never: tuple[int, ...] = ()
    no_repeat: int = 0
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False


def said_of(folder: Path) -> dict[str, Any]:
    """Return the generation settings of a folder: its generation_config.json, which overrides its config.json."""
    config = read_json(folder / "config.json")
    if (folder / _GENERATION).is_file():
        config = config | {key: value for key, value in read_json(folder / _GENERATION).items() if value is not None}
    return config


def read_rules(folder: Path) -> WritingRules:
    """Return the rules of a folder's generation_config.json and config.json.

    Raises:
        ModelError: A setting is not supported.
    """
    with wrong_fields(folder / _GENERATION):
        return _rules(folder, said_of(folder))


def _rules(folder: Path, config: dict[str, Any]) -> WritingRules:
    start = config.get("decoder_start_token_id", config.get("bos_token_id"))
    ends = token_ids(config.get("eos_token_id"))
    odd = [name for name, plain in PLAIN.items() if config.get(name) not in (None, plain)]
    banned = config.get("bad_words_ids") or []
    odd += ["bad_words_ids of several tokens"] if any(len(words) != 1 for words in banned) else []
    if start is None or not ends or odd:
        raise ModelError(
            f"The model cannot be asked for text by {', '.join(odd) or 'tokens that nothing names'}.",
            where=str(folder / _GENERATION),
            expected="decoder_start_token_id and eos_token_id; greedy or beam search without further penalties",
        )
    more, fewest = config.get("max_new_tokens"), config.get("min_new_tokens")
    return WritingRules(
        start=operator.index(start),
        ends=ends,
        longest=operator.index(1 + more if more else config.get("max_length") or 1 + _LONGEST),
        shortest=operator.index(1 + fewest if fewest else config.get("min_length") or 0),
        first=next(iter(token_ids(config.get("forced_bos_token_id"))), None),
        last=token_ids(config.get("forced_eos_token_id")),
        never=token_ids([*(words[0] for words in banned), *(config.get("suppress_tokens") or ())]),
        no_repeat=operator.index(config.get("no_repeat_ngram_size") or 0),
        beams=operator.index(config.get("num_beams") or 1),
        length_penalty=float(config.get("length_penalty") or 0.0) if "length_penalty" in config else 1.0,
        early_stopping=config.get("early_stopping") or False,
    )


def token_ids(said: int | list[int] | None) -> tuple[int, ...]:
    """Return the one or several tokens of a config entry as a tuple. Raises `TypeError` for other types."""
    return tuple(map(operator.index, () if said is None else said if isinstance(said, list) else (said,)))


def padded_sequences(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Return rows of tokens as [n, longest], padded with -1."""
    longest = max(map(len, rows))
    padded = [[*row, *[-1] * (longest - len(row))] for row in rows]
    return np.array(padded, dtype=np.int64).reshape(len(rows), -1)


class TextWriter:
    """Session that generates tokens and text from token ids, row by row and without padding."""

    inputs = (IDS, MASK)
    input_types = dict.fromkeys(inputs, TensorType("int64", (None, None)))
    output_types = {SEQUENCES: TensorType("int64", (None, None)), TEXTS: TensorType("str", (None,))}

    def __init__(self, encoder: Session, decoder: Session, folder: Path) -> None:
        """Read the tokenizer and the generation config of ``folder``; raise `ModelError` for graphs of another kind."""
        from compress.models.processor import load_tokenizer

        self.encoder, self._where, self.rules = encoder, str(folder), read_rules(folder)
        self._decoder = PairDecoder(decoder, self._where)
        self._tokenizer: Any = load_tokenizer(folder)
        self.provider = encoder.provider
        way = "greedy" if self.rules.beams == 1 else f"{self.rules.beams} beams"
        self.settings: dict[str, Any] = {**encoder.settings, "decoding": way}

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """Return `texts` [n] and `sequences` [n, longest] of tokens, padded with -1.

        ``batch``: `input_ids` [n, length], whose padding `attention_mask` hides. Raises `InputError` for a batch
        without these, and the errors of the graphs.
        """
        check_inputs(self.inputs, batch, self._where)
        lengths = np.asarray(batch[MASK]).sum(axis=1)
        rows = [self.tokens(row[:length]) for row, length in zip(np.asarray(batch[IDS]), lengths, strict=True)]
        texts = self._tokenizer.batch_decode(rows, skip_special_tokens=True)
        return {SEQUENCES: padded_sequences(rows), TEXTS: np.array(texts)}

    def tokens(self, ids: np.ndarray) -> list[int]:
        """Return the tokens generated for one text [length], without the start token."""
        ids = np.asarray(ids, np.int64)[np.newaxis]
        mask = np.ones_like(ids)
        self._decoder.begin(self.encoder.predict({IDS: ids, MASK: mask})[HIDDEN], mask)
        written = self._likeliest() if self.rules.beams == 1 else self._best_of_beams()
        return [int(token) for token in written[1:]]

    def _likeliest(self) -> np.ndarray:
        rules, text = self.rules, np.array([self.rules.start], np.int64)
        while len(text) < rules.longest and (len(text) == 1 or text[-1] not in rules.ends):
            allowed = self._allowed(text, self._decoder.read(text[np.newaxis, -1:])[0])
            token = int(allowed.argmax())
            self._decoder.finite(allowed[token])
            text = np.append(text, token)
        return text

    def _best_of_beams(self) -> np.ndarray:
        """Generate one text by beam search, as transformers does since 4.50."""
        rules, beams = self.rules, self.rules.beams
        # Enough candidates per step that every beam can go on even if the best ones all end there.
        candidates = max(2, 1 + len(rules.ends)) * beams
        texts = np.full((beams, 1), rules.start, np.int64)
        scores = np.full(beams, _LOW, np.float32)
        scores[0] = 0
        self._decoder.follow(np.zeros(beams, np.int64))
        done: list[tuple[np.float32, bool, np.ndarray]] = [(_LOW, False, texts[0])] * beams
        hopeful = True
        while True:
            logits = self._decoder.read(texts[:, -1:])
            self._decoder.finite(logits.max())
            shifted = logits - logits.max(axis=-1, keepdims=True)
            log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
            chances = [self._allowed(*pair) for pair in zip(texts, log_probabilities, strict=True)]
            whole = (np.stack(chances) + scores[:, None]).ravel()
            best = np.argsort(-whole, kind="stable")[:candidates]
            values, rows, tokens = whole[best], best // logits.shape[1], best % logits.shape[1]
            longer = np.concatenate([texts[rows], tokens[:, None]], axis=1)
            ended = np.isin(tokens, rules.ends) | (longer.shape[1] >= rules.longest)
            done = _finished(done, longer, values, ended, rules, hopeful)
            running = values + ended * _LOW
            chosen = np.argsort(-running, kind="stable")[:beams]
            texts, scores = longer[chosen], running[chosen]
            self._decoder.follow(rows[chosen])
            hopeful = hopeful and _can_improve(scores[0], done, texts.shape[1], rules)
            full = rules.early_stopping is True and all(finished for _, finished, _ in done)
            if not hopeful or full or ended.all():
                return done[0][2]

    def _allowed(self, text: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Return the scores [vocabulary] of the next token, with -inf for tokens that the rules forbid."""
        rules, allowed_scores = self.rules, scores.copy()
        allowed_scores[list(_repeats(text, rules.no_repeat))] = -np.inf
        allowed_scores[list(rules.never)] = -np.inf
        if len(text) < rules.shortest:
            allowed_scores[list(rules.ends)] = -np.inf
        forced: tuple[int, ...] = (rules.first,) if len(text) == 1 and rules.first is not None else ()
        forced = rules.last if rules.last and len(text) == rules.longest - 1 else forced
        if forced:
            allowed_scores[:] = -np.inf
            allowed_scores[list(forced)] = 0
        return allowed_scores


def _finished(
    done: list[tuple[np.float32, bool, np.ndarray]],
    texts: np.ndarray,
    values: np.ndarray,
    ended: np.ndarray,
    rules: WritingRules,
    hopeful: bool,
) -> list[tuple[np.float32, bool, np.ndarray]]:
    """Return the best finished texts with their scores after adding the ``ended`` ones among the first beams.

    Args:
        done: Finished texts so far: score, whether the text ended, tokens.
        texts: Candidate texts of this step, best first.
        values: Sums of log-probabilities of ``texts``.
        ended: Flags of the ``texts`` that ended at this step.
        rules: Generation settings.
        hopeful: False if no running text can still become better than the finished ones.
    """
    scores = values / np.float32((texts.shape[1] - 1) ** rules.length_penalty)
    full = rules.early_stopping is True and all(finished for _, finished, _ in done)
    ended = ended & (np.arange(len(ended)) < rules.beams)
    scores = scores + np.float32(full + (not hopeful)) * _LOW + ~ended * _LOW
    return sorted([*done, *zip(scores, ended.tolist(), texts, strict=True)], key=lambda one: -one[0])[: rules.beams]


def _can_improve(
    best: np.floating, done: list[tuple[np.float32, bool, np.ndarray]], length: int, rules: WritingRules
) -> bool:
    """Return whether a running text can still be better than the worst finished text."""
    longest = rules.early_stopping == "never" and rules.length_penalty > 0
    possible = best / ((rules.longest if longest else length) - 1) ** rules.length_penalty
    worst = min(score for score, _, _ in done)
    return any(possible > (worst if finished else _LOW) for _, finished, _ in done)


def _repeats(text: np.ndarray, size: int) -> set[int]:
    """Return the tokens that would repeat the last ``size`` tokens of ``text``."""
    if size == 0 or len(text) + 1 < size:
        return set()
    tail = text[len(text) + 1 - size :].tolist()
    return {int(text[at + size - 1]) for at in range(len(text) - size + 1) if text[at : at + size - 1].tolist() == tail}
