"""Reader of the tensors in a torch.export archive, which stores each as plain bytes and lists their names."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np

from compress.formats.integrity import Encode, ModelInspector, Stored, answers_of
from compress.models.processor import processor_of
from compress.models.stored_tensor import StoredTensor, infer_role, stored
from compress.utils.errors import ModelError
from compress_pt2.model import FILE, Pt2Model

_DTYPES = {2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64", 12: "bool"}
"""torch's `ScalarType` as its schema numbers it."""


def read_tensors(file: Path, root: Path) -> list[StoredTensor]:
    """Return all tensors of a file. Raises `ModelError` for an invalid archive."""
    return _tensors(file.read_bytes(), file)


def _tensors(content: bytes, file: Path) -> list[StoredTensor]:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            places = {PurePosixPath(entry.filename).name: entry for entry in archive.infolist()}
            (config,) = (name for name in archive.namelist() if name.endswith("weights_config.json"))
            described = json.loads(archive.read(config))["config"]
        tensors = []
        for name, described_tensor in described.items():
            if described_tensor["use_pickle"]:
                raise ModelError(f"The tensor {name!r} is pickled.", where=str(file), expected="plain bytes")
            entry, meta = places[described_tensor["path_name"]], described_tensor["tensor_meta"]
            shape = tuple(int(size["as_int"]) for size in meta["sizes"])
            dtype = _DTYPES[meta["dtype"]]
            span = (_start(content, entry.header_offset), entry.file_size)
            tensors.append(stored(name.removeprefix("model."), dtype, shape, file, span, infer_role(dtype, shape)))
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"The program cannot be read: {error}", where=str(file)) from error
    return tensors


def _start(content: bytes, header: int) -> int:
    """Return the offset of an entry's bytes: after its 30-byte header, its name and its padding."""
    name, padding = struct.unpack_from("<HH", content, header + 26)
    return int(header + 30 + name + padding)


def _stored(model: Pt2Model) -> Stored:
    return ((tensor, tensor.data(model.program)) for tensor in _tensors(model.program, Path(FILE)))


def _logits(model: Pt2Model, encode: Encode) -> np.ndarray:
    from compress_pt2.runtime import open_bytes

    return answers_of(open_bytes(model.program), encode(processor_of(model)))


PROBED = ModelInspector(_stored, _logits)
