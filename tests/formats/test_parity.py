"""Tests of parity checks: the largest difference is reported, and differences beyond the tolerance are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny_places import SIDE, detr, yolos

from compress.formats.parity import (
    Answers,
    check_parity,
    check_shipped_parity,
    distance,
    measure_distance,
    mixed_batches,
    session_answers,
    torch_answers,
)
from compress.formats.tracing import without_padding_masks
from compress.tasks.task import Examples
from compress.utils.errors import IntegrityError

MODEL = tiny.encoder(num_hidden_layers=1)


@pytest.fixture(scope="module")
def examples() -> Examples:
    return tiny.context().encode("train", MODEL)


class Shifted:
    """Session whose logits equal torch's except for a constant added to the first entry."""

    def __init__(self, by: float) -> None:
        self._by = by

    def predict(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            logits = MODEL.module(**{name: torch.from_numpy(array) for name, array in batch.items()}).logits.numpy()
        return {"logits": logits + np.eye(1, logits.size, dtype=np.float32).reshape(logits.shape) * self._by}


def shifted(by: float, examples: Examples) -> Answers:
    return session_answers(Shifted(by), examples)  # type: ignore[arg-type]


def test_largest_difference_and_range_of_reference() -> None:
    difference = distance([(np.array([1.0, -4.0]), np.array([1.5, -4.0])), (np.array([2.0]), np.array([1.75]))])
    assert (difference.worst, difference.lowest, difference.highest, difference.largest) == (0.5, -4.0, 2.0, 4.0)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_nan_difference_is_kept_at_any_position(index: int) -> None:
    arrays = [np.zeros(2), np.zeros(2), np.zeros(2)]
    arrays[index][1] = np.nan
    assert np.isnan(distance((np.zeros(2), array) for array in arrays).worst)


def test_batches_mix_short_and_long_rows_and_one_is_alone(examples: Examples) -> None:
    *mixed, alone = mixed_batches(examples)
    lengths = examples.lengths()
    assert len(alone) == 1 and lengths[alone[0]] == lengths.min()
    assert all(len(batch) == 8 and np.ptp(lengths[batch]) >= np.ptp(lengths) / 2 for batch in mixed)


@pytest.mark.parametrize("by", [0.25, np.nan])
def test_difference_beyond_tolerance_and_nan_are_refused(examples: Examples, by: float) -> None:
    reference = torch_answers(MODEL.module, examples)
    assert check_parity(reference, shifted(0.0, examples), examples, 1e-5, "It differs").worst < 1e-5
    with pytest.raises(IntegrityError) as caught:
        check_parity(reference, shifted(by, examples), examples, 0.2, "It differs from torch", hint="mend it")
    assert caught.value.what == f"It differs from torch by {by:.2e}."
    assert (caught.value.expected, caught.value.hint) == ("at most 0.2 on padded batches", "mend it")
    assert measure_distance(reference, shifted(0.25, examples), examples).worst == pytest.approx(0.25, abs=1e-5)


def test_quantized_file_is_measured_and_only_fp32_must_meet_tolerance(examples: Examples) -> None:
    plain, small, off = Shifted(0.0), Shifted(0.5), Shifted(0.1)
    reference = torch_answers(MODEL.module, examples)

    def note(first: Shifted, shipped: Shifted) -> str:
        return check_shipped_parity("Strange", first, shipped, reference, examples, 1e-3)  # type: ignore[arg-type]

    assert "from torch in fp32, by 5.0e-01 as they ship, where the largest is" in note(plain, small)
    assert note(plain, plain).endswith("from torch in fp32")
    with pytest.raises(IntegrityError, match=r"In Strange the logits differ from torch by 1\.00e-01"):
        note(off, small)
    with pytest.raises(IntegrityError, match="In Strange the logits are not all finite in fewer bits"):
        note(plain, Shifted(float("nan")))


def test_detector_without_padding_masks_has_the_same_outputs() -> None:
    module, _ = detr()
    seen: list[Any] = []
    encoder = module.model.encoder
    whole = encoder.forward
    encoder.forward = lambda **named: (seen.append(named["attention_mask"]), whole(**named))[1]
    pixels = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        expected = module(pixel_values=pixels)
        with without_padding_masks(module):
            answer = module(pixel_values=pixels)
        module(pixel_values=pixels)
    assert [mask is None for mask in seen] == [False, True, False]
    for name in ("logits", "pred_boxes"):
        assert answer[name].numpy() == pytest.approx(expected[name].numpy(), abs=1e-6)


def test_model_without_padding_masks_is_unchanged() -> None:
    module, _ = yolos()
    with without_padding_masks(module):
        assert not any(part._forward_pre_hooks for part in module.modules())
