"""An ExecuTorch program as a folder. Importing this imports no executorch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.formats.executorch.xnnpack_graph import read_graph
from compress.formats.model_file import FileModel
from compress.formats.quiet_output import suppress_output
from compress.models.stored_tensor import Role, StoredTensor, check_spans, stored
from compress.utils.errors import MissingExtraError, ModelError, incomplete_artifact_error, unreadable_file_error

PTE_FILE = "model.pte"
"""optimum-executorch's name."""
INTERFACE = "compress_executorch"
"""Where `config.json` has what a program can't say: the names of its inputs and outputs, which are free axes."""
CONFIG = "config.json"

Axes = tuple[int | str, ...]

_HEADER = 40
_NUMPY = {
    "BYTE": "uint8", "CHAR": "int8", "SHORT": "int16", "INT": "int32", "LONG": "int64", "HALF": "float16",
    "FLOAT": "float32", "DOUBLE": "float64", "BOOL": "bool",
}  # fmt: skip
_TABLES = {"embedding_2bit": 4, "embedding_4bit": 2, "embedding_byte": 1}
"""Operators that look rows of quantized tables up, and how many weights lie in a byte of theirs."""


@dataclass(frozen=True)
class ProgramInterface:
    """Inputs and outputs in the program's order. An axis that is free has a name; its bound is in the program."""

    inputs: Mapping[str, Axes]
    outputs: tuple[str, ...]


class ExecuTorchModel(FileModel):
    """The `.pte` file; the config among its companions has its `ProgramInterface`."""

    kind = "executorch"

    @classmethod
    def files_with(cls, file: Path) -> tuple[Path, ...]:
        """See `FileModel.files_with`."""
        read_interface(file.parent)
        return (file,)


def with_interface(companions: Mapping[str, bytes], interface: ProgramInterface) -> dict[str, bytes]:
    """``companions`` whose config tells ``interface``."""
    told = {"inputs": interface.inputs, "outputs": interface.outputs}
    config = {**json.loads(companions[CONFIG]), INTERFACE: told}
    return {**companions, CONFIG: json.dumps(config, ensure_ascii=False, separators=(",", ":")).encode()}


