"""Comparison of an 8-bit file with its float file in the terminal, by cause and layer."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from compress.benchmark.profile import CauseDifference, OperatorDifference
from compress.report.profile_formatting import time_text
from compress.utils.responsive_table import ResponsiveTable, TableColumn

_MOST = 12
_NAMED = 3
_LEAST = 0.002
"""Share of a call below which a cause is left out."""


def verdict_text(difference: OperatorDifference) -> str:
    """Return `INT8 is slower than float: 0.42x as fast (0.41-0.43), 7.1 ms a call for 3 ms`."""
    word = {"faster": "faster than", "slower": "slower than", "can't tell": "not proven faster than"}
    ratio = f"{difference.faster:.2f}x as fast ({difference.low:.2f}-{difference.high:.2f})"
    times = f"{time_text(difference.int8_ms)} a call for {time_text(difference.float_ms)}"
    return f"INT8 is {word[difference.verdict]} float: {ratio}, {times}"


def cause_text(cause: CauseDifference, difference: OperatorDifference) -> str:
    """Return the time of a cause with its operators and layers.

    Example: `3.9 ms more, 130% of the float file's time (MatMul in encoder.layer.0.attention and 5 more): why`.
    """
    layers = ", ".join(cause.layers[:_NAMED])
    more = len(cause.layers) - _NAMED
    layer_names = f"{layers} and {more} more" if more > 0 else layers
    operators = ", ".join(dict.fromkeys(cause.operators[:_NAMED]))
    share = cause.more_ms / difference.float_ms
    return (
        f"{cause.more_ms:.3g} ms more, {share:.0%} of the float file's time ({operators} in {layer_names}): {cause.why}"
    )


def console_difference(difference: OperatorDifference) -> RenderableType:
    """Return two tables. Times of layers and causes were measured with the profiler on."""
    return Group(Text(""), _causes(difference), _layers(difference))


def _causes(difference: OperatorDifference) -> ResponsiveTable:
    columns = [TableColumn("Time", right=True), TableColumn("Layers", right=True, rank=1)]
    columns += [TableColumn("Why"), TableColumn("What helps")]
    table = ResponsiveTable("What it spends and saves", columns)
    for cause in difference.causes:
        if abs(cause.more_ms) >= _LEAST * difference.float_ms:
            why = f"{cause.why} ({', '.join(dict.fromkeys(cause.operators))})"
            table.add(_signed(cause.more_ms), str(len(cause.layers)), why, cause.help)
    return table


def _layers(difference: OperatorDifference) -> ResponsiveTable:
    layers = difference.layers
    shown = layers if len(layers) <= _MOST else (*layers[: _MOST - 3], *layers[-3:])
    time_columns = (TableColumn(name, right=True) for name in ("Float", "INT8"))
    columns = [TableColumn("Layer"), *time_columns, TableColumn("Difference")]
    table = ResponsiveTable(
        "By layer, the slowest against float first" + ("" if shown is layers else "; the last three gain most"),
        [*columns, TableColumn("Operators", rank=2), TableColumn("Mostly", rank=1)],
    )
    for layer in shown:
        difference_text = f"{_signed(layer.more_ms)} ({layer.low_ms:+.3g} to {layer.high_ms:+.3g})"
        times = (time_text(layer.float_ms), time_text(layer.int8_ms), difference_text)
        table.add(layer.layer, *times, ", ".join(layer.operators), layer.why)
    return table


def _signed(milliseconds: float) -> str:
    return f"{'+' if milliseconds > 0 else '-'}{time_text(abs(milliseconds))}"
