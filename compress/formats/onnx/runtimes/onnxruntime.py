"""ONNX Runtime: an ONNX graph on exactly one execution provider, and advice for files that it does not open."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as native

from compress.formats.generation.image_text import open_together
from compress.formats.model_file import model_files
from compress.formats.onnx.model import SHARED_CACHE
from compress.formats.runtime import Batch, CacheInPlace, Session, TensorType, check_inputs, check_target
from compress.formats.target_profile import Target
from compress.utils.errors import InputError, ModelError, StageError

if TYPE_CHECKING:
    import onnx


_AGAIN = "export the model again, or copy the folder again with all of its files"


_HINTS = {
    "External data path does not exist": "copy the folder again with all of its files; weights lie beside the graph, "
    "under the name that it gives them",
    "is till opset": "export the model with an older `opset`, or install a newer onnxruntime",
    "No Op registered": "export the model without custom operators, or with an operator set that has this one",
    "is not a registered": "export the model without custom operators, or with an operator set that has this one",
}
"""Advice by a part of ONNX Runtime's message."""


def cannot_open(graph: Path, error: Exception) -> ModelError:
    """Return the error for ONNX Runtime's ``error`` on opening ``graph``, with advice."""
    hint = next((hint for sign, hint in _HINTS.items() if sign in str(error)), _AGAIN)
    return ModelError(f"ONNX Runtime cannot open the graph: {reason(error)}", where=str(graph), hint=hint)


def reason(error: Exception) -> str:
    """Return ONNX Runtime's message on one line, without its code prefix."""
    return " ".join(str(error).split(" : ", 3)[-1].split())


onnxruntime.disable_telemetry_events()

FAILURES = (
    *(native.EPFail, native.EngineError, native.Fail, native.InvalidArgument, native.InvalidGraph),
    *(native.InvalidProtobuf, native.ModelRequiresCompilation, native.NoModel, native.NoSuchFile, native.NotFound),
    *(native.NotImplemented, native.RuntimeException),
)
_ERRORS_ONLY = 3
_NUMPY_NAMES = {"float": "float32", "double": "float64"}
_SPINNING, _STOPS_SPINNING = "session.intra_op.allow_spinning", "session.force_spinning_stop"
_ROOM = 256
"""Number of tokens by which a cache in place grows."""
_LOGITS = "logits"


class OnnxSession:
    """An ONNX graph that was opened on exactly the requested provider."""

    def __init__(
        self, session: onnxruntime.InferenceSession, graph: Path, provider: str, threads: int, alone: bool = True
    ) -> None:
        self._session = session
        self._graph = graph
        self._outputs = [output.name for output in session.get_outputs()]
        self.inputs = tuple(entry.name for entry in session.get_inputs())
        self.input_types = {entry.name: _type(entry) for entry in session.get_inputs()}
        self.output_types = {entry.name: _type(entry) for entry in session.get_outputs()}
        self.provider = provider
        self.settings: dict[str, Any] = {
            "runtime": f"onnxruntime {onnxruntime.__version__}",
            "provider": provider,
            "intra_op_threads": threads,
            "inter_op_threads": 1,
            "execution": "sequential",
            "graph_optimization": "all",
            "intra_op_spinning": True if alone else "while it runs",
        }

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """See `Session.predict`."""
        check_inputs(self.inputs, batch, str(self._graph))
        feed = {name: batch[name] for name in self.inputs}
        try:
            values = self._session.run(self._outputs, feed)
        # An invalid argument is the caller's fault, everything else the model's.
        except native.InvalidArgument as error:
            accepted = ", ".join(f"{entry.name} {entry.type} {entry.shape}" for entry in self._session.get_inputs())
            what = f"The model refuses the batch: {reason(error)}"
            raise InputError(what, where=str(self._graph), expected=accepted) from error
        except FAILURES as error:
            raise StageError(f"The model failed on a batch: {reason(error)}", where=str(self._graph)) from error
        return dict(zip(self._outputs, values, strict=True))

    def shared_cache(self, names: Mapping[str, str]) -> CacheInPlace | None:
        """See `SharesCache.shared_cache`."""
        if not allows_shared_cache(self._session):
            return None
        return _SharedCache(self._session, names, self.input_types, str(self._graph))


def session_of(graph: onnx.ModelProto, alone: bool = True) -> OnnxSession:
    """Open a graph in memory on the processor, ``alone`` or one of several in turn. Raises ONNX Runtime's errors."""
    provider = "CPUExecutionProvider"
    options = session_options(0, alone)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=[provider])
    return OnnxSession(session, Path("the stage's graph"), provider, 0, alone)


