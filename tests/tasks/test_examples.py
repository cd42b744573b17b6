"""Tests of example batches: padding, stacking and lazy inputs, compared with arrays by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from compress.tasks.task import Examples
from compress.utils.errors import DataError


def test_texts_are_right_padded_with_value_of_each_input() -> None:
    inputs = [{"input_ids": np.arange(1, n + 1), "attention_mask": np.ones(n, np.int64)} for n in (2, 4)]
    batch = Examples(inputs, {"input_ids": 9, "attention_mask": 0}).batch([1, 0])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [1, 2, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["input_ids"].dtype == np.int64


def test_arrays_keep_dtype_and_are_padded_along_differing_axes() -> None:
    inputs = [{"input_features": np.full((2, n), n, np.float32)} for n in (1, 3)]
    batch = Examples(inputs, {"input_features": -0.5}).batch([0, 1])["input_features"]
    assert batch.dtype == np.float32
    assert batch.tolist() == [[[1, -0.5, -0.5]] * 2, [[3, 3, 3]] * 2]


def test_both_axes_of_an_image_are_padded() -> None:
    inputs = [{"pixel_values": np.ones((1, *shape), np.uint8)} for shape in ((1, 2), (2, 1))]
    batch = Examples(inputs, {"pixel_values": 7}).batch([0, 1])["pixel_values"]
    assert batch.tolist() == [[[[1, 1], [7, 7]]], [[[1, 7], [1, 7]]]]


def test_inputs_without_padding_are_stacked_or_rejected() -> None:
    images = [{"pixel_values": np.full((3, 2, width), width, np.float32)} for width in (2, 2, 3)]
    examples = Examples(images, {"pixel_values": None})
    assert examples.batch([0, 1])["pixel_values"].shape == (2, 3, 2, 2)
    with pytest.raises(DataError, match=r"pixel_values differ in shape: \[3, 2, 2\] and \[3, 2, 3\]"):
        examples.batch([1, 2])


def test_batch_has_only_model_inputs() -> None:
    examples = Examples([{"input_ids": np.ones(2, np.int64), "words": np.ones(1, np.int64)}], {"input_ids": 0})
    assert list(examples.batch([0])) == ["input_ids"]


def test_length_is_size_of_last_axis() -> None:
    assert Examples([{"a": np.zeros(3)}, {"a": np.zeros(5)}], {"a": 0}).lengths().tolist() == [3, 5]
    assert Examples([{"a": np.zeros((80, 30))}], {"a": 0}).lengths().tolist() == [30]


class Lazy(Sequence[dict[str, np.ndarray]]):
    """Three examples that are created on access; ``made`` records the indices."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:  # type: ignore[override]
        self.made.append(index)
        return {"a": np.full((1, 2), index, np.float32)}


def test_examples_may_be_created_lazily() -> None:
    inputs = Lazy()
    examples = Examples(inputs, {"a": None}, sizes=np.full(3, 2))
    assert (len(examples), examples.lengths().tolist(), inputs.made) == (3, [2, 2, 2], [])
    assert examples.batch([2, 0])["a"].tolist() == [[[2, 2]], [[0, 0]]]
    assert inputs.made == [2, 0]
