"""Where two paths of latents part, of paths that are straight lines."""

from __future__ import annotations

import numpy as np
import pytest

from compress.plugins.diffusion.sampling_drift import SamplingPath, drift

TIMES = np.array([1000.0, 750.0, 500.0, 250.0, 0.0])


def _path(times: np.ndarray, slope: float, turn: float = 1000.0) -> SamplingPath:
    """Two pictures whose latents are 1, and below ``turn`` leave it by ``slope`` of what they came down."""
    away = slope * np.maximum(turn - times, 0) / 1000
    return SamplingPath(times, np.broadcast_to((1 + away)[:, None, None, None, None], (len(times), 2, 3, 2, 2)))


def test_the_distance_is_over_the_baselines_own_size() -> None:
    found = drift(_path(TIMES, 0.0), _path(TIMES, 0.4))
    assert found.distances == pytest.approx(np.repeat([[0.0], [0.1], [0.2], [0.3], [0.4]], 2, axis=1))
    assert found.typical == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert found.added == pytest.approx([0.1] * 4)
    halved = drift(_path(TIMES, 1.0), _path(TIMES, 1.4))
    assert halved.typical == pytest.approx([0, 0.1 / 1.25, 0.2 / 1.5, 0.3 / 1.75, 0.4 / 2])


def test_paths_part_where_they_stay_apart() -> None:
    assert drift(_path(TIMES, 0.0), _path(TIMES, 0.8, turn=500.0)).parting() == 3
    assert drift(_path(TIMES, 0.0), _path(TIMES, 0.8, turn=500.0)).parting(0.3) == 4
    assert drift(_path(TIMES, 0.0), _path(TIMES, 0.05)).parting() is None


def test_a_path_that_comes_back_has_not_parted() -> None:
    away = np.array([1.0, 1.5, 1.5, 1.0, 1.0])[:, None, None] * np.ones((5, 2, 3))
    assert drift(_bare(np.ones((5, 2, 3))), _bare(away)).parting() is None
    away[-1] = 1.2
    assert drift(_bare(np.ones((5, 2, 3))), _bare(away)).parting() == 4


def _bare(latents: np.ndarray) -> SamplingPath:
    return SamplingPath(TIMES, latents)


def test_few_steps_are_compared_where_they_are() -> None:
    few = np.array([1000.0, 600.0, 0.0])
    found = drift(_path(TIMES, 1.0), _path(few, 1.5))
    assert found.times.tolist() == few.tolist()
    assert found.typical == pytest.approx([0, 0.2 / 1.4, 0.5 / 2])
    assert drift(_path(few, 1.5), _path(TIMES, 1.0)).typical == pytest.approx([0, 0.2 / 1.6, 0.5 / 2.5])


@pytest.mark.parametrize(
    ("times", "latents", "said"),
    [
        (TIMES[::-1], np.ones((5, 2, 3)), "falling"),
        (TIMES, np.ones((4, 2, 3)), "falling"),
        (TIMES, np.ones((5, 3, 3)), "pair"),
        (TIMES, np.full((5, 2, 3), np.nan), "NaN"),
    ],
)
def test_paths_that_cannot_be_compared(times: np.ndarray, latents: np.ndarray, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        drift(_bare(np.ones((5, 2, 3))), SamplingPath(times, latents))
