"""ExecuTorch program as a folder, and reader of its constants. Importing this imports no executorch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.formats.executorch.xnnpack_graph import read_constants
from compress.formats.model_file import FileModel
from compress.formats.quiet_output import suppress_output
from compress.models.stored_tensor import Role, StoredTensor, check_spans, stored
from compress.utils.errors import MissingExtraError, ModelError, incomplete_artifact_error, unreadable_file_error
from compress.utils.read_limits import parse_json

PTE_FILE = "model.pte"
"""File name that optimum-executorch expects."""
INTERFACE = "compress_executorch"
"""Entry of `config.json` with the names of inputs and outputs and the free axes, which a program does not contain."""
CONFIG = "config.json"

Axes = tuple[int | str, ...]

_HEADER = 40
_NUMPY = {
    "BYTE": "uint8", "CHAR": "int8", "SHORT": "int16", "INT": "int32", "LONG": "int64", "HALF": "float16",
    "FLOAT": "float32", "DOUBLE": "float64", "BOOL": "bool",
}  # fmt: skip
_PACKED_WEIGHTS = {"embedding_2bit": 4, "embedding_4bit": 2, "embedding_byte": 1}
"""Weights per byte in the tables that each embedding operator looks up."""


@dataclass(frozen=True)
class ProgramInterface:
    """Inputs and outputs in the program's order. A free axis has a name; the program contains its bound."""

    inputs: Mapping[str, Axes]
    outputs: tuple[str, ...]


class ExecuTorchModel(FileModel):
    """The `.pte` file; the config among its companions contains its `ProgramInterface`."""

    kind = "executorch"

    @classmethod
    def files_with(cls, file: Path) -> tuple[Path, ...]:
        """See `FileModel.files_with`."""
        read_interface(file.parent)
        return (file,)


def with_interface(companions: Mapping[str, bytes], interface: ProgramInterface) -> dict[str, bytes]:
    """Return ``companions`` with ``interface`` added to the config."""
    config = {**json.loads(companions[CONFIG]), INTERFACE: {"inputs": interface.inputs, "outputs": interface.outputs}}
    return {**companions, CONFIG: json.dumps(config, ensure_ascii=False, separators=(",", ":")).encode()}


