"""OpenVINO's IR as a folder that optimum-intel opens. Importing this imports no openvino."""

from __future__ import annotations

from pathlib import Path

from compress.formats.model_file import FileModel, file_of
from compress.models.pipeline_folder import is_pipeline, part_folders
from compress.utils.errors import incomplete_artifact_error

IR_FILE, WEIGHTS_FILE = "openvino_model.xml", "openvino_model.bin"
"""optimum-intel's names."""
TOKENIZER, DETOKENIZER = "openvino_tokenizer.xml", "openvino_detokenizer.xml"
"""openvino-genai's names of what stands before and behind a language model."""


class OpenVinoModel(FileModel):
    """The XML, and the weights that it points into; of a model that draws pictures those of each part's folder."""

    kind = "openvino"

    @classmethod
    def files_with(cls, file: Path) -> tuple[Path, ...]:
        """See `FileModel.files_with`."""
        return file, weights_of(file)


def find_graphs(artifact: Path) -> tuple[Path, ...]:
    """Return the IR of a model, or of each component of an image generator, in the order in which they run.

    Raises `ModelError` if one is missing.
    """
    if not artifact.is_dir() or not is_pipeline(artifact):
        return (file_of(artifact, OpenVinoModel.kind),)
    parts = [artifact / part for part in part_folders(artifact)]
    return tuple(file_of(part, OpenVinoModel.kind) for part in parts)


def weights_of(graph: Path) -> Path:
    """Return the weights file beside an IR; raise `ModelError` if it is missing."""
    weights = graph.with_suffix(".bin")
    if not weights.is_file():
        raise incomplete_artifact_error(
            f"The weights of {graph.name} are missing.", graph.parent, f"{weights.name} beside it"
        )
    return weights
