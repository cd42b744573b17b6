from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from onnx_samples import classifier, with_external_data
from safetensors.numpy import save_file

from compress.inspection.tensors import read_model
from compress.inspection.weight_statistics import describe, measure_weights
from compress.utils.progress import SilentProgress


def test_small_array_by_hand() -> None:
    statistics = describe(np.array([[0, 1], [2, 5]], np.float32))
    assert (statistics.sparsity, statistics.minimum, statistics.maximum, statistics.mean, statistics.not_finite) == (
        0.25,
        0,
        5,
        2,
        0,
    )
    assert statistics.std == pytest.approx((14 / 4) ** 0.5)  # squared distances 4, 1, 0, 9
    assert statistics.outliers == 0


def test_outliers_are_beyond_six_standard_deviations() -> None:
    # 99 zeros and a one: mean 0.01, std sqrt(0.0099), distance of the one 9.95 standard deviations.
    values = np.zeros(100)
    values[7] = 1
    assert describe(values).outliers == 0.01
    # 30 zeros and a one: distance sqrt(30) = 5.5 standard deviations.
    assert describe(np.append(np.zeros(30), 1.0)).outliers == 0


def test_pieces_do_not_change_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(3, 2, size=1001).astype(np.float32)
    values[::10] = 0
    monkeypatch.setattr("compress.inspection.weight_statistics.CHUNK_ELEMENTS", 64)
    statistics = describe(values)
    wide = values.astype(np.float64)
    assert statistics.mean == pytest.approx(wide.mean(), rel=1e-12)
    assert statistics.std == pytest.approx(wide.std(), rel=1e-12)
    assert statistics.sparsity == 101 / 1001
    assert (statistics.minimum, statistics.maximum) == (wide.min(), wide.max())


def test_values_that_are_not_finite_are_counted_and_left_out() -> None:
    statistics = describe(np.array([1.0, np.nan, 3.0, np.inf]))
    assert (statistics.not_finite, statistics.mean, statistics.maximum) == (2, 2.0, 3.0)
    assert describe(np.array([np.nan])).not_finite == 1


def test_bfloat16_weights_are_read(tmp_path: Path) -> None:
    save_file({"w": np.array([1.5, -2.0, 0.0, 0.0]).astype(ml_dtypes.bfloat16)}, tmp_path / "x.safetensors")
    statistics = measure_weights(read_model(tmp_path / "x.safetensors"), SilentProgress())["w"]
    assert (statistics.minimum, statistics.maximum, statistics.sparsity) == (-2.0, 1.5, 0.5)


def test_onnx_weights_inside_and_outside(tmp_path: Path) -> None:
    inside = measure_weights(read_model(classifier(tmp_path / "c.onnx")), SilentProgress())
    assert inside["m.encoder.layer.0.output.dense.weight"].mean == 1
    assert not any("scale" in name or "val_9" in name for name in inside)
    outside = measure_weights(read_model(with_external_data(tmp_path)), SilentProgress())
    assert set(outside) == {"a.weight", "c.weight"}
    assert (outside["a.weight"].mean, outside["a.weight"].sparsity) == (5.5, pytest.approx(1 / 12))
