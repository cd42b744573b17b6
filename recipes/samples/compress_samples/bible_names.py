"""Names of persons, places and peoples in the King James Version, weakly labeled with Strong's dictionaries.

Each word of the text has the Strong's number of the Hebrew or Greek word that it translates. Whether a number is a
person, a place or a people follows from keywords in its definition. The labels were not checked manually.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet

from compress.data.columns import normalised
from compress.utils.errors import SampleError
from compress.utils.progress import Progress
from compress_samples.verses import OLD, plain_verse, read_raw

TEST_VERSES, VALIDATION_VERSES, TRAIN_VERSES = 2_000, 500, 2_500
DICTIONARIES = {"H": "strongshebrew", "G": "strongsgreek"}
_PAIR = struct.Struct("<II")
_TAG = re.compile(r"<[^>]*>")
_USED = re.compile(r":\s?-+\s*")
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
_TOKEN = re.compile(r"[\ue000-\ue00f]?\w+(?:['\u2019-][\ue000-\ue00f]?\w+)*|[^\w\s]")
_NUMBERED_WORDS = re.compile(r'(<w\b[^>]*\blemma="strong:([HG])0*(\d+)[^"]*"[^>]*>)([^<]*)')
_EXCLUDED_WORDS = {
    "god",
    "lord",
    "jehovah",
    "jah",
    "christ",
    "holy",
    "ghost",
    "spirit",
    "almighty",
    "high",
    "i",
    "hear",
}
"""Capitalized words that are no names of the three kinds: names of God, and words capitalized for other reasons."""
_KINDS = {
    "GRP": r"patronymic|patronymically|patrial|inhabitants?|descendants?|tribe|gentile|native|people|family",
    "LOC": r"places?|cit(?:y|ies)|towns?|regions?|country|rivers?|mountains?|mount|hills?|district|capitol|village|"
    r"deserts?|valley|spring|brook|islands?|province|port|lake|stream|fountain|spot|pool|land|plain|forum|gate|sea|"
    r"Palestine|Syria|Egypt|Mesopotamia|Asia|Arabia|station|wilderness|promontory|suburb",
    "PER": r"Israelites?|Israelitess|Israelitish|Edomites?|kings?|sons?|daughters?|brothers?|sisters?|wife|prophet|"
    r"prophetess|names? of an?|Christians?|priests?|patriarch|Moses|David|Abraham|eunuch|queen|officer|antediluvian|"
    r"man|woman|men|Canaanite|Philistine|Persian|Babylonian|Roman|emperor|Jews?|apostle|giant|Horite|Midianite",
}
_KIND = re.compile("|".join(rf"(?P<{kind}>\b(?:{words})\b)" for kind, words in _KINDS.items()))
_KIND_MARKS = dict(zip(_KINDS, "\ue001\ue002\ue003", strict=True))
_CONTINUES = "\ue000"
_KIND_EXCEPTIONS = {"H3478": "GRP", "G2474": "GRP", "H894": "LOC", "G897": "LOC", "G2453": "GRP", "H3064": "GRP"}
"""Kinds of numbers that the keywords classify wrongly: Israel (mostly the people), Babylon and the Jews."""


class Sentence(NamedTuple):
    """A verse: its tokens, a BIO label for each, and its reference."""

    tokens: list[str]
    tags: list[str]
    verse: str


def write_names(members: Path, files: Path, progress: Progress) -> None:
    """Write train, validation and test.parquet (columns of `Sentence`). Raises `SampleError`."""
    names = read_names(members)
    verses = [
        (f"{book} {chapter}:{verse}", markup) for (book, chapter, verse), markup in read_raw(members / OLD[0], OLD[1])
    ]
    sentences = [label_verse(markup, names, reference) for reference, markup in verses]
    splits = split_sentences([sentence for sentence in sentences if sentence.tokens])
    for name, part in splits.items():
        columns = {field: [getattr(sentence, field) for sentence in part] for field in Sentence._fields}
        pa.parquet.write_table(pa.table(columns), files / f"{name}.parquet")
    counts = ", ".join(f"{len(part):,} {name}" for name, part in splits.items())
    progress.note(f"names: {counts} verses; {len(names):,} of Strong's numbers are names")


def read_names(members: Path) -> dict[str, Name]:
    """Return Strong's numbers (like `H3878`) that are names. Raises `SampleError` for a damaged dictionary."""
    names = {
        f"{letter}{int(key)}": name
        for letter, dictionary in DICTIONARIES.items()
        for key, text in read_dictionary(members / dictionary).items()
        if (name := parse_name(text)) is not None
    }
    kinds = {number: names[number]._replace(kind=kind) for number, kind in _KIND_EXCEPTIONS.items() if number in names}
    return names | kinds


