"""Features of input rows that need no model: a few numbers per row, depending on the kind of input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compress.data.columns import Column
from compress.data.media import content, decode, describe
from compress.tasks.audio import decode_recording

if TYPE_CHECKING:
    import pyarrow as pa
    from scipy.sparse import csr_matrix
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

_FULL_SCALE = 0.999
"""Amplitude from which a sample counts as clipped."""
_QUIET_DB = -120.0


@dataclass(frozen=True)
class TextFeatures:
    """Features of text rows [n].

    Attributes:
        broken: Share of words that are split into several tokens.
        cut: Share of tokens beyond the maximum length.
        lengths: Number of tokens before truncation.
        unknown: Share of unknown tokens; None for a tokenizer that can represent everything.
        tokens: Counts as a sparse matrix [n, vocabulary].
        words: Words of each row that are not an entry of the vocabulary.
    """

    broken: np.ndarray
    cut: np.ndarray
    lengths: np.ndarray
    unknown: np.ndarray | None
    tokens: csr_matrix
    words: Sequence[frozenset[str]]

    def take(self, indices: np.ndarray) -> TextFeatures:
        """Return the features of the rows at ``indices``."""
        unknown = None if self.unknown is None else self.unknown[indices]
        arrays = (self.broken[indices], self.cut[indices], self.lengths[indices], unknown, self.tokens[indices])
        return TextFeatures(*arrays, [self.words[index] for index in indices])


def text_features(
    table: pa.Table, columns: Sequence[Column], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> TextFeatures:
    """Tokenize texts with the shipped tokenizer, without truncation.

    Args:
        table: Rows.
        columns: Text columns.
        tokenizer: Tokenizer of the model.
        max_length: Maximum number of tokens, special tokens included.
    """
    from scipy.sparse import csr_matrix
    from tokenizers import Tokenizer

    texts = [" ".join(values) for values in zip(*(table[column.name].to_pylist() for column in columns), strict=True)]
    # Work on a copy of the tokenizer: truncation and padding are settings of the object.
    reader = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    reader.no_truncation()
    reader.no_padding()
    special = tokenizer.num_special_tokens_to_add(pair=len(columns) > 1)
    limit, words = max(1, max_length - special), list[frozenset[str]]()
    shares, counts, lengths = [], [], []
    for text, encoded in zip(texts, reader.encode_batch(texts, add_special_tokens=False), strict=True):
        ids = np.array(encoded.ids, dtype=np.int64)
        broken, total = _broken_words(text, encoded)
        words.append(frozenset(broken))
        # A byte-level tokenizer has no unknown token.
        unknown = (ids == tokenizer.unk_token_id).mean() if len(ids) and tokenizer.unk_token_id is not None else 0.0
        shares.append((unknown, sum(broken.values()) / max(1, total), max(0, len(ids) - limit) / max(1, len(ids))))
        lengths.append(len(ids) + special)
        counts.append(Counter(ids[:limit].tolist()))
    unknown, broken_share, cut = np.array(shares, dtype=np.float64).T
    # Build the sparse matrix from its entries (row, token, count).
    entries = [(row, token, count) for row, counter in enumerate(counts) for token, count in counter.items()]
    rows, ids, values = np.array(entries, dtype=np.int64).reshape(-1, 3).T
    tokens = csr_matrix((values, (rows, ids)), shape=(len(texts), len(tokenizer)), dtype=np.float32)
    unknown_shares = unknown if tokenizer.unk_token_id is not None else None
    return TextFeatures(broken_share, cut, np.array(lengths, dtype=np.float64), unknown_shares, tokens, words)


def _broken_words(text: str, encoded: Encoding) -> tuple[Counter[str], int]:
    """Return the words that are split into several tokens with their counts, and the number of words."""
    pieces: dict[int, list[tuple[int, int]]] = {}
    for word, span in zip(encoded.word_ids, encoded.offsets, strict=True):
        if word is not None:
            # Collect the spans of all tokens of a word.
            pieces.setdefault(word, []).append(span)
    words = Counter(text[spans[0][0] : spans[-1][1]].strip().casefold() for spans in pieces.values() if len(spans) > 1)
    return words, len(pieces)


def image_features(table: pa.Table, column: Column) -> Mapping[str, np.ndarray]:
    """Return brightness and contrast from 0 to 1, and the larger side in pixels, each [n].

    Raises what `decode` raises.
    """
    rows = []
    for value in table[column.name].to_pylist():
        # Decode to grey values. Colour is not part of any feature.
        image = decode(value, "L", Counter())
        pixels = np.asarray(image, dtype=np.float32) / 255
        rows.append((float(pixels.mean()), float(pixels.std()), float(max(image.size))))
    return dict(zip(("brightness", "contrast", "size"), np.array(rows).T, strict=True))


def sound_features(table: pa.Table, column: Column) -> Mapping[str, np.ndarray]:
    """Return loudness in dB of full scale, seconds, sampling rate, and the share of clipped samples, each [n]."""
    rows = []
    for value in table[column.name].to_pylist():
        samples, rate = decode_recording(content(value), describe(value))
        # Mean power over all samples and channels, relative to full scale.
        power = float(np.square(samples, dtype=np.float64).mean()) if samples.size else 0.0
        loudness = max(_QUIET_DB, 10 * np.log10(power)) if power > 0 else _QUIET_DB
        clipped = float((np.abs(samples) >= _FULL_SCALE).mean()) if samples.size else 0.0
        rows.append((loudness, len(samples) / rate, float(rate), clipped))
    return dict(zip(("loudness", "seconds", "rate", "clipped"), np.array(rows).T, strict=True))
