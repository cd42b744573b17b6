"""Numbers on the plainest grid of so many bits: what a file of those bits may err by, whoever wrote it."""

from __future__ import annotations

import numpy as np

_BLOCK = 32


def on_coarse_grid(values: np.ndarray, bits: int) -> np.ndarray:
    """``values`` rounded: to half precision for 16 bits, else to 2^bits steps from the least, or 0, to the greatest.

    One grid spans all values, that of a convolution's weights (three axes or more) one output channel, that of fewer
    than 8 bits a block of 32 in a row.
    """
    if bits >= 32:
        return values
    if bits == 16:
        return values.astype(np.float16).astype(values.dtype)
    if bits < 8:
        blocks = np.pad(values.reshape(-1, values.shape[-1]), ((0, 0), (0, -values.shape[-1] % _BLOCK)))
        rounded = _on_grid(blocks.reshape(-1, _BLOCK), bits).reshape(blocks.shape)[:, : values.shape[-1]]
        return rounded.reshape(values.shape)
    rows = values.reshape(len(values), -1) if values.ndim > 2 else values.reshape(1, -1)
    return _on_grid(rows, bits).reshape(values.shape)


def _on_grid(rows: np.ndarray, bits: int) -> np.ndarray:
    """Each row of [n, m] on a grid of its own."""
    low, high = np.minimum(rows.min(axis=1, keepdims=True), 0), np.maximum(rows.max(axis=1, keepdims=True), 0)
    step = (high - low) / (2**bits - 1)
    step[step == 0] = 1
    rounded: np.ndarray = (np.rint(rows / step) * step).astype(rows.dtype)
    return rounded