def read_interface(folder: Path) -> ProgramInterface:
    """What the `config.json` beside a program tells. Raises `ModelError`."""
    config = folder / CONFIG
    if not config.is_file():
        raise incomplete_artifact_error(
            f"The program's {CONFIG} is missing, which names its inputs.", folder, f"{CONFIG} beside it"
        )
    try:
        told = json.loads(config.read_bytes())[INTERFACE]
        inputs = {str(name): tuple(axes) for name, axes in told["inputs"].items()}
        return ProgramInterface(inputs, tuple(told["outputs"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            "The config does not name the program's inputs and outputs.",
            where=str(config),
            expected=f"an entry {INTERFACE} with inputs and outputs",
            hint="write the program again with the stage executorch",
        ) from error


def check_whole(content: bytes, where: Path) -> tuple[int, int]:
    """Bytes of the program itself, and where its segments begin. Raises `ModelError` for a file that was cut."""
    if content[4:6] != b"ET":
        raise ModelError("The file is no ExecuTorch program.", where=str(where), expected="the letters ET at byte 4")
    if content[8:12] != b"eh00":
        return len(content), len(content)
    program, base, segments = (int.from_bytes(content[at : at + 8], "little") for at in (16, 24, 32))
    end = max(program, base + segments)
    if len(content) < max(end, _HEADER):
        raise incomplete_artifact_error(f"The program ends at byte {len(content)} of {end}.", where)
    return program, base


def read_tensors(file: Path, root: Path) -> list[StoredTensor]:
    """The constants of a program."""
    return list(read_pte(file.read_bytes(), file))


def read_pte(content: bytes, where: Path) -> tuple[StoredTensor, ...]:
    """Every constant of a program. Raises `ModelError` for a broken file, `MissingExtraError` without executorch."""
    size, base = check_whole(content, where)
    try:
        with suppress_output("process"):
            from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program

            program = _flatbuffer_to_program(content[:size])
    except ImportError as error:
        raise MissingExtraError("executorch", "executorch", "Looking into a .pte file") from error
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, RuntimeError, UnicodeError) as error:
        raise unreadable_file_error(
            f"The program cannot be read: {error or type(error).__name__}", where, "executorch"
        ) from error
    try:
        found = (*_own(program, base, where), *_delegated(program, base, content, where))
    except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise unreadable_file_error(
            f"The program cannot be read: {error or type(error).__name__}", where, "executorch"
        ) from error
    check_spans(found, len(content), where)
    return found


def _own(program: Any, base: int, file: Path) -> Iterator[StoredTensor]:
    """Tensors that ExecuTorch's own kernels read; a buffer that several of them share counts once."""
    segment, _ = _segment(program, program.constant_segment.segment_index, base)
    offsets = program.constant_segment.offsets
    known: set[int] = set()
    for plan in program.execution_plan:
        tables = dict(_tables(plan))
        for place, value in enumerate(plan.values):
            tensor = value.val
            buffer = getattr(tensor, "data_buffer_idx", 0)
            if not buffer or tensor.allocation_info is not None or buffer in known:
                continue
            known.add(buffer)
            dtype, shape = _NUMPY.get(tensor.scalar_type.name, tensor.scalar_type.name), tuple(tensor.sizes)
            role, packed = tables.get(place, (None, 1))
            if not role:
                role = "weight" if dtype.startswith("float") and shape else "constant"
            span = segment + offsets[buffer], math.prod(shape) * np.dtype(dtype).itemsize
            found = stored(f"constant.{buffer}", dtype, shape, file, span, role, packed=packed > 1)
            yield found.model_copy(update={"parameters": found.parameters * packed})


def _tables(plan: Any) -> Iterator[tuple[int, tuple[Role | None, int]]]:
    """Values that are quantized tables, and how many weights they have in a byte, or their scales and zero points."""
    for chain in plan.chains:
        for instruction in chain.instructions:
            call = instruction.instr_args
            index = getattr(call, "op_index", None)
            kind = "" if index is None else plan.operators[index].name.rpartition("::")[2]
            if kind in _TABLES:
                table, *scales = call.args[:3]
                yield table, ("weight", _TABLES[kind])
                yield from ((place, ("quantization", 1)) for place in scales)


def _delegated(program: Any, base: int, content: bytes, file: Path) -> Iterator[StoredTensor]:
    """What XNNPACK's parts are given, by their own description; equal constants of several parts are one."""
    named = {one.key: _segment(program, one.segment_index, base) for one in program.named_data or ()}
    seen: set[str] = set()
    for plan in program.execution_plan:
        for place, delegate in enumerate(plan.delegates):
            if delegate.id != "XnnpackBackend":
                continue
            start, size = _payload(program, delegate, base)
            for constant in read_graph(content[start : start + size]).constants:
                if constant.key in named and constant.key not in seen:
                    seen.add(constant.key)
                    span, dtype = named[constant.key], constant.dtype
                    shape = (span[1] // np.dtype(dtype).itemsize,) if constant.scale else constant.shape
                    role: Role = "quantization" if constant.scale else "weight"
                    yield stored(f"xnnpack.{place}.{constant.value}", dtype, shape, file, span, role)


def _payload(program: Any, delegate: Any, base: int) -> tuple[int, int]:
    if delegate.processed.location.name != "SEGMENT":
        raise ValueError("a part of XNNPACK lies within the program")
    return _segment(program, delegate.processed.index, base)


def _segment(program: Any, index: int, base: int) -> tuple[int, int]:
    if not program.segments:
        return base, 0
    found = program.segments[index]
    return base + found.offset, found.size
