"""`genai_config.json`, by which onnxruntime-genai finds a decoder's graph and knows its inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.checkpoints.json_file import read_json
from compress.errors import ModelError
from compress.formats.onnx.model import GENAI_CONFIG, find_graph

_CODE = "custom_ops_library"
"""The setting by which onnxruntime-genai loads a library of anybody's into the process."""
_NUMBERS = ("context_length", "vocab_size")


def read_genai_config(folder: Path) -> Mapping[str, Any]:
    """What the file says of the one graph in ``folder``.

    Raises `ModelError` where there is none, where it names another graph or code to be loaded, or lacks what we read.
    """
    path = folder / GENAI_CONFIG
    if not path.is_file():
        raise ModelError(
            "The folder has no genai_config.json.",
            where=str(folder),
            expected="a decoder's folder as the stage export or onnxruntime-genai's own builder writes it",
            mend="write the model with the stage export, for the task text-generation",
        )
    config = read_json(path)
    if _names_code(config):
        raise ModelError(
            f"genai_config.json names a library to be loaded ({_CODE}), which may run anything.",
            where=str(path),
            expected="a graph of ONNX Runtime's own operators",
            mend="take the entry out if the model runs without it",
        )
    model = _part(config, "model")
    named = _part(model, "decoder").get("filename")
    if not isinstance(named, str) or not all(isinstance(model.get(name), int) for name in _NUMBERS):
        raise ModelError(
            "genai_config.json describes no decoder.",
            where=str(path),
            expected=f"model.decoder.filename, a text, and model.{' and model.'.join(_NUMBERS)}, whole numbers",
            mend="write the model anew with the stage export",
        )
    graph = find_graph(folder)
    if (folder / named).resolve() != graph.resolve():
        raise ModelError(
            f"genai_config.json names the graph {named}, and the folder holds {graph.relative_to(folder)}.",
            where=str(path),
            mend="name the graph that is there, or write the model anew with the stage export",
        )
    return config


def _part(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = content.get(name)
    return found if isinstance(found, dict) else {}


def _names_code(content: Any) -> bool:
    if isinstance(content, dict):
        return _CODE in content or any(map(_names_code, content.values()))
    return isinstance(content, list) and any(map(_names_code, content))
