from io import StringIO
from pathlib import Path

from onnx_samples import classifier
from rich.console import Console

from compress.inspection.budget import budget_of
from compress.inspection.budget_rendering import write_budget
from compress.utils.responsive_table import bar


def shown(path: Path, depth: int, top: int, weights: bool = False) -> str:
    console = Console(file=StringIO(), width=160)
    write_budget(budget_of(path, weights=weights), depth, top, console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_bars_are_proportional() -> None:
    assert bar(0, 16).strip() == ""
    assert bar(0.5, 16) == "█" * 8 + " " * 8
    assert bar(1, 16) == "█" * 16
    assert bar(1 / 128, 16) == "▏" + " " * 15


def test_depth_limits_the_tree(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    flat, deep = shown(path, 1, 0), shown(path, 9, 0)
    assert "classifier" in flat
    assert "encoder" not in flat
    assert "query+key" in deep
    assert "largest" not in flat


def test_largest_tensors_and_statistics(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    text = shown(path, 1, 2, weights=True)
    assert "largest 2 tensors" in text
    row = next(line for line in text.splitlines() if "output.dense.weight" in line)
    assert row.split() == [
        "m.encoder.layer.0.output.dense.weight",
        "4x6",
        "float32",
        "96",
        "B",
        f"{96 / 341:.1%}",
        "0.0%",
        "1",
        "1",
        "1",
        "0",
        "0.000%",
    ]


def test_no_name_is_cut_in_80_columns(tmp_path: Path) -> None:
    budget = budget_of(classifier(tmp_path / "m.onnx"), weights=True)
    console = Console(file=StringIO(), width=80)
    write_budget(budget, 9, 99, console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80
    assert all(f"\n{tensor.name} " in text for tensor in budget.tensors)
    assert "\u2026" not in text
