"""Tests of texts with replaced words: shares, frequencies and draws against closed forms."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from compress.stages.distill.replaced_words import replace_words


def test_each_round_replaces_its_share_of_words() -> None:
    # Every word occurs once. A replaced word is therefore the old one in only 1 of 20,000 draws.
    texts = [" ".join(f"t{text}w{place}" for place in range(100)) for text in range(200)]
    made = replace_words(texts, 600, seed=0)
    assert len(made) == 600 and all(len(text.split()) == 100 for text in made)
    for number, rate in enumerate((0.2, 0.4, 0.6)):
        kept = 0
        for text in made[200 * number : 200 * (number + 1)]:
            ((_, most),) = Counter(word.split("w")[0] for word in text.split()).most_common(1)
            kept += most
        # 20,000 draws have a standard deviation of 0.35% at most.
        assert kept / 20_000 == pytest.approx(1 - rate, abs=0.016)


def test_each_round_varies_every_text_once() -> None:
    texts = [" ".join(f"t{text}w{place}" for place in range(100)) for text in range(50)]
    for round_ in np.array_split(replace_words(texts, 100, seed=0), 2):
        origins = [Counter(word.split("w")[0] for word in text.split()).most_common(1)[0][0] for text in round_]
        assert sorted(origins) == sorted(f"t{text}" for text in range(50))


def test_words_are_drawn_by_the_root_of_their_count() -> None:
    # 900 of "a" and 100 of "b": drawn 3 to 1. A text of "c" alone shows only what is drawn: 30 to 10 to 20.
    texts = ["a " * 900, "b " * 100, "c " * 400]
    drawn: Counter[str] = Counter()
    for seed in range(40):
        drawn.update(word for text in replace_words(texts, 3, seed) for word in text.split() if text.count("c") > 250)
    total = drawn["a"] + drawn["b"]
    # About 40 texts of 400 words, of which 20% are replaced, half of these by "a" and a sixth by "b".
    assert total > 1500 and drawn["a"] / total == pytest.approx(0.75, abs=0.04)


def test_the_seed_decides_every_draw() -> None:
    texts = ["one two three four", "five six", ""]
    assert replace_words(texts, 20, seed=1) == replace_words(texts, 20, seed=1) != replace_words(texts, 20, seed=2)
    words = set(" ".join(texts).split())
    assert all(set(text.split()) <= words for text in replace_words(texts, 20, seed=1))


@pytest.mark.parametrize(("texts", "count"), [([], 5), (["", " "], 5), (["one"], 0)])
def test_nothing_is_made_of_nothing(texts: list[str], count: int) -> None:
    assert replace_words(texts, count, seed=0) == []
