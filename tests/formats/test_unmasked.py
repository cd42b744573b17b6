"""A detector without masks of padding that isn't there answers as it does with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_places import SIDE, detr, yolos

from compress.formats.tracing import without_padding_masks


def test_a_detector_is_traced_without_its_masks_and_answers_the_same() -> None:
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


def test_a_model_that_makes_no_masks_is_left_as_it_is() -> None:
    module, _ = yolos()
    with without_padding_masks(module):
        assert not any(part._forward_pre_hooks for part in module.modules())
