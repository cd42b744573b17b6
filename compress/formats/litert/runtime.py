"""LiteRT runtime: a `.tflite` file on this machine's processor, through XNNPACK."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from compress.formats.litert.model import LiteRtModel
from compress.formats.model_file import file_of
from compress.formats.runtime import Batch, PackagedRuntime, TensorType, check_inputs, check_target
from compress.formats.target_profile import Target
from compress.utils.errors import InputError, ModelError, StageError

_MASK = "attention_mask"


class _Signature:
    """Graph of a file: its runner, and the shape and type of a row of each input."""

    def __init__(self, name: str, runner: Any) -> None:
        self.name = name
        self.runner = runner
        details = runner.get_input_details()
        self.shapes = {name: tuple(int(axis) for axis in entry["shape"]) for name, entry in details.items()}
        self.types = {name: np.dtype(entry["dtype"]) for name, entry in details.items()}
        self.outputs = {
            name: TensorType(np.dtype(entry["dtype"]).name, (None, *(int(axis) for axis in entry["shape"][1:])))
            for name, entry in runner.get_output_details().items()
        }
        token_shapes = [shape for shape in self.shapes.values() if len(shape) == 2]
        self.length = token_shapes[0][1] if len(token_shapes) == len(self.shapes) else None
        """Of a row of token ids; None where inputs have one size."""


class LiteRtSession:
    """Opened file. Rows run one after the other, each by the shortest graph that holds it, as in an app."""

    provider = "CPU"

    def __init__(self, interpreter: Any, where: str, threads: int) -> None:
        self._where, names = where, interpreter.get_signature_list()
        signatures = [_Signature(name, interpreter.get_signature_runner(name)) for name in names]
        self._signatures = sorted(signatures, key=lambda signature: signature.length or 0)
        last, lengths = self._signatures[-1], [str(signature.length) for signature in self._signatures]
        self.input_types: Mapping[str, TensorType] = {
            name: TensorType(last.types[name].name, (None, None) if last.length else (None, *shape[1:]))
            for name, shape in last.shapes.items()
        }
        self.output_types: Mapping[str, TensorType] = last.outputs
        self.inputs = tuple(self.input_types)
        self.settings: dict[str, Any] = {
            "runtime": f"ai-edge-litert {version('ai-edge-litert')}",
            "provider": self.provider,
            "intra_op_threads": threads,
            "delegate": "XNNPACK",
            "lengths": ", ".join(lengths) if last.length else "one size",
        }

    @property
    def signatures(self) -> Mapping[str, int | None]:
        """Names of the graphs, shortest first, with the number of tokens of each; None for inputs of one size."""
        return {signature.name: signature.length for signature in self._signatures}

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """See `Session.predict`; a row longer than every graph is an `InputError`."""
        check_inputs(self.inputs, batch, self._where)
        feeds = ({name: batch[name][row] for name in self.inputs} for row in range(len(batch[self.inputs[0]])))
        rows = [self._answer(feed) for feed in feeds]
        return {name: np.concatenate([row[name] for row in rows]) for name in self.output_types}

    def _answer(self, row: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        signature, length = self._signatures[-1], 0
        if signature.length is not None:
            length = _length(row)
            # The shortest signature that holds the row costs the least padding.
            fitting = (candidate for candidate in self._signatures if (candidate.length or 0) >= length)
            signature = next(fitting, signature)
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


def _length(row: Mapping[str, np.ndarray]) -> int:
    """Return the number of tokens up to the last unmasked one."""
    if _MASK not in row:
        return int(next(iter(row.values())).shape[-1])
    unmasked = np.flatnonzero(row[_MASK])
    return int(unmasked[-1]) + 1 if len(unmasked) else 1


def _filled(values: np.ndarray, signature: _Signature, name: str, length: int) -> np.ndarray:
    """Return a row in the graph's type, padded at the end with zeros that the mask excludes."""
    shape, kind = signature.shapes[name], signature.types[name]
    if signature.length is None:
        return np.ascontiguousarray(values, dtype=kind).reshape(shape)
    # The mask is padded with zeros too, so that the model ignores the padding.
    filled = np.zeros(shape, dtype=kind)
    filled[0, :length] = values[:length]
    return filled


class LiteRtRuntime(PackagedRuntime):
    """Runtime that opens LiteRT files through its interpreter."""

    name, distribution = "litert", "ai-edge-litert"

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


RUNTIME = LiteRtRuntime()