class _SharedCache:
    """Cache of one text in buffers that are input and output of the graph at once, with room for further tokens."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        names: Mapping[str, str],
        types: Mapping[str, TensorType],
        where: str,
    ) -> None:
        """Start with an empty cache.

        Args:
            session: The opened graph.
            names: Output of the cache by its input.
            types: Type of each input.
            where: Location for messages.
        """
        self._session, self._names, self._types, self._where = session, names, types, where
        self._binding = session.io_binding()
        self._buffers: dict[str, np.ndarray] = {}

    def predict(self, feed: Batch, seen: int, total: int) -> np.ndarray:
        """See `CacheInPlace.predict`."""
        try:
            if not self._buffers or next(iter(self._buffers.values())).shape[2] < total:
                # Larger buffers take over the cached tokens. They grow in steps, because every growth copies the cache.
                room = -(-total // _ROOM) * _ROOM
                self._binding.clear_binding_inputs()
                self._binding.clear_binding_outputs()
                for past, present in self._names.items():
                    dtype, shape = self._types[past]
                    buffer = np.zeros((1, int(shape[1] or 0), room, int(shape[3] or 0)), dtype)
                    if seen:
                        buffer[:, :, :seen] = self._buffers[past][:, :, :seen]
                    self._buffers[past] = buffer
                    # Input and output are bound to the same buffer.
                    value = onnxruntime.OrtValue.ortvalue_from_numpy(buffer)
                    self._binding.bind_ortvalue_input(past, value)
                    self._binding.bind_ortvalue_output(present, value)
            for name, array in feed.items():
                self._binding.bind_cpu_input(name, array)
            # Bound anew, for otherwise it would be written into the array of the call before.
            self._binding.bind_output(_LOGITS)
            self._session.run_with_iobinding(self._binding)
            logits: np.ndarray = self._binding.get_outputs()[-1].numpy()
            return logits
        except (*FAILURES, RuntimeError) as error:
            raise StageError(f"The model failed on a token: {reason(error)}", where=self._where) from error


def allows_shared_cache(session: onnxruntime.InferenceSession) -> bool:
    """Return whether the graph's metadata states that input and output of its cache may be one buffer."""
    return bool(session.get_modelmeta().custom_metadata_map.get(SHARED_CACHE) == "1")


def _type(entry: onnxruntime.NodeArg) -> TensorType:
    """Return type and shape of an input or output."""
    kind = entry.type.removeprefix("tensor(").removesuffix(")")
    return TensorType(_NUMPY_NAMES.get(kind, kind), tuple(entry.shape))


class OnnxRuntime:
    """Runtime that opens ONNX graphs through ONNX Runtime."""

    name = "onnxruntime"

    def open(self, artifact: Path, target: Target, threads: int) -> Session:
        """Open the graph of ``artifact``, a folder or the file, in either format, or the graphs that form one model.

        ``threads`` work within an operator.
        """
        check_target(self, target, threads)
        graphs = model_files(artifact, self.name)
        sessions: list[OnnxSession] = []
        alone = len(graphs) == 1
        options, accepted = session_options(threads, alone), _providers(target.provider)
        for graph in graphs:
            try:
                session = onnxruntime.InferenceSession(graph, sess_options=options, providers=accepted)
            except FAILURES as error:
                raise cannot_open(graph, error) from error
            # Otherwise a failing provider is replaced during a later call, without a word.
            session.disable_fallback()
            providers = session.get_providers()
            if providers[0] != target.provider:
                raise StageError(
                    f"ONNX Runtime took {providers[0]} in place of {target.provider}.",
                    where=f"target {target.name!r}",
                    hint="see `compress doctor`; the provider's libraries or its device are missing",
                )
            sessions.append(OnnxSession(session, graph, providers[0], threads, alone))
        return open_together(sessions, artifact)

    def unavailable(self, target: Target) -> str | None:
        """Return why this machine lacks the target: the package lacks the provider, or it cannot open a graph."""
        return _why_not(target.provider)

    def build(self) -> str:
        """Return the package's version."""
        return str(onnxruntime.__version__)


@functools.cache
def _why_not(provider: str) -> str | None:
    """Return why a provider is unavailable, or None; it is tried on a tiny graph."""
    available = onnxruntime.get_available_providers()
    if provider not in available:
        return f"the installed onnxruntime has no {provider} (it has {', '.join(available)})"
    if provider == "CPUExecutionProvider":
        return None
    # A provider may be compiled in although its driver or device is missing.
    try:
        # A tiny graph.
        from onnx import TensorProto, helper

        value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "probe", value[:1], value[1:])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        session = onnxruntime.InferenceSession(
            bytes(model.SerializeToString()), session_options(1), providers=_providers(provider)
        )
    except FAILURES as error:
        return f"{provider} does not start: {reason(error)}"
    if session.get_providers()[0] != provider:
        return f"{provider} does not start here; its driver, libraries or device are missing"
    return None


def _providers(provider: str) -> list[str]:
    """Return the provider with the processor as a fallback for single operators."""
    # Every provider leaves some operators (shapes, say) to the processor.
    return [provider] if provider == "CPUExecutionProvider" else [provider, "CPUExecutionProvider"]


def session_options(threads: int, alone: bool = True) -> onnxruntime.SessionOptions:
    """Return the options for every graph: all optimizations, ``threads`` within an operator, one operator at a time.

    Idle threads wait by spinning, ready for the next call. If graphs run in turn and are not ``alone``, spinning
    threads take the processor from the running graph: an image of four steps took 28 ms instead of 11 on two cores.
    Such graphs spin only while they run.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry(_SPINNING, "1")
    options.add_session_config_entry(_STOPS_SPINNING, "0" if alone else "1")
    return options


RUNTIME = OnnxRuntime()
