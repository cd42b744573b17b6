"""The fewest that must be given up: every answer, and how often it asks."""

from __future__ import annotations

import math

import pytest

from compress.stages.onnx_int8.accuracy_aware import fewest


@pytest.mark.parametrize("count", [0, 1, 2, 7, 26, 100])
def test_every_answer_is_found_with_few_questions(count: int):
    for answer in range(count + 1):
        asked: list[int] = []

        def holds(k: int, answer: int = answer, asked: list[int] = asked) -> bool:
            asked.append(k)
            return k >= answer

        assert fewest(count, holds) == answer
        assert len(asked) <= 2 + 2 * math.ceil(math.log2(max(answer, 1)))
        assert count not in asked or count == 0


def test_when_time_is_over_what_is_known_to_hold_is_taken():
    # 1, 2, 4 and 8 are asked; 6 would be the next.
    left = iter([True] * 4 + [False])
    actual = fewest(64, lambda k: k >= 5, lambda: next(left))
    assert actual == 8


def test_where_one_is_enough_two_questions_show_it():
    asked: list[int] = []
    assert fewest(1000, lambda k: asked.append(k) or k >= 1) == 1
    assert asked == [0, 1]
