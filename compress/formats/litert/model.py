"""A LiteRT file (`.tflite`) as a folder. Importing this imports no ai_edge_litert."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from compress.formats.model_file import FileModel

LITERT_FILE = "model.tflite"
Precision = Literal["fp32", "fp16", "int8", "int8_weights"]
"""Of weights; in int8 products are of 8 bits too."""
Blocks = Literal[32, 64, 128, 256]
"""Weights of a table's row that share a scale."""


class LiteRtModel(FileModel):
    """The file has its signatures and weights in it."""

    kind = "litert"

    @classmethod
    def files_with(cls, file: Path) -> tuple[Path, ...]:
        """See `FileModel.files_with`."""
        from compress.formats.litert.read import read_litert

        read_litert(file.read_bytes(), file)
        return (file,)
