"""Who reads the stored tensors of each kind of file. Importing this imports no reader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from compress.checkpoints.stored_tensor import StoredTensor
from compress.formats.registry import FORMATS, part_of
from compress.formats.spec import load

Read = Callable[[Path, Path], list[StoredTensor]]


@dataclass(frozen=True)
class TensorReader:
    """What ``load`` imports reads files that end in ``suffix``; ``graph``: they hold operators as well."""

    suffix: str
    load: Callable[[], Read]
    graph: bool

    def read(self, file: Path, root: Path) -> list[StoredTensor]:
        """The tensors of ``file``, a model's at or below ``root``; some may lie in files beside it.

        Raises `ModelError`.
        """
        return self.load()(file, root)


READERS = {
    "safetensors": TensorReader(".safetensors", partial(load, "compress.checkpoints.read:read_tensors"), graph=False),
    **{
        spec.name: TensorReader(
            spec.tensor_files or spec.suffix, partial(part_of, spec.name, "tensors"), spec.holds_graph
        )
        for spec in FORMATS.values()
        if spec.tensors is not None
    },
}
"""By format, in the order in which a folder is searched."""
