"""ExecuTorch runtime: a `.pte` program on this machine's processor, with XNNPACK and ExecuTorch's portable kernels."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.formats.executorch.model import ExecuTorchModel, ProgramInterface, check_whole, read_interface
from compress.formats.model_file import file_of
from compress.formats.quiet_output import suppress_output
from compress.formats.runtime import Batch, PackagedRuntime, TensorType, check_inputs, check_target
from compress.formats.target_profile import Target
from compress.utils.errors import InputError, StageError, incomplete_artifact_error, unreadable_file_error

if TYPE_CHECKING:
    from executorch.runtime import Runtime


METHOD = "forward"
_TYPES = {0: "uint8", 1: "int8", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 7: "float64", 11: "bool"}
"""numpy types by ExecuTorch's numbers, for the types that models use as inputs and outputs."""


class ExecuTorchSession:
    """Session of a program's method. It runs as many rows per call as the program has memory for."""

    provider = "XnnpackBackend"

    def __init__(self, program: Any, interface: ProgramInterface, file: Path, threads: int) -> None:
        # The method reads its weights from the program's bytes, so the program must stay alive.
        self._program = program
        self._method = program.load_method(METHOD)
        self._where = str(file)
        metadata = self._method.metadata
        if (metadata.num_inputs(), metadata.num_outputs()) != (len(interface.inputs), len(interface.outputs)):
            raise incomplete_artifact_error(
                f"The program has {metadata.num_inputs()} inputs and {metadata.num_outputs()} outputs, "
                f"its config names {len(interface.inputs)} and {len(interface.outputs)}.",
                file,
            )
        inputs = {name: metadata.input_tensor_meta(index) for index, name in enumerate(interface.inputs)}
        outputs = {name: metadata.output_tensor_meta(index) for index, name in enumerate(interface.outputs)}
        self.bounds: Mapping[str, tuple[int, ...]] = {name: tuple(tensor.sizes()) for name, tensor in inputs.items()}
        """Largest shape of each input."""
        self.inputs = tuple(inputs)
        self.input_types = {name: TensorType(_dtype(inputs[name]), axes) for name, axes in interface.inputs.items()}
        self.output_types = {
            name: TensorType(_dtype(tensor), tuple(tensor.sizes())) for name, tensor in outputs.items()
        }
        self._rows = self.bounds[self.inputs[0]][0]
        self.settings: dict[str, Any] = {
            "runtime": f"executorch {version('executorch')}",
            "provider": self.provider,
            "intra_op_threads": threads,
            "rows_at_once": self._rows,
        }

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """See `Session.predict`."""
        import torch

        check_inputs(self.inputs, batch, self._where)
        arrays = [batch[name] for name in self.inputs]
        for name, array in zip(self.inputs, arrays, strict=True):
            self._check_input(name, array)
        calls = []
        for start in range(0, len(arrays[0]), self._rows):
            rows = (np.ascontiguousarray(array[start : start + self._rows]) for array in arrays)
            try:
                outputs = self._method.execute([torch.from_numpy(array) for array in rows])
            except RuntimeError as error:
                raise StageError(f"The model failed on a batch: {error}", where=self._where) from error
            calls.append([output.numpy() for output in outputs])
        columns = zip(*calls, strict=True)
        return {name: np.concatenate(parts) for name, parts in zip(self.output_types, columns, strict=True)}

    def _check_input(self, name: str, array: np.ndarray) -> None:
        """Raise `InputError` for an array of another type or shape, or one that exceeds the program's memory."""
        (dtype, axes), bound = self.input_types[name], self.bounds[name]
        sizes = zip(array.shape[1:], axes[1:], bound[1:], strict=False)
        fits = array.ndim == len(axes) and all(
            size == most or (isinstance(axis, str) and 0 < size < most) for size, axis, most in sizes
        )
        if not fits or array.dtype.name != dtype:
            limits = zip(axes[1:], bound[1:], strict=True)
            shape = ["rows", *(f"{axis} up to {most}" if isinstance(axis, str) else str(axis) for axis, most in limits)]
            raise InputError(
                f"The model's input {name} cannot be {array.dtype.name} {list(array.shape)}.",
                where=self._where,
                expected=f"{dtype} [{', '.join(shape)}]",
                hint="for longer texts, write the program again with a larger max_length",
            )


def _dtype(about: Any) -> str:
    return _TYPES.get(about.dtype(), f"type {about.dtype()}")


class ExecuTorchRuntime(PackagedRuntime):
    """Runtime that opens programs through `executorch.runtime`."""

    name = distribution = "executorch"

    def open(self, artifact: Path, target: Target, threads: int) -> ExecuTorchSession:
        """Open the only program of ``artifact``, a folder or the file beside its config."""
        check_target(self, target, threads)
        file = file_of(artifact, ExecuTorchModel.kind)
        program, interface = file.read_bytes(), read_interface(file.parent)
        check_whole(program, file)
        runtime = load_runtime()
        # Set the number of threads for all sessions of this process, because XNNPACK has one thread pool.
        with suppress_output("process"):
            from executorch.extension.pybindings import portable_lib

            if portable_lib._threadpool_get_thread_count() != threads:
                portable_lib._unsafe_reset_threadpool(threads)
        with suppress_output("process") as error_output:
            try:
                return ExecuTorchSession(runtime.load_program(program), interface, file, threads)
            except (RuntimeError, KeyError) as error:
                what = f"ExecuTorch cannot open the program: {_reason(error, error_output())}"
                raise unreadable_file_error(what, file, "executorch") from error


@functools.cache
def load_runtime() -> Runtime:
    """Return ExecuTorch's runtime with its kernels for quantized tables."""
    with suppress_output("process"):
        # In this order: the other way round, XNNPACK refuses quantized programs.
        import executorch.runtime  # isort: skip
        import executorch.kernels.quantized  # isort: skip

        return executorch.runtime.Runtime.get()


def _reason(error: Exception, log: str) -> str:
    """Return the last error that the C++ code logged, which is more specific than the exception."""
    lines = [line.partition("] ")[2] for line in log.splitlines() if line.startswith("[") and "cpuinfo" not in line]
    return next((line.strip() for line in reversed(lines) if line.strip()), str(error).strip() or type(error).__name__)


RUNTIME = ExecuTorchRuntime()
