"""ONNX Runtime's own conversion of a graph into its format, and its list of the operators in there."""

from __future__ import annotations

import warnings
from pathlib import Path

from compress.errors import StageError
from compress.formats.ort.read import ort_tools

_LEFT_OUT = ["NchwcTransformer"]
"""It lays channels out for x86; a file with such operators opens nowhere else."""


def convert(source: Path, target: Path) -> None:
    """Write the graph of ``source`` as the `.ort` file ``target``. Raises `StageError`."""
    import onnxruntime

    from compress.formats.onnx.runtimes.onnxruntime import FAILURES, session_options

    options = session_options(1)
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.save_model_format", "ORT")
    try:
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"], disabled_optimizers=_LEFT_OUT)
    except FAILURES as error:
        raise StageError(f"ONNX Runtime cannot write the graph in its own format: {error}") from error


def operators_of(file: Path) -> str:
    """`domain;opset;operators` lines with types, as ONNX Runtime's build script reads them; no places."""
    listed = file.with_suffix(".config")
    with warnings.catch_warnings():
        # It leaves the file to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        ort_tools().create_config_from_models([file], listed, enable_type_reduction=True)
    lines = listed.read_text(encoding="utf-8").splitlines()
    return "".join(f"{line}\n" for line in lines if not line.startswith("#"))
