"""Searches on the table of a real space, every recipe of which was once run."""

from __future__ import annotations

import gzip
import json

import search


def test_the_best_is_found_for_less_than_half_of_what_chance_pays() -> None:
    kept = json.loads(gzip.decompress(search.TABLE.read_bytes()))
    found = search._summary([search._replayed(kept, bound=0.88, searches=24, confidence=0.95, wrong_by=0.0)])
    assert float(found["random search costs"].removesuffix("x")) >= 2
    assert float(found["share of the cost until it is found, median"].removesuffix("%")) <= 30
