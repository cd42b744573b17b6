"""Who reads the stored tensors of each format, by the suffix of its files. Importing this imports no reader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from compress.checkpoints.stored_tensor import StoredTensor
from compress.formats.registry import FORMATS
from compress.formats.spec import Reference, load


@dataclass(frozen=True)
class TensorReader:
    """What ``read_tensors`` refers to reads files that end in ``suffix``.

    ``graph``: a file holds operators beside its tensors.
    """

    suffix: str
    read_tensors: Reference
    graph: bool = True

    def read(self, file: Path, root: Path) -> list[StoredTensor]:
        """The tensors of ``file``, whose paths may be others beside it. Raises `ModelError`."""
        read_tensors: Callable[[Path, Path], list[StoredTensor]] = load(self.read_tensors)
        return read_tensors(file, root)


READERS = {
    "safetensors": TensorReader(".safetensors", "compress.checkpoints.checkpoint:read_tensors", graph=False),
    **{
        spec.name: TensorReader(spec.tensors_suffix or spec.suffix, spec.tensors, spec.has_graph)
        for spec in FORMATS.values()
        if spec.tensors is not None
    },
}
"""Format -> its reader, in the order in which a folder is searched."""