def read_dictionary(folder: Path) -> dict[str, str]:
    """Return the entries of a compressed SWORD dictionary by key. Raises `SampleError` if it is damaged."""
    try:
        index, keys, block_index, blocks = (
            (folder / f"dict.{end}").read_bytes() for end in ("idx", "dat", "zdx", "zdt")
        )
        entries_by_block: dict[int, list[str]] = {}
        entries = {}
        for start, size in _PAIR.iter_unpack(index):
            key, _, verse = keys[start : start + size].partition(b"\r\n")
            if len(verse) < _PAIR.size:
                continue
            block, entry = _PAIR.unpack(verse[: _PAIR.size])
            if block not in entries_by_block:
                offset, length = _PAIR.unpack_from(block_index, block * _PAIR.size)
                entries_by_block[block] = list(_entries(zlib.decompress(blocks[offset : offset + length])))
            entries[key.decode()] = entries_by_block[block][entry]
    except (OSError, struct.error, zlib.error, UnicodeDecodeError, IndexError) as error:
        raise SampleError(f"The dictionary {folder.name} is damaged: {error}") from error
    return entries


def _entries(block: bytes) -> Iterator[str]:
    (count,) = struct.unpack_from("<I", block)
    for start, size in _PAIR.iter_unpack(block[4 : 4 + _PAIR.size * count]):
        yield block[start : start + size].rstrip(b"\0").decode()


class Name(NamedTuple):
    """A name: its kind (PER, LOC or GRP), and the words that translate it."""

    kind: str
    words: frozenset[str]


def parse_name(entry: str) -> Name | None:
    """Return the name that a dictionary entry defines, or None.

    Its kind is the first keyword in the last part of the definition that has one.
    """
    text = " ".join(_TAG.sub("", re.sub(r"<orth.*?</orth>|<pron.*?</pron>", " ", entry, flags=re.DOTALL)).split())
    parts = _USED.split(text)
    used = _WORD.findall(parts[-1])
    if len(parts) < 2 or not used or not used[0][0].isupper() or used[0].lower() in _EXCLUDED_WORDS:
        return None
    kinds = (match.lastgroup for part in reversed(" ".join(parts[:-1]).split(";")) if (match := _KIND.search(part)))
    return Name(next(kinds, None) or "PER", frozenset(word.lower() for word in used))


def label_verse(markup: str, names: Mapping[str, Name], reference: str) -> Sentence:
    """Label the tokens of a verse in OSIS markup; names are capitalized words with the number of a name."""

    def mark(match: re.Match[str]) -> str:
        name = names.get(f"{match[2]}{match[3]}")
        return match[0] if name is None else match[1] + _mark_words(match[4], name)

    tokens: list[str] = []
    tags: list[str] = []
    for token in _TOKEN.findall(plain_verse(_NUMBERED_WORDS.sub(mark, markup))):
        bare = re.sub("[\ue000-\ue00f]", "", token)
        kind = next((kind for kind, sign in _KIND_MARKS.items() if token.startswith(sign)), None)
        continues = token.startswith(_CONTINUES) and tags and tags[-1] != "O"
        tags.append(f"B-{kind}" if kind else f"I-{tags[-1][2:]}" if continues else "O")
        tokens.append(bare)
    return Sentence(tokens, tags, reference)


def _mark_words(text: str, name: Name) -> str:
    """Return ``text`` with a mark before each capitalized word of the name: its kind, or that the name continues."""
    has_begun = False
    words = text.split(" ")
    for index, word in enumerate(words):
        bare = re.sub(r"['\u2019]s?$", "", word).lower()
        known = bool({bare, bare.removesuffix("s")} & name.words)
        if word[:1].isupper() and known and bare not in _EXCLUDED_WORDS:
            words[index] = (_CONTINUES if has_begun else _KIND_MARKS[name.kind]) + word
            has_begun = True
        else:
            has_begun = False
    return " ".join(words)


def split_sentences(sentences: list[Sentence]) -> dict[str, list[Sentence]]:
    """Split by chapters, in the order of their names' SHA-256, into splits without common verses."""
    chapters: dict[str, list[Sentence]] = {}
    for sentence in sentences:
        chapters.setdefault(sentence.verse.rpartition(":")[0], []).append(sentence)
    sizes = {"test": TEST_VERSES, "validation": VALIDATION_VERSES, "train": TRAIN_VERSES}
    if len(sentences) < 2 * sum(sizes.values()):
        raise SampleError(f"The text has {len(sentences)} verses.", expected="some 31,000")
    splits: dict[str, list[Sentence]] = {"train": [], "validation": [], "test": []}
    seen: set[str] = set()
    for chapter in sorted(chapters, key=lambda name: hashlib.sha256(name.encode()).digest()):
        name = next((name for name, most in sizes.items() if len(splits[name]) < most), None)
        if name is None:
            break
        for sentence in chapters[chapter]:
            text = normalised(" ".join(sentence.tokens))
            if text not in seen and len(splits[name]) < sizes[name]:
                seen.add(text)
                splits[name].append(sentence)
    return splits
