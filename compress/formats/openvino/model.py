"""OpenVINO's IR with what belongs to it, as a folder that optimum-intel opens. Importing this imports no openvino."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

from compress.checkpoints.model import only_file, read_companions, write_companions
from compress.errors import ModelError

IR_FILE = "openvino_model.xml"
"""optimum-intel's name; the weights lie in a file beside it."""


@dataclass(frozen=True)
class OpenVinoModel:
    """``graph`` is the XML, ``weights`` the binary file that it points into; ``companions`` as `OnnxModel` has them."""

    kind: ClassVar[str] = "openvino"
    graph: bytes = field(repr=False)
    weights: bytes = field(repr=False)
    companions: Mapping[str, bytes] = field(repr=False)

    @classmethod
    def load(cls, directory: Path, task: object) -> Self:
        """Open what `save` wrote. Raises `ModelError` for a folder without one IR and its weights."""
        graph = find_ir(directory)
        weights = weights_of(graph)
        return cls(graph.read_bytes(), weights.read_bytes(), read_companions(directory, (graph, weights)))

    def save(self, directory: Path) -> None:
        """Write every file into ``directory``."""
        (directory / IR_FILE).write_bytes(self.graph)
        (directory / IR_FILE).with_suffix(".bin").write_bytes(self.weights)
        write_companions(directory, self.companions)


def find_ir(artifact: Path) -> Path:
    """The only `.xml` file at or below ``artifact``. Raises `ModelError` where there isn't exactly one."""
    return only_file(artifact, ".xml", "openvino")


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
