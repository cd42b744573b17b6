"""Two processes under accelerate learn what one does from half of each step's windows, whole or sharded."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import taught
from quantized import save_tiny_llama
from safetensors.torch import load_file, save_file
from together import train_together


@pytest.mark.slow
def test_two_processes_have_the_loss_curve_of_one(tmp_path: Path) -> None:
    """On answers of conversations, of which the two have different numbers of tokens in a step."""
    save_tiny_llama(tmp_path / "teacher", hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    (alone, weights), both = taught.losses(tmp_path, 2), train_together(taught.losses, tmp_path)
    assert len(alone) == 10 and alone[-1] < 0.95 * alone[0]
    for curve, learned in both:
        np.testing.assert_allclose(curve, alone, rtol=0, atol=1e-3)
        np.testing.assert_allclose(learned, weights, rtol=0, atol=1e-4)
    assert both[0] == both[1]


@pytest.mark.slow
def test_each_of_two_processes_writes_half_of_what_both_read(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "teacher", hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    wrote = {"teacher_writes": {"beginnings": 24, "share": 0.5}}
    (alone, weights), both = (
        taught.losses(tmp_path, 2, **wrote),
        train_together(partial(taught.losses, **wrote), tmp_path),
    )
    for curve, learned in both:
        np.testing.assert_allclose(curve, alone, rtol=0, atol=1e-3)
        np.testing.assert_allclose(learned, weights, rtol=0, atol=1e-4)
    written_files = [
        sorted(file.name for file in (tmp_path / f"scratch {rank}").glob("written-*")) for rank in range(3)
    ]
    assert written_files == [[f"written-beginnings-{part}.safetensors"] for part in ("12-0", "12-1", "24-0")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss": {"temperature": 1.0, "labels_weight": 0.2, "hidden_weight": 1.0}},
        {"lora": 4},
        {"memory": {"gradient_checkpointing": True}, "epochs": 2.0, "tokens": None},
    ],
    ids=["plain", "hidden", "lora", "epochs"],
)
def test_two_processes_that_share_the_weights_have_the_loss_curve_of_one(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    save_tiny_llama(tmp_path / "teacher", hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    alone, weights = taught.losses(tmp_path, 2, **settings)
    both = train_together(partial(taught.sharded, **settings), tmp_path)
    assert len(alone) >= 10
    for curve, learned, ((mine, all_mine), (theirs, all_theirs)) in both:
        np.testing.assert_allclose(curve, alone, rtol=0, atol=1e-3)
        np.testing.assert_allclose(learned, weights, rtol=0, atol=1e-4)
        assert mine < 0.55 * all_mine and theirs < 0.55 * all_theirs
    assert both[0][:2] == both[1][:2]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"memory": {"fsdp": True}}], ids=["plain", "shared"])
def test_what_breaks_in_one_process_is_said_by_both(settings: dict[str, Any], tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "teacher", hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    messages = train_together(partial(taught.refusal, **settings), tmp_path)
    expected = (
        r"became \w+ at step 4 of 10; the first layer whose outputs are not finite is \S*layers\.0\.mlp\.down_proj\."
    )
    assert re.search(expected, messages[0]), messages[0]
    assert messages[0] == messages[1]


@pytest.mark.slow
def test_zeros_stay_where_processes_share_the_weights(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "teacher", hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    file = tmp_path / "teacher" / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if name.endswith("_proj.weight"):
            tensors[name][:, ::2] = 0
    save_file(tensors, file, {"format": "pt"})
    for _, learned, _ in train_together(taught.sharded, tmp_path):
        assert [index for index, weight in enumerate(learned) if weight == 0] == list(range(0, 32, 2))
