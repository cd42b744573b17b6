"""What doctor says of two files that were timed: made-up times, as findings and as tables."""

from __future__ import annotations

from typing import Any

from narrow import broken_words, shown

from compress.benchmark.profile import CauseDifference, LayerDifference, OperatorDifference
from compress.cli.doctor_model import _findings
from compress.report.difference_console import console_difference


def difference(faster: float, low: float, high: float, **changes: Any) -> OperatorDifference:
    """A float file of 10 ms: dequantizing costs 3 ms in four layers, casts next to nothing, and products gain 1 ms."""
    layers = tuple(
        LayerDifference(
            layer=f"block[/{i}]", float_ms=1.0, int8_ms=1.0 + more, more_ms=more, low_ms=more - 0.1, high_ms=more + 0.1,
            operators=("MatMul",), why="apart", help="unsigned",
        )
        for i, more in enumerate((1.0, 0.3, 0.15, -0.5))
    )  # fmt: skip
    causes = (
        CauseDifference(why="apart", help="unsigned", more_ms=3.0, layers=tuple("abcd"), operators=("MatMul", "Cast")),
        CauseDifference(why="casts", more_ms=0.1, layers=("a",), operators=("Cast",)),
        CauseDifference(why="gain", more_ms=-1.0, layers=("a",), operators=("QGemm",)),
    )
    given: dict[str, Any] = {
        "schema_version": 1, "float_file": "f", "int8_file": "i", "target": "cpu", "threads": 1, "batch_size": 1,
        "calls": 1, "passes": 7, "float_ms": 10.0, "int8_ms": 10.0 / faster, "faster": faster, "low": low,
        "high": high, "layers": layers, "causes": causes,
    }  # fmt: skip
    return OperatorDifference(**{**given, **changes})


def test_a_slower_file_is_a_warning_with_its_causes() -> None:
    """Only what costs a fiftieth of a call is a cause worth a line."""
    verdict, cause = _findings(difference(0.8, 0.78, 0.82))
    assert verdict.level == cause.level == "warning"
    assert verdict.what == "INT8 is slower than float: 0.80x as fast (0.78-0.82), 12.5 ms a call for 10.0 ms"
    assert cause.what == "3 ms more, 30% of the float file's time (MatMul, Cast in a, b, c and 1 more): apart"
    assert cause.advice == "unsigned"
    assert next(iter(_findings(difference(1.0, 0.9, 1.1)))).what.startswith("INT8 is not proven faster than float")


def test_a_faster_file_names_the_layers_that_lose() -> None:
    """Beyond doubt, and a fiftieth of a call: the first two."""
    verdict, layers = _findings(difference(2.0, 1.9, 2.1))
    assert (verdict.level, layers.level, layers.advice) == ("ok", "ok", "unsigned")
    assert layers.what == "2 layers are slower than in float, by 1.3 ms together: block[/0], block[/1]"


def test_the_tables_show_names_as_they_are_and_leave_out_trifles() -> None:
    tables = console_difference(difference(0.8, 0.78, 0.82))
    assert broken_words(tables, 80) == []
    text = shown(tables, 200)
    assert "block[/3]" in text and "-500 µs (-0.6 to -0.4)" in text and "+3.00 ms" in text and "gain (QGemm)" in text
