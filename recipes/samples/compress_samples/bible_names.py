"""Names of persons, places and peoples in the King James Version, by Strong's numbers and what his dictionaries say.

Weak labels: each word of the text has the number of the Hebrew or Greek word that it stands for; whether a number is a
person, a place or a people is told from the first such word in its definition. Nobody has checked them one by one.
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
_MARKED = re.compile(r'(<w\b[^>]*\blemma="strong:([HG])0*(\d+)[^"]*"[^>]*>)([^<]*)')
_NO_NAMES = {"god", "lord", "jehovah", "jah", "christ", "holy", "ghost", "spirit", "almighty", "high", "i", "hear"}
"""God, by any name, is none of the three kinds; the last two are spelled with capitals for other reasons."""
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
_MARKS = dict(zip(_KINDS, "\ue001\ue002\ue003", strict=True))
_FOLLOWS = "\ue000"
_OTHERWISE = {"H3478": "GRP", "G2474": "GRP", "H894": "LOC", "G897": "LOC", "G2453": "GRP", "H3064": "GRP"}
"""Israel, which is mostly the people, Babylon, and the Jews."""


class Sentence(NamedTuple):
    """A verse: its words and punctuation, a BIO label for each, and where it stands."""

    tokens: list[str]
    tags: list[str]
    verse: str


def write_names(members: Path, files: Path, progress: Progress) -> None:
    """Write train, validation and test.parquet (columns of `Sentence`). Raises `SampleError`."""
    names = read_names(members)
    verses = [
        (f"{book} {chapter}:{verse}", markup) for (book, chapter, verse), markup in read_raw(members / OLD[0], OLD[1])
    ]
    sentences = [labeled(markup, names, reference) for reference, markup in verses]
    splits = split_sentences([sentence for sentence in sentences if sentence.tokens])
    for name, part in splits.items():
        columns = {field: [getattr(sentence, field) for sentence in part] for field in Sentence._fields}
        pa.parquet.write_table(pa.table(columns), files / f"{name}.parquet")
    counts = ", ".join(f"{len(part):,} {name}" for name, part in splits.items())
    progress.note(f"names: {counts} verses; {len(names):,} of Strong's numbers are names")


def read_names(members: Path) -> dict[str, Name]:
    """The numbers that are names, as `H3878`. Raises `SampleError` for a damaged dictionary."""
    names = {
        f"{letter}{int(key)}": name_kind
        for letter, dictionary in DICTIONARIES.items()
        for key, text in read_dictionary(members / dictionary).items()
        if (name_kind := name_of(text)) is not None
    }
    kinds = {number: names[number]._replace(kind=kind) for number, kind in _OTHERWISE.items() if number in names}
    return names | kinds


def read_dictionary(folder: Path) -> dict[str, str]:
    """The entries of a compressed SWORD dictionary by their keys. Raises `SampleError` for a damaged one."""
    try:
        index, keys, places, blocks = ((folder / f"dict.{end}").read_bytes() for end in ("idx", "dat", "zdx", "zdt"))
        read: dict[int, list[str]] = {}
        entries = {}
        for start, size in _PAIR.iter_unpack(index):
            key, _, verse = keys[start : start + size].partition(b"\r\n")
            if len(verse) < _PAIR.size:
                continue
            block, entry = _PAIR.unpack(verse[: _PAIR.size])
            if block not in read:
                at, length = _PAIR.unpack_from(places, block * _PAIR.size)
                read[block] = list(_entries(zlib.decompress(blocks[at : at + length])))
            entries[key.decode()] = read[block][entry]
    except (OSError, struct.error, zlib.error, UnicodeDecodeError, IndexError) as error:
        raise SampleError(f"The dictionary {folder.name} is damaged: {error}") from error
    return entries


def _entries(block: bytes) -> Iterator[str]:
    (count,) = struct.unpack_from("<I", block)
    for start, size in _PAIR.iter_unpack(block[4 : 4 + _PAIR.size * count]):
        yield block[start : start + size].rstrip(b"\0").decode()


class Name(NamedTuple):
    """What a number stands for: PER, LOC or GRP, and the words by which the text has it."""

    kind: str
    words: frozenset[str]


def name_of(entry: str) -> Name | None:
    """Of an entry whose use in the text is a name, by the first word that tells in the last part of it that has any."""
    text = " ".join(_TAG.sub("", re.sub(r"<orth.*?</orth>|<pron.*?</pron>", " ", entry, flags=re.DOTALL)).split())
    parts = _USED.split(text)
    used = _WORD.findall(parts[-1])
    if len(parts) < 2 or not used or not used[0][0].isupper() or used[0].lower() in _NO_NAMES:
        return None
    kinds = (match.lastgroup for part in reversed(" ".join(parts[:-1]).split(";")) if (match := _KIND.search(part)))
    return Name(next(kinds, None) or "PER", frozenset(word.lower() for word in used))


def labeled(markup: str, names: Mapping[str, Name], place: str) -> Sentence:
    """A verse of OSIS with a label for each of its words; a name is what is capitalised under a name's number."""

    def mark(found: re.Match[str]) -> str:
        name = names.get(f"{found[2]}{found[3]}")
        return found[0] if name is None else found[1] + _marked(found[4], name)

    tokens: list[str] = []
    tags: list[str] = []
    for token in _TOKEN.findall(plain_verse(_MARKED.sub(mark, markup))):
        bare = re.sub("[\ue000-\ue00f]", "", token)
        kind = next((kind for kind, sign in _MARKS.items() if token.startswith(sign)), None)
        follows = token.startswith(_FOLLOWS) and tags and tags[-1] != "O"
        tags.append(f"B-{kind}" if kind else f"I-{tags[-1][2:]}" if follows else "O")
        tokens.append(bare)
    return Sentence(tokens, tags, place)


def _marked(text: str, name: Name) -> str:
    """``text`` with signs before its capitalised words: which kind begins there, or that it goes on."""
    begun = False
    words = text.split(" ")
    for at, word in enumerate(words):
        bare = re.sub(r"['\u2019]s?$", "", word).lower()
        known = bool({bare, bare.removesuffix("s")} & name.words)
        if word[:1].isupper() and known and bare not in _NO_NAMES:
            words[at] = (_FOLLOWS if begun else _MARKS[name.kind]) + word
            begun = True
        else:
            begun = False
    return " ".join(words)


def split_sentences(sentences: list[Sentence]) -> dict[str, list[Sentence]]:
    """Whole chapters, by the SHA-256 of their names: test, validation, train; no verse stands in two of them."""
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
