"""An `.onnx` file as the folder that a recipe starts from: what `export` would have written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from compress.models.folder_checks import INDEX, PROCESSOR_FILES, WEIGHTS
from compress.models.graph_inputs import GRAPH_INPUTS
from compress.sources.build_model import write_once
from compress.utils.digests import digest_file
from compress.utils.errors import ModelError
from compress.utils.progress import Progress, SilentProgress

CONFIG = "config.json"
CHANGES = "onnx_source.json"
"""Beside a graph: the file that it was, and what was done to it."""
_REVISION = 1
"""Raised when the same file would be turned into another folder."""
_BESIDE = (".json", ".txt", ".model", ".jinja")
_FLOAT = ("model.onnx", "encoder_model.onnx")


def onnx_file(place: Path) -> Path | None:
    """The graph that a file, or a folder without a checkpoint, is; None where it is no graph.

    Of several in a folder `model.onnx` is meant. Raises `ModelError` where it doesn't say which.
    """
    if place.is_file():
        return place if place.suffix.lower() == ".onnx" else None
    if not place.is_dir() or any((place / name).is_file() for name in (WEIGHTS, INDEX)):
        return None
    found = sorted([*place.glob("*.onnx"), *place.glob("onnx/*.onnx")])
    named = [file for file in found if file.name in _FLOAT]
    if len(found) > 1 and len(named) != 1:
        raise ModelError(
            f"The folder holds {len(found)} graphs: {', '.join(file.name for file in found[:5])}.",
            where=str(place),
            expected="one .onnx file, or one that is called model.onnx",
            hint="name the file itself as `model`",
        )
    return next(iter(named or found), None)


def convert_onnx(file: Path, cache: Path, arrays: bool, progress: Progress | None = None) -> Path:
    """The folder below ``cache`` with the graph of ``file``, made ready at the first call.

    With ``arrays`` it says what inputs the graph takes; without, it has the processor's files and the config that lie
    beside the graph. Raises `ModelError`.
    """
    target = ready_folder(file, cache, arrays)
    if target.is_dir():
        return target
    (progress or SilentProgress()).note(f"making {file.name} ready in {cache}")
    beside = [] if arrays else companions_of(file)

    def write(made: Path) -> None:
        _write(file, made, beside, arrays)

    return write_once(target, write, "free some space or name another folder with --artifacts")


def ready_folder(file: Path, cache: Path, arrays: bool) -> Path:
    """Where `convert_onnx` puts the graph of ``file``, whether it is there yet or not. Raises `ModelError`."""
    from compress.utils.storage import cache_key

    files = [file, *_external(file), *([] if arrays else companions_of(file))]
    digests = {path.name: digest_file(path) for path in files}
    return cache / f"onnx-{cache_key({'revision': _REVISION, 'files': digests, 'arrays': arrays})[:32]}"


def companions_of(file: Path) -> list[Path]:
    """Config and processor files beside a graph, or a folder above in the layout of transformers.js.

    Raises `ModelError` where they are not there.
    """
    homes = [file.parent, *([file.parent.parent] if file.parent.name == "onnx" else [])]
    for home in homes:
        if (home / CONFIG).is_file() and any((home / name).is_file() for name in PROCESSOR_FILES):
            return sorted(path for path in home.iterdir() if path.suffix in _BESIDE and path.is_file())
    raise ModelError(
        "Nothing beside the graph says how its inputs are prepared.",
        where=str(homes[-1]),
        expected=f"{CONFIG}, with `id2label` for a classifier, and a tokenizer.json or a preprocessor_config.json",
        hint="put them there, or leave `task` out: then agreement with the original graph is measured",
    )


def has_companions(file: Path) -> bool:
    """Whether a task can be named for a graph, since a processor lies beside it."""
    try:
        return bool(companions_of(file))
    except ModelError:
        return False


def _external(file: Path) -> list[Path]:
    """The files beside a graph in which weights lie."""
    from compress.formats.onnx.graph_reader import read_graph

    names = {item.external.get("location", "") for item in read_graph(file).initializers if item.external}
    return sorted(path for name in names if name and (path := file.parent / name).is_file())


def _write(file: Path, made: Path, beside: Iterable[Path], arrays: bool) -> None:
    from compress.formats.onnx.import_onnx import import_graph, rename_for_clients
    from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel

    start = import_graph(file) if arrays else rename_for_clients(import_graph(file))
    made.mkdir()
    facts = {
        "file": file.name,
        "sha256": digest_file(file),
        "changes": list(start.changes),
        "failures": list(start.failures),
    }
    texts = {CHANGES: json.dumps(facts, indent=1).encode() + b"\n"}
    if arrays:
        texts |= {GRAPH_INPUTS: start.inputs.as_json(), CONFIG: b"{}\n"}
    OnnxModel(start.graph, FLOAT_GRAPH, texts).save(made)
    for path in beside:
        shutil.copyfile(path, made / path.name)
