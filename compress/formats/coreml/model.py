"""A Core ML package as a folder. Importing this imports no coremltools."""

from __future__ import annotations

import hashlib
import json
import uuid
from pathlib import Path

from compress.formats.model_file import FileModel
from compress.utils.errors import incomplete_artifact_error

PACKAGE = "model.mlpackage"
"""A folder, which Finder and Xcode show as one file."""
_AUTHOR = "com.apple.CoreML"
_SPECIFICATION = f"{_AUTHOR}/model.mlmodel"
_WEIGHTS = f"{_AUTHOR}/weights"
_NAMES = uuid.uuid5(uuid.NAMESPACE_DNS, _AUTHOR)


class CoreMlModel(FileModel):
    """The package: Core ML's message, its weights, and the list of both."""

    kind = "coreml"

    @classmethod
    def files_with(cls, file: Path) -> tuple[Path, ...]:
        """See `FileModel.files_with`."""
        weights_of(specification_of(file))
        return tuple(sorted(path for path in file.rglob("*") if path.is_file()))

    @property
    def specification(self) -> bytes:
        """Core ML's message."""
        return self.own[f"{PACKAGE}/Data/{_SPECIFICATION}"]

    @property
    def weights(self) -> bytes:
        """Its blobs."""
        return self.own[f"{PACKAGE}/Data/{_WEIGHTS}/weight.bin"]


def package_of(specification: bytes, weights: bytes) -> dict[str, bytes]:
    """The files of the package with both, and their list under ids of their content: coremltools' are new each time."""
    root = _item_id(specification)
    items = {
        _item_id(weights, b"weights"): {"description": "CoreML Model Weights", "name": "weights", "path": _WEIGHTS},
        root: {"description": "CoreML Model Specification", "name": "model.mlmodel", "path": _SPECIFICATION},
    }
    told = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {name: {"author": _AUTHOR, **item} for name, item in items.items()},
        "rootModelIdentifier": root,
    }
    return {
        f"{PACKAGE}/Data/{_SPECIFICATION}": specification,
        f"{PACKAGE}/Data/{_WEIGHTS}/weight.bin": weights,
        # As Core ML's own library writes it, which does so again whenever it opens a package.
        f"{PACKAGE}/Manifest.json": (json.dumps(told, indent=4, sort_keys=True) + "\n").encode(),
    }


def _item_id(content: bytes, kind: bytes = b"model") -> str:
    return str(uuid.uuid5(_NAMES, hashlib.sha256(kind + content).hexdigest()))


def specification_of(package: Path) -> Path:
    """The message within a package. Raises `ModelError` where it is missing."""
    return _there(package / "Data" / _SPECIFICATION, package)


def weights_of(specification: Path) -> Path:
    """The weights beside a specification. Raises `ModelError` where they are missing."""
    return _there(specification.parent / "weights" / "weight.bin", specification.parent)


def _there(file: Path, package: Path) -> Path:
    if not file.is_file():
        within = f"{file.relative_to(package).as_posix()} within it"
        raise incomplete_artifact_error(f"The package lacks {file.name}.", package, within)
    return file