def read_interface(folder: Path) -> ProgramInterface:
    """Read the interface from the `config.json` beside a program; raise `ModelError` if it is missing or invalid."""
    config = folder / CONFIG
    if not config.is_file():
        raise incomplete_artifact_error(
            f"The program's {CONFIG} is missing, which names its inputs.", folder, f"{CONFIG} beside it"
        )
    try:
        entry = parse_json(config.read_bytes())[INTERFACE]
        inputs = {str(name): tuple(axes) for name, axes in entry["inputs"].items()}
        return ProgramInterface(inputs, tuple(entry["outputs"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            "The config does not name the program's inputs and outputs.",
            where=str(config),
            expected=f"an entry {INTERFACE} with inputs and outputs",
            hint="write the program again with the stage executorch",
        ) from error


def check_whole(content: bytes, where: Path) -> tuple[int, int]:
    """Return the size of the program and the offset of its segments; raise `ModelError` for a truncated file."""
    if content[4:6] != b"ET":
        raise ModelError("The file is no ExecuTorch program.", where=str(where), expected="the letters ET at byte 4")
    # Without the extended header there are no segments, and the program is the whole file.
    if content[8:12] != b"eh00":
        return len(content), len(content)
    program, base, segments = (int.from_bytes(content[at : at + 8], "little") for at in (16, 24, 32))
    end = max(program, base + segments)
    if len(content) < max(end, _HEADER):
        raise incomplete_artifact_error(f"The program ends at byte {len(content)} of {end}.", where)
    return program, base


def read_tensors(file: Path, root: Path) -> list[StoredTensor]:
    """Return the constants of a program."""
    return list(read_pte(file.read_bytes(), file))


def read_pte(content: bytes, where: Path) -> tuple[StoredTensor, ...]:
    """Return every constant of a program, including those of its XNNPACK delegates.

    Raises:
        ModelError: The file is invalid.
        MissingExtraError: executorch is not installed.
    """
    size, base = check_whole(content, where)
    try:
        with suppress_output("process"):
            from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program

            program = _flatbuffer_to_program(content[:size])
        constants = (*_kernel_constants(program, base, where), *_delegate_constants(program, base, content, where))
    except ImportError as error:
        raise MissingExtraError("executorch", "executorch", "Looking into a .pte file") from error
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, RuntimeError) as error:
        what = f"The program cannot be read: {error or type(error).__name__}"
        raise unreadable_file_error(what, where, "executorch") from error
    check_spans(constants, len(content), where)
    return constants


def _kernel_constants(program: Any, base: int, file: Path) -> Iterator[StoredTensor]:
    """Yield the tensors that ExecuTorch's own kernels read, with shared buffers once."""
    import numpy as np

    segment, _ = _segment(program, program.constant_segment.segment_index, base)
    offsets = program.constant_segment.offsets
    seen: set[int] = set()
    for plan in program.execution_plan:
        # Quantized tables with their weights per byte, and the tables' scales and zero points.
        tables: dict[int, tuple[Role | None, int]] = {}
        for call in calls_of(plan):
            kind = plan.operators[call.op_index].name.rpartition("::")[2] if hasattr(call, "op_index") else ""
            if kind in _PACKED_WEIGHTS:
                table, *scales = call.args[:3]
                tables |= {table: ("weight", _PACKED_WEIGHTS[kind]), **dict.fromkeys(scales, ("quantization", 1))}
        for index, value in enumerate(plan.values):
            tensor = value.val
            buffer = getattr(tensor, "data_buffer_idx", 0)
            # Buffer 0 is empty. Tensors with an allocation are computed at run time.
            if not buffer or tensor.allocation_info is not None or buffer in seen:
                continue
            seen.add(buffer)
            dtype, shape = _NUMPY.get(tensor.scalar_type.name, tensor.scalar_type.name), tuple(tensor.sizes)
            role, packed = tables.get(index, (None, 1))
            if not role:
                role = "weight" if dtype.startswith("float") and shape else "constant"
            span = segment + offsets[buffer], math.prod(shape) * np.dtype(dtype).itemsize
            constant = stored(f"constant.{buffer}", dtype, shape, file, span, role, packed=packed > 1)
            # A byte of a packed table holds several weights.
            yield constant.model_copy(update={"parameters": constant.parameters * packed})


def calls_of(plan: Any) -> Iterator[Any]:
    """Yield the calls of kernels, which have an ``op_index``, and of delegates, in execution order."""
    arguments = (instruction.instr_args for chain in plan.chains for instruction in chain.instructions)
    return (call for call in arguments if hasattr(call, "args"))


def _delegate_constants(program: Any, base: int, content: bytes, file: Path) -> Iterator[StoredTensor]:
    """Yield the constants of XNNPACK delegates as their own description lists them; equal constants are stored once."""
    import numpy as np

    spans = {entry.key: _segment(program, entry.segment_index, base) for entry in program.named_data or ()}
    seen: set[str] = set()
    for plan in program.execution_plan:
        for number, delegate in enumerate(plan.delegates):
            if delegate.id != "XnnpackBackend":
                continue
            if delegate.processed.location.name != "SEGMENT":
                raise ValueError("an XNNPACK delegate lies within the program")
            start, size = _segment(program, delegate.processed.index, base)
            for constant in read_constants(content[start : start + size]):
                if constant.key in spans and constant.key not in seen:
                    seen.add(constant.key)
                    span, dtype = spans[constant.key], constant.dtype
                    shape = (span[1] // np.dtype(dtype).itemsize,) if constant.scale else constant.shape
                    role: Role = "quantization" if constant.scale else "weight"
                    yield stored(f"xnnpack.{number}.{constant.value}", dtype, shape, file, span, role)


def _segment(program: Any, index: int, base: int) -> tuple[int, int]:
    """Return the offset and size of a segment."""
    if not program.segments:
        return base, 0
    segment = program.segments[index]
    return base + segment.offset, segment.size
