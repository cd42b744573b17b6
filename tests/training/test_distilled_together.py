"""Two processes under accelerate take half of each step's windows, and learn what one process does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import taught
from quantized import save_tiny_llama
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
