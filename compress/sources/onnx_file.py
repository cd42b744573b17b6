"""Conversion of an `.onnx` file to a starting folder, in the layout that the `onnx` stage writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from compress.models.folder_checks import INDEX, PROCESSOR_FILES, WEIGHTS
from compress.models.graph_inputs import GRAPH_INPUTS
from compress.sources.build_model import write_once
from compress.utils.errors import ModelError
from compress.utils.progress import Progress, SilentProgress
from compress.utils.storage import cache_key, digest_file

CONFIG = "config.json"
CHANGES = "onnx_source.json"
"""File beside a graph with the name of its source file and the changes made to it."""
_REVISION = 1
"""Increase it when the same file should be converted into another folder."""
_BESIDE = (".json", ".txt", ".model", ".jinja")
_FLOAT = ("model.onnx", "encoder_model.onnx")


def onnx_file(place: Path) -> Path | None:
    """Return the graph of a file, or of a folder without a checkpoint; None if there is none.

    Among several graphs in a folder, `model.onnx` is selected. Raises `ModelError` if the choice is ambiguous.
    """
    if place.is_file():
        return place if place.suffix.lower() == ".onnx" else None
    if not place.is_dir() or any((place / name).is_file() for name in (WEIGHTS, INDEX)):
        return None
    graphs = sorted([*place.glob("*.onnx"), *place.glob("onnx/*.onnx")])
    main_graphs = [file for file in graphs if file.name in _FLOAT]
    if len(graphs) > 1 and len(main_graphs) != 1:
        raise ModelError(
            f"The folder holds {len(graphs)} graphs: {', '.join(file.name for file in graphs[:5])}.",
            where=str(place),
            expected="one .onnx file, or one that is called model.onnx",
            hint="name the file itself as `model`",
        )
    return next(iter(main_graphs or graphs), None)


def convert_onnx(file: Path, cache: Path, arrays: bool, progress: Progress | None = None) -> Path:
    """Return the folder below ``cache`` with the graph of ``file``, converted on the first call.

    Args:
        file: The `.onnx` file.
        cache: Folder for converted models.
        arrays: Describe the graph's inputs instead of copying the processor's files and the config.
        progress: Receiver of messages.

    Raises:
        ModelError: If the graph cannot be used or files are missing.
    """
    from compress.formats.onnx.import_onnx import import_graph, rename_for_clients
    from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel

    def write(output: Path) -> None:
        (progress or SilentProgress()).note(f"making {file.name} ready in {cache}")
        # Tasks of the project expect the input names of transformers.
        start = import_graph(file) if arrays else rename_for_clients(import_graph(file))
        output.mkdir()
        changes = {"changes": list(start.changes), "failures": list(start.failures)}
        facts = {"file": file.name, "sha256": digest_file(file), **changes}
        texts = {CHANGES: json.dumps(facts, indent=1).encode() + b"\n"}
        if arrays:
            texts |= {GRAPH_INPUTS: start.inputs.as_json(), CONFIG: b"{}\n"}
        OnnxModel(start.graph, FLOAT_GRAPH, texts).save(output)
        # A task of plain arrays needs no processor.
        for path in () if arrays else companions_of(file):
            shutil.copyfile(path, output / path.name)

    return write_once(ready_folder(file, cache, arrays), write)


def ready_folder(file: Path, cache: Path, arrays: bool) -> Path:
    """Return the path to which `convert_onnx` writes the graph, whether it exists or not. Raises `ModelError`."""
    from compress.formats.onnx.graph_reader import read_graph

    # External weights belong to the graph's identity.
    names = {item.external.get("location", "") for item in read_graph(file).initializers if item.external}
    files = [
        file,
        *sorted(path for name in names if name and (path := file.parent / name).is_file()),
        *([] if arrays else companions_of(file)),
    ]
    digests = {path.name: digest_file(path) for path in files}
    return cache / f"onnx-{cache_key({'revision': _REVISION, 'files': digests, 'arrays': arrays})[:32]}"


def companions_of(file: Path) -> list[Path]:
    """Return config and processor files beside a graph, or one folder up in the layout of transformers.js.

    Raises `ModelError` if there are none.
    """
    # transformers.js stores graphs in a subfolder `onnx/`.
    homes = [file.parent, *([file.parent.parent] if file.parent.name == "onnx" else [])]
    for home in homes:
        if (home / CONFIG).is_file() and any((home / name).is_file() for name in PROCESSOR_FILES):
            return sorted(path for path in home.iterdir() if path.suffix in _BESIDE and path.is_file())
    raise ModelError(
        "The graph's folder has no config and processor for its inputs.",
        where=str(homes[-1]),
        expected=f"{CONFIG}, with `id2label` for a classifier, and a tokenizer.json or a preprocessor_config.json",
        hint="put them there, or leave `task` out: then agreement with the original graph is measured",
    )


def has_companions(file: Path) -> bool:
    """Return True if a processor is stored with the graph, so that a task can be named for it."""
    try:
        return bool(companions_of(file))
    except ModelError:
        return False
