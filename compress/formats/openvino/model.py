"""OpenVINO's IR as a folder that optimum-intel opens, and reader of its constants.

Importing this imports no openvino.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from compress.formats.model_file import FileModel, file_of
from compress.models.pipeline_folder import is_pipeline, part_folders
from compress.models.stored_tensor import StoredTensor, check_spans, infer_role, stored
from compress.utils.errors import ModelError, incomplete_artifact_error

IR_FILE, WEIGHTS_FILE = "openvino_model.xml", "openvino_model.bin"
"""optimum-intel's file names."""
TOKENIZER, DETOKENIZER = "openvino_tokenizer.xml", "openvino_detokenizer.xml"
"""openvino-genai's file names for the models that convert text to tokens and back."""

_TYPES = {"f32": "float32", "f16": "float16", "f64": "float64", "boolean": "bool"}
_PACKED = ("u4", "i4", "u1", "u2", "nf4")
_COMPANIONS = ("/zero_point", "/scale")


class OpenVinoModel(FileModel):
    """XML with its weights file; for an image generator, those of each component's folder."""

    kind = "openvino"

    @classmethod
    def files_with(cls, file: Path) -> tuple[Path, ...]:
        """See `FileModel.files_with`."""
        return file, weights_of(file)


def find_graphs(artifact: Path) -> tuple[Path, ...]:
    """Return the IR of a model, or of each component of an image generator, in the order in which they run.

    Raises `ModelError` if one is missing.
    """
    pipeline = artifact.is_dir() and is_pipeline(artifact)
    folders = [artifact / part for part in part_folders(artifact)] if pipeline else [artifact]
    return tuple(file_of(folder, OpenVinoModel.kind) for folder in folders)


def weights_of(graph: Path) -> Path:
    """Return the weights file beside an IR; raise `ModelError` if it is missing."""
    weights = graph.with_suffix(".bin")
    if not weights.is_file():
        what = f"The weights of {graph.name} are missing."
        raise incomplete_artifact_error(what, graph.parent, f"{weights.name} beside it")
    return weights


def read_tensors(file: Path, root: Path) -> list[StoredTensor]:
    """Return the constants of an IR, which are stored in the file beside it."""
    weights = weights_of(file)
    return list(read_ir(file.read_bytes(), file, weights.stat().st_size, weights))


def read_ir(content: bytes, where: Path, size: int, weights: Path = Path()) -> tuple[StoredTensor, ...]:
    """Return the constants of an IR, including bodies of loops and branches; raise `ModelError` if it is invalid.

    ``size``: bytes of the ``weights``, which no constant may exceed.
    """
    # Entities of a document type could expand to any size or read other files.
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        raise ModelError("The IR declares a document type.", where=str(where), expected="plain layers and edges")
    try:
        constants = tuple(_constants(ElementTree.fromstring(content), weights))
    except (ElementTree.ParseError, KeyError, ValueError) as error:
        raise ModelError(
            f"The IR cannot be read: {error}", where=str(where), hint="write it again with the stage openvino"
        ) from error
    check_spans(constants, size, where)
    return constants


def _constants(root: ElementTree.Element, weights: Path) -> Iterator[StoredTensor]:
    for layer in root.iter("layer"):
        data = layer.find("data")
        if layer.get("type") != "Const" or data is None:
            continue
        shape = tuple(int(axis) for axis in data.attrib["shape"].split(",") if axis.strip())
        name, kind = layer.attrib["name"], data.attrib["element_type"]
        # numpy's name of the type, or OpenVINO's own for packed integers.
        long_name = {"i": "int", "u": "uint"}.get(kind[:1], kind[:1]) + kind[1:]
        dtype = _TYPES.get(kind, kind if kind in _PACKED else long_name)
        span = int(data.attrib["offset"]), int(data.attrib["size"])
        role = infer_role(dtype, shape, scales=name.endswith(_COMPANIONS))
        yield stored(name, dtype, shape, weights, span, role, packed=kind in _PACKED)
