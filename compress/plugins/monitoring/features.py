"""What rows are like before any model sees them: a number or a few of each, by what kind of input they have."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.data.columns import Column
from compress.data.media import content, decode

if TYPE_CHECKING:
    import pyarrow as pa

_FULL_SCALE = 0.999
"""Amplitude from which a recording counts as clipped."""
_QUIET_DB = -120.0


@dataclass(frozen=True)
class TextFeatures:
    """Of rows [n]: shares ``unknown``, ``broken`` and ``cut``, and ``lengths`` in tokens before anything is cut off.

    ``tokens`` are counts, a sparse [n, vocabulary]. ``words`` are those of each row that are no entry of the table.
    ``unknown`` is None of a tokenizer that can write everything.
    """

    broken: np.ndarray
    cut: np.ndarray
    lengths: np.ndarray
    unknown: np.ndarray | None
    tokens: Any
    words: Sequence[frozenset[str]]

    def take(self, places: np.ndarray) -> TextFeatures:
        """Those of the rows at ``places``."""
        unknown = None if self.unknown is None else self.unknown[places]
        words = [self.words[place] for place in places]
        return TextFeatures(
            self.broken[places], self.cut[places], self.lengths[places], unknown, self.tokens[places], words
        )


def text_features(table: pa.Table, columns: Sequence[Column], tokenizer: Any, max_length: int) -> TextFeatures:
    """Read the texts by the tokenizer that ships, with nothing cut off."""
    from scipy.sparse import csr_matrix
    from tokenizers import Tokenizer

    texts = [" ".join(values) for values in zip(*(table[column.name].to_pylist() for column in columns), strict=True)]
    reader = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    reader.no_truncation()
    reader.no_padding()
    framed = tokenizer.num_special_tokens_to_add(pair=len(columns) > 1)
    room, words = max(1, max_length - framed), list[frozenset[str]]()
    shares, counts, lengths = [], [], []
    for text, encoded in zip(texts, reader.encode_batch(texts, add_special_tokens=False), strict=True):
        ids = np.array(encoded.ids, dtype=np.int64)
        broken, total = _broken_words(text, encoded)
        words.append(frozenset(broken))
        unknown = (ids == tokenizer.unk_token_id).mean() if len(ids) and tokenizer.unk_token_id is not None else 0.0
        shares.append((unknown, sum(broken.values()) / max(1, total), max(0, len(ids) - room) / max(1, len(ids))))
        lengths.append(len(ids) + framed)
        counts.append(Counter(ids[:room].tolist()))
    unknown, broken_share, cut = np.array(shares, dtype=np.float64).T
    entries = [(row, token, count) for row, found in enumerate(counts) for token, count in found.items()]
    rows, ids, values = np.array(entries, dtype=np.int64).reshape(-1, 3).T
    tokens = csr_matrix((values, (rows, ids)), shape=(len(texts), len(tokenizer)), dtype=np.float32)
    known = unknown if tokenizer.unk_token_id is not None else None
    return TextFeatures(broken_share, cut, np.array(lengths, dtype=np.float64), known, tokens, words)


def _broken_words(text: str, encoded: Any) -> tuple[Counter[str], int]:
    """The words that the tokenizer has in pieces, and how many words there are."""
    pieces: dict[int, list[tuple[int, int]]] = {}
    for word, span in zip(encoded.word_ids, encoded.offsets, strict=True):
        if word is not None:
            pieces.setdefault(word, []).append(span)
    found = Counter(text[spans[0][0] : spans[-1][1]].strip().casefold() for spans in pieces.values() if len(spans) > 1)
    return found, len(pieces)


def image_features(table: pa.Table, column: Column) -> Mapping[str, np.ndarray]:
    """Brightness and contrast from 0 to 1, and the larger side in pixels, each [n]. Raises as `decode`."""
    found = []
    for value in table[column.name].to_pylist():
        image = decode(value, "L", Counter())
        pixels = np.asarray(image, dtype=np.float32) / 255
        found.append((float(pixels.mean()), float(pixels.std()), float(max(image.size))))
    return dict(zip(("brightness", "contrast", "size"), np.array(found).T, strict=True))


def sound_features(table: pa.Table, column: Column) -> Mapping[str, np.ndarray]:
    """Loudness in dB of full scale, seconds, sampling rate, and the share of samples at full scale, each [n]."""
    import soundfile

    found = []
    for value in table[column.name].to_pylist():
        samples, rate = soundfile.read(io.BytesIO(content(value)), dtype="float32", always_2d=True)
        power = float(np.square(samples, dtype=np.float64).mean()) if samples.size else 0.0
        loudness = max(_QUIET_DB, 10 * np.log10(power)) if power > 0 else _QUIET_DB
        clipped = float((np.abs(samples) >= _FULL_SCALE).mean()) if samples.size else 0.0
        found.append((loudness, len(samples) / rate, float(rate), clipped))
    return dict(zip(("loudness", "seconds", "rate", "clipped"), np.array(found).T, strict=True))
