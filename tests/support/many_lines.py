"""Ten thousand lines of text that are difficult to tokenize."""

from __future__ import annotations

import random
import unicodedata

from compress.data.samples.fetch import sample_directory

LINES = 10_000
MANY_NAMES = {
    "LATIN",
    "GREEK",
    "CYRILLIC",
    "ARABIC",
    "HEBREW",
    "DEVANAGARI",
    "BENGALI",
    "THAI",
    "HANGUL",
    "CJK",
    "HIRAGANA",
}
EMOJI = ("👩‍👩‍👧", "👍🏽", "🏳️‍🌈", "🇩🇪", "1️⃣", "❤️", "😀", "🧑🏿‍🚀")


def lines() -> list[str]:
    """Return real lines, followed by lines that mix English words with runs of characters of every script and emoji."""
    import pyarrow.parquet as pq

    chance = random.Random(0)
    texts: list[str] = []
    for name, column in (("snippets", "text"), ("verses", "text"), ("verses", "pair")):
        folder = sample_directory(name)
        table = pq.read_table(next(iter(sorted(folder.glob("*.parquet")))))
        texts += table[column].to_pylist()[:1500]
    assigned = [
        chr(code) for code in range(32, 0x1FFFF) if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co", "Cc")
    ]
    scripts: dict[str, list[str]] = {}
    for mark in assigned:
        scripts.setdefault(unicodedata.name(mark, "?").split()[0], []).append(mark)
    names, words = sorted(scripts), " ".join(texts[:300]).split()
    often = sorted(MANY_NAMES & scripts.keys())
    while len(texts) < LINES:
        parts = []
        for _ in range(chance.randrange(1, 7)):
            script = scripts[chance.choice(often if chance.random() < 0.6 else names)]
            run = "".join(chance.choices(script, k=chance.randrange(1, 9)))
            parts += [run, chance.choice(words), *chance.choices(EMOJI, k=chance.randrange(2))]
        texts.append(chance.choice((" ", "", "\t", "  ")).join(parts))
    return texts
