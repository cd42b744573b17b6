"""LiteRT: a `.tflite` file on this machine's processor, through XNNPACK."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from compress.formats.litert.model import LiteRtModel
from compress.formats.model_file import file_of
from compress.formats.runtime import Batch, TensorType, check_inputs, check_target, why_missing
from compress.formats.target_profile import Target
from compress.utils.errors import InputError, ModelError, StageError

_MASK = "attention_mask"


class _Signature:
    """One of the graphs: its runner, and the shape and type of a row of each input."""

    def __init__(self, name: str, runner: Any) -> None:
        self.name = name
        self.runner = runner
        details = runner.get_input_details()
        self.shapes = {name: tuple(int(axis) for axis in one["shape"]) for name, one in details.items()}
        self.types = {name: np.dtype(one["dtype"]) for name, one in details.items()}
        self.outputs = {
            name: TensorType(np.dtype(one["dtype"]).name, (None, *(int(axis) for axis in one["shape"][1:])))
            for name, one in runner.get_output_details().items()
        }
        texts = [shape for shape in self.shapes.values() if len(shape) == 2]
        self.length = texts[0][1] if len(texts) == len(self.shapes) else None
        """Of a row of token ids; None where inputs have one size."""


class LiteRtSession:
    """An opened file. Rows run one after the other, each by the shortest graph that holds it, as an app runs them."""

    def __init__(self, interpreter: Any, where: str, threads: int) -> None:
        self._where = where
        found = [_Signature(name, interpreter.get_signature_runner(name)) for name in interpreter.get_signature_list()]
        self._signatures = sorted(found, key=lambda one: one.length or 0)
        last = self._signatures[-1]
        self.input_types: Mapping[str, TensorType] = {
            name: TensorType(last.types[name].name, (None, None) if last.length else (None, *shape[1:]))
            for name, shape in last.shapes.items()
        }
        self.output_types: Mapping[str, TensorType] = last.outputs
        self.inputs = tuple(self.input_types)
        self.provider = "CPU"
        self.settings: dict[str, Any] = {
            "runtime": f"ai-edge-litert {version('ai-edge-litert')}",
            "provider": self.provider,
            "intra_op_threads": threads,
            "delegate": "XNNPACK",
            "lengths": ", ".join(str(one.length) for one in self._signatures if one.length) or "one size",
        }

    @property
    def signatures(self) -> Mapping[str, int | None]:
        """Names of the graphs, shortest first, with the tokens that each takes; None where inputs have one size."""
        return {one.name: one.length for one in self._signatures}

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """See `Session.predict`; a row longer than every graph is an `InputError`."""
        check_inputs(self.inputs, batch, self._where)
        rows = [
            self._answer({name: batch[name][row] for name in self.inputs}) for row in range(len(batch[_any(batch)]))
        ]
        return {name: np.concatenate([row[name] for row in rows]) for name in self.output_types}

    def _answer(self, row: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        signature, length = self._signatures[-1], 0
        if signature.length is not None:
            length = _length(row)
            signature = next((one for one in self._signatures if (one.length or 0) >= length), signature)
        try:
            feed = {name: _filled(row[name], signature, name, length) for name in self.inputs}
        except (ValueError, TypeError) as error:
            longest = signature.length
            raise InputError(
                f"A row of {length} tokens does not fit." if longest else f"A row does not fit: {error}",
                where=self._where,
                expected=f"at most {longest} tokens" if longest else f"rows of {signature.shapes}",
                hint="write the model with longer lengths (stage litert), or cut the text" if longest else None,
            ) from error
        try:
            answer: dict[str, np.ndarray] = signature.runner(**feed)
        except (RuntimeError, ValueError) as error:
            raise StageError(f"The model failed on a row: {error}", where=self._where) from error
        return answer


def _any(batch: Batch) -> str:
    return next(iter(batch))


def _length(row: Mapping[str, np.ndarray]) -> int:
    """Return the number of tokens up to the last unmasked one."""
    if _MASK not in row:
        return int(next(iter(row.values())).shape[-1])
    counted = np.flatnonzero(row[_MASK])
    return int(counted[-1]) + 1 if len(counted) else 1


def _filled(values: np.ndarray, signature: _Signature, name: str, length: int) -> np.ndarray:
    """A row as the graph takes it: in its type, and padded at the end with zeros, which the mask leaves out."""
    shape, kind = signature.shapes[name], signature.types[name]
    if signature.length is None:
        return np.ascontiguousarray(values, dtype=kind).reshape(shape)
    filled = np.zeros(shape, dtype=kind)
    filled[0, :length] = values[:length]
    return filled


class LiteRtRuntime:
    """Opens LiteRT files through its interpreter."""

    name = "litert"

    def open(self, artifact: Path, target: Target, threads: int) -> LiteRtSession:
        """See `Runtime.open`."""
        check_target(self, target, threads)
        (file,) = LiteRtModel.files_with(file_of(artifact, LiteRtModel.kind))
        from ai_edge_litert.interpreter import Interpreter

        try:
            interpreter = Interpreter(model_path=str(file), num_threads=threads)
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"LiteRT cannot open the file: {error}",
                where=str(file),
                hint="write it again with the stage litert, or copy it again",
            ) from error
        if not interpreter.get_signature_list():
            raise ModelError("The file names no signature.", where=str(file), hint="write it with the stage litert")
        return LiteRtSession(interpreter, str(file), threads)

    def unavailable(self, target: Target) -> str | None:
        """Why this machine lacks the target: the package is not installed."""
        return why_missing("ai_edge_litert", "ai-edge-litert", "litert")

    def build(self) -> str:
        """Return the package's version."""
        return version("ai-edge-litert")


RUNTIME = LiteRtRuntime()
