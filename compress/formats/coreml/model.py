"""A Core ML package with what belongs to it, as a folder. Importing this imports no coremltools."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

from compress.checkpoints.model import read_companions, write_companions
from compress.errors import ModelError

PACKAGE = "model.mlpackage"
"""A folder, which Finder and Xcode show as one file."""
_AUTHOR = "com.apple.CoreML"
_SPECIFICATION = f"{_AUTHOR}/model.mlmodel"
_WEIGHTS = f"{_AUTHOR}/weights"
_NAMES = uuid.uuid5(uuid.NAMESPACE_DNS, _AUTHOR)


@dataclass(frozen=True)
class CoreMlModel:
    """``specification`` is Core ML's message, ``weights`` its blobs; ``companions`` as `OnnxModel` has them."""

    kind: ClassVar[str] = "coreml"
    specification: bytes = field(repr=False)
    weights: bytes = field(repr=False)
    companions: Mapping[str, bytes] = field(repr=False)

    @classmethod
    def load(cls, directory: Path, task: object) -> Self:
        """Open what `save` wrote. Raises `ModelError` for a folder without one package, whole."""
        package = find_package(directory)
        specification = specification_of(package)
        companions = read_companions(directory, below=package)
        return cls(specification.read_bytes(), weights_of(specification).read_bytes(), companions)

    def save(self, directory: Path) -> None:
        """Write every file into ``directory``."""
        write_companions(directory, self.companions)
        self.save_package(directory / PACKAGE)

    def save_package(self, package: Path) -> None:
        """Write the package alone, as the new folder ``package``."""
        data = package / "Data" / _AUTHOR
        (data / "weights").mkdir(parents=True)
        (data / "model.mlmodel").write_bytes(self.specification)
        (data / "weights" / "weight.bin").write_bytes(self.weights)
        # As Core ML's own library writes it, which does so again whenever it opens a package.
        (package / "Manifest.json").write_text(json.dumps(self._manifest(), indent=4, sort_keys=True) + "\n")

    def _manifest(self) -> dict[str, object]:
        """What lies in the package, under ids of its content: coremltools' own are new each time."""
        root = _item_id(self.specification)
        weights = {"description": "CoreML Model Weights", "name": "weights", "path": _WEIGHTS}
        model = {"description": "CoreML Model Specification", "name": "model.mlmodel", "path": _SPECIFICATION}
        items = {_item_id(self.weights, b"weights"): weights, root: model}
        return {
            "fileFormatVersion": "1.0.0",
            "itemInfoEntries": {name: {"author": _AUTHOR, **item} for name, item in items.items()},
            "rootModelIdentifier": root,
        }


def _item_id(content: bytes, kind: bytes = b"model") -> str:
    import hashlib

    return str(uuid.uuid5(_NAMES, hashlib.sha256(kind + content).hexdigest()))


def find_package(artifact: Path) -> Path:
    """The only `.mlpackage` at or below ``artifact``. Raises `ModelError` where there isn't exactly one."""
    if artifact.suffix == ".mlpackage" and artifact.is_dir():
        return artifact
    found = sorted(artifact.rglob("*.mlpackage")) if artifact.is_dir() else []
    if len(found) != 1:
        names = ", ".join(place.relative_to(artifact).as_posix() for place in found) or "none"
        raise ModelError(
            f"There are {len(found)} .mlpackage folders ({names}).",
            where=str(artifact),
            expected="exactly one",
            mend="name the package itself" if found else "write one with the stage coreml first",
        )
    return found[0]


def specification_of(package: Path) -> Path:
    """The message within a package. Raises `ModelError` where it is missing."""
    return _there(package / "Data" / _SPECIFICATION, package)


def weights_of(specification: Path) -> Path:
    """The weights beside a specification. Raises `ModelError` where they are missing."""
    return _there(specification.parent / "weights" / "weight.bin", specification.parent)


def _there(file: Path, package: Path) -> Path:
    if not file.is_file():
        raise ModelError(
            f"The package lacks {file.name}.",
            where=str(package),
            expected=f"{file.relative_to(package).as_posix()} within it",
            mend="copy the folder again with all of its files",
        )
    return file
