"""Model folders by several quantizers, beside each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from compress.errors import CompressError
from compress.models.onnx_model import OnnxModel
from compress.progress import Progress
from compress.runtimes import get_runtime
from compress.runtimes.onnxruntime import FAILURES
from compress.targets import TARGETS

OURS, FLOAT = "ours", "fp32"
Ways = Mapping[str, Callable[[], OnnxModel]]
"""What each file is called in the tables -> how it is made."""


def write_files(ways: Ways, folder: Path, progress: Progress) -> tuple[dict[str, Path], list[str]]:
    """A model folder below ``folder`` for each of ``ways``; one that fails or doesn't open is left out, with a note."""
    made, notes = {}, []
    for name, way in ways.items():
        progress.note(f"-- {name}")
        place = folder / folder_name(name)
        try:
            model = way()
            place.mkdir(parents=True)
            model.save(place)
            get_runtime("onnxruntime").open(place, TARGETS["cpu"], 1)
        except (CompressError, ValueError, RuntimeError, LookupError, *FAILURES) as error:
            notes.append(f"{name}: no file, {_first_line(error)}")
            continue
        made[name] = place
    return made, notes


def folder_name(name: str) -> str:
    """The folder of the file that the tables call ``name``."""
    return name.replace(" ", "-").replace(",", "").replace("'", "")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
