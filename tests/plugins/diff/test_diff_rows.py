"""The ten planted changes of the benchmark, in a smaller model: each is found in its place."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def rows() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("diff")


@pytest.fixture
def one_model(rows: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides of every row begin as copies of one model, which is made once."""
    make = rows.model
    base = make(tmp_path / "base")

    def model(folder: Path, seed: int = 0) -> Path:
        return make(folder, seed) if seed else Path(shutil.copytree(base, folder))

    monkeypatch.setattr(rows, "model", model)


@pytest.mark.usefixtures("one_model")
def test_every_planted_change_is_found_in_its_place(rows: ModuleType, tmp_path: Path) -> None:
    told = {name: rows.plant(name, tmp_path / str(place)) for place, name in enumerate(rows.PLANTED)}
    assert {name: diff.first for name, diff in told.items() if not rows.found(name, diff)} == {}
    # What is found of one is not what is looked for of another.
    others = dict(zip(told, [*list(told.values())[1:], told["one layer retrained"]], strict=True))
    assert not any(rows.found(name, diff) for name, diff in others.items())


def test_a_pair_of_the_shape_of_a_larger_model_is_read_a_tensor_at_a_time(
    rows: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a table are read in stretches: none of it is in memory whole."""
    from compress.plugins.diff import dequantize

    sizes: list[int] = []
    read = dequantize.Weight.stored_chunks

    def watched(weight: dequantize.Weight):  # type: ignore[no-untyped-def]
        for part in read(weight):
            sizes.append(part.size)
            yield part

    monkeypatch.setattr(dequantize, "CHUNK", 1 << 10)
    monkeypatch.setattr(dequantize.Weight, "stored_chunks", watched)
    diff = rows.plant("three rows of the table zeroed", tmp_path)
    assert rows.found("three rows of the table zeroed", diff)
    assert len(sizes) > 100 and max(sizes) <= 1 << 10
