import numpy as np
import pytest
import torch

from compress.numerics.pooling import POOLING_MODES, pool

HIDDEN = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32))
MASKS = {
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
}


def one_by_one(rows: np.ndarray, mode: str) -> np.ndarray:
    """Of the real tokens [L, H] of one text, by each mode's words."""
    places = np.arange(1, len(rows) + 1)[:, None]
    return {
        "cls": rows[0],
        "lasttoken": rows[-1],
        "max": rows.max(axis=0),
        "mean": rows.sum(axis=0) / len(rows),
        "mean_sqrt_len_tokens": rows.sum(axis=0) / np.sqrt(len(rows)),
        "weightedmean": (rows * places).sum(axis=0) / places.sum(),
    }[mode]


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("mode", POOLING_MODES)
def test_padding_on_either_side_does_not_count(mode: str, side: str) -> None:
    mask = torch.tensor(MASKS[side])
    expected = [one_by_one(rows[keep == 1].numpy(), mode) for rows, keep in zip(HIDDEN, mask, strict=True)]
    np.testing.assert_allclose(pool(HIDDEN, mask, (mode,)), expected, rtol=1e-5, atol=1e-6)


def test_several_modes_are_joined_in_their_order() -> None:
    mask = torch.tensor(MASKS["right"])
    both = pool(HIDDEN, mask, ("max", "cls"))
    assert torch.equal(both, torch.cat([pool(HIDDEN, mask, ("max",)), HIDDEN[:, 0]], dim=1))
