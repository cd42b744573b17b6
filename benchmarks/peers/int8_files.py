"""Files of one float graph by several quantizers, beside each other, and what a table says of their speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import onnx

from compress.errors import CompressError
from compress.models.onnx_model import FLOAT_GRAPH, QUANTIZED_GRAPH, OnnxModel
from compress.progress import Progress

FLOAT = "fp32"


def write_files(
    ways: Mapping[str, Callable[[], onnx.ModelProto]], companions: Mapping[str, bytes], folder: Path, progress: Progress
) -> tuple[dict[str, Path], list[str]]:
    """A model folder below ``folder`` for each of ``ways``; one that fails is left out, and a note says why."""
    made, notes = {}, []
    for name, way in ways.items():
        progress.note(f"-- {name}")
        try:
            graph = way()
        except (CompressError, ValueError, RuntimeError, KeyError) as error:
            notes.append(f"{name} made no file: {error}")
            continue
        place = folder / name.replace(" ", "-").replace(",", "").replace("'", "")
        place.mkdir(parents=True)
        OnnxModel(graph, FLOAT_GRAPH if name == FLOAT else QUANTIZED_GRAPH, companions).save(place)
        made[name] = place
    return made, notes


def speed_text(faster: float | None, low: float | None, high: float | None) -> str:
    """`2.17x (2.12-2.23)`; the baseline's own speed-up has no interval."""
    if faster is None:
        return "not timed"
    return f"{faster:.2f}x" + (f" ({low:.2f}-{high:.2f})" if low is not None and high is not None else "")
