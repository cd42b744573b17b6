"""A graph in ONNX Runtime's own format, as a folder. Importing this imports no onnxruntime."""

from __future__ import annotations

from pathlib import Path

from compress.formats.model_file import FileModel

ORT_FILE = "model.ort"
OPERATORS_FILE = "required_operators_and_types.config"
"""What a minimal build of ONNX Runtime is told to keep: its own name for the file."""


class OrtModel(FileModel):
    """A graph as ONNX Runtime optimized and stored it.

    Beside it lies the list of the operators that it calls, with their types, for `--include_ops_by_config`.
    """

    kind = "ort"

    @classmethod
    def files_with(cls, file: Path) -> tuple[Path, ...]:
        """See `FileModel.files_with`."""
        from compress.formats.ort.read import read_ort

        read_ort(file.read_bytes(), file)
        return (file,)
