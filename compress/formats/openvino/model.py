"""OpenVINO's IR as a folder that optimum-intel opens. Importing this imports no openvino."""

from __future__ import annotations

from pathlib import Path

from compress.errors import ModelError
from compress.formats.model_file import FileModel

IR_FILE, WEIGHTS_FILE = "openvino_model.xml", "openvino_model.bin"
"""optimum-intel's names."""


class OpenVinoModel(FileModel):
    """The XML, and the weights that it points into."""

    kind = "openvino"

    @classmethod
    def files_with(cls, file: Path) -> tuple[Path, ...]:
        """See `FileModel.files_with`."""
        return file, weights_of(file)


def weights_of(graph: Path) -> Path:
    """The weights beside an IR. Raises `ModelError` where they are missing."""
    weights = graph.with_suffix(".bin")
    if not weights.is_file():
        raise ModelError(
            f"The weights of {graph.name} are missing.",
            where=str(graph.parent),
            expected=f"{weights.name} beside it",
            mend="copy the folder again with all of its files",
        )
    return weights
