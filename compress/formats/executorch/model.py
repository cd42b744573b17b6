"""An ExecuTorch program with what belongs to it, as a folder. Importing this imports no executorch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

from compress.checkpoints.model import only_file, read_companions, write_companions
from compress.errors import ModelError

PTE_FILE = "model.pte"
"""optimum-executorch's name."""
INTERFACE = "compress_executorch"
"""Where `config.json` has what a program can't say: the names of its inputs and outputs, which are free axes."""
CONFIG = "config.json"

Axes = tuple[int | str, ...]


@dataclass(frozen=True)
class Interface:
    """Inputs and outputs in the program's order. An axis that is free has a name; its bound is in the program."""

    inputs: Mapping[str, Axes]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class ExecuTorchModel:
    """``program`` is the `.pte` file; ``companions`` as `OnnxModel` has them, with the `Interface` in the config."""

    kind: ClassVar[str] = "executorch"
    program: bytes = field(repr=False)
    companions: Mapping[str, bytes] = field(repr=False)

    @classmethod
    def load(cls, directory: Path, task: object) -> Self:
        """Open what `save` wrote. Raises `ModelError` for a folder without one program and its interface."""
        program = find_pte(directory)
        read_interface(program.parent)
        return cls(program.read_bytes(), read_companions(directory, (program,)))

    def save(self, directory: Path) -> None:
        """Write every file into ``directory``."""
        (directory / PTE_FILE).write_bytes(self.program)
        write_companions(directory, self.companions)

    def interface(self) -> Interface:
        """See `Interface`. Raises `ModelError`."""
        return _interface(self.companions[CONFIG], CONFIG)


def find_pte(artifact: Path) -> Path:
    """The only `.pte` file at or below ``artifact``. Raises `ModelError` where there isn't exactly one."""
    return only_file(artifact, ".pte", "executorch")


def with_interface(companions: Mapping[str, bytes], interface: Interface) -> dict[str, bytes]:
    """``companions`` whose config tells ``interface``."""
    told = {"inputs": interface.inputs, "outputs": interface.outputs}
    config = {**json.loads(companions[CONFIG]), INTERFACE: told}
    return {**companions, CONFIG: json.dumps(config, ensure_ascii=False, separators=(",", ":")).encode()}


def read_interface(folder: Path) -> Interface:
    """What the `config.json` beside a program tells. Raises `ModelError`."""
    config = folder / CONFIG
    if not config.is_file():
        raise ModelError(
            f"The program's {CONFIG} is missing, which names its inputs.",
            where=str(folder),
            expected=f"{CONFIG} beside it",
            mend="copy the folder again with all of its files",
        )
    return _interface(config.read_bytes(), str(config))


def _interface(content: bytes, where: str) -> Interface:
    try:
        told = json.loads(content)[INTERFACE]
        inputs = {str(name): tuple(axes) for name, axes in told["inputs"].items()}
        return Interface(inputs, tuple(told["outputs"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            "The config does not name the program's inputs and outputs.",
            where=where,
            expected=f"an entry {INTERFACE} with inputs and outputs",
            mend="write the program again with the stage executorch",
        ) from error
