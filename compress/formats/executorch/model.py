"""An ExecuTorch program as a folder. Importing this imports no executorch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from compress.formats.model_file import FileModel
from compress.utils.errors import ModelError, incomplete_artifact_error

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


class ExecuTorchModel(FileModel):
    """The `.pte` file; the config among its companions has its `Interface`."""

    kind = "executorch"

    @classmethod
    def files_with(cls, file: Path) -> tuple[Path, ...]:
        """See `FileModel.files_with`."""
        read_interface(file.parent)
        return (file,)


def with_interface(companions: Mapping[str, bytes], interface: Interface) -> dict[str, bytes]:
    """``companions`` whose config tells ``interface``."""
    told = {"inputs": interface.inputs, "outputs": interface.outputs}
    config = {**json.loads(companions[CONFIG]), INTERFACE: told}
    return {**companions, CONFIG: json.dumps(config, ensure_ascii=False, separators=(",", ":")).encode()}


def read_interface(folder: Path) -> Interface:
    """What the `config.json` beside a program tells. Raises `ModelError`."""
    config = folder / CONFIG
    if not config.is_file():
        raise incomplete_artifact_error(
            f"The program's {CONFIG} is missing, which names its inputs.", folder, f"{CONFIG} beside it"
        )
    try:
        told = json.loads(config.read_bytes())[INTERFACE]
        inputs = {str(name): tuple(axes) for name, axes in told["inputs"].items()}
        return Interface(inputs, tuple(told["outputs"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            "The config does not name the program's inputs and outputs.",
            where=str(config),
            expected=f"an entry {INTERFACE} with inputs and outputs",
            hint="write the program again with the stage executorch",
        ) from error
