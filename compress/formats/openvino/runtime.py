"""OpenVINO runtime: an IR on this machine's processor."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.formats.generation.decoder import likeliest
from compress.formats.generation.image_text import open_together
from compress.formats.model_file import file_of
from compress.formats.openvino.genai import (
    EXACT,
    KV_CACHE_PRECISION,
    SETTINGS,
    GenaiSession,
    Pipeline,
    genai_can_open,
    genai_version,
    reason,
)
from compress.formats.openvino.model import OpenVinoModel, find_graphs, weights_of
from compress.formats.runtime import Batch, PackagedRuntime, Session, TensorType, check_inputs, check_target
from compress.formats.target_profile import Target
from compress.utils.errors import InputError, ModelError, StageError, unreadable_file_error

if TYPE_CHECKING:
    import openvino
    from openvino import CompiledModel


_NUMPY_NAMES = {"f32": "float32", "f64": "float64", "f16": "float16", "i64": "int64", "i32": "int32"}
IDS, MASK, POSITIONS, BEAMS, LOGITS = "input_ids", "attention_mask", "position_ids", "beam_idx", "logits"
"""Inputs and outputs of a language model's IR, by the names of openvino-genai and optimum-intel."""


class OpenVinoSession:
    """Session of a compiled IR."""

    provider = "CPU"

    def __init__(self, compiled: CompiledModel, where: str, threads: int) -> None:
        self._where = where
        self._request = compiled.create_infer_request()
        self.input_types: Mapping[str, TensorType] = {port.any_name: _type(port) for port in compiled.inputs}
        self.output_types: Mapping[str, TensorType] = {port.any_name: _type(port) for port in compiled.outputs}
        self.inputs = tuple(self.input_types)
        self.settings: dict[str, Any] = {
            "runtime": f"openvino {version('openvino')}",
            "provider": self.provider,
            "intra_op_threads": threads,
            **{name.lower(): value for name, value in SETTINGS.items()},
        }

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """See `Session.predict`."""
        check_inputs(self.inputs, batch, self._where)
        try:
            outputs = self._request.infer({name: batch[name] for name in self.inputs}, share_inputs=True)
        except (RuntimeError, TypeError, ValueError) as error:
            raise StageError(f"The model failed on a batch: {reason(error)}", where=self._where) from error
        return {name: np.array(outputs[index]) for index, name in enumerate(self.output_types)}


class StatefulSession:
    """Compiled decoder that stores keys and values itself; every call of `predict` starts new texts."""

    inputs = (IDS,)
    provider = "CPU"

    def __init__(self, compiled: CompiledModel, where: str, threads: int) -> None:
        self._compiled, self.where = compiled, where
        self._request = compiled.create_infer_request()
        self._taken = {port.any_name for port in compiled.inputs}
        self._mask = np.zeros((0, 0), np.int64)
        self.input_types = {IDS: TensorType("int64", (None, None))}
        self.output_types = {LOGITS: _type(compiled.output(LOGITS))}
        self.vocabulary = _vocabulary(compiled)
        self.settings: dict[str, Any] = {
            "runtime": f"openvino {version('openvino')}",
            "provider": self.provider,
            "intra_op_threads": threads,
            "performance_hint": compiled.get_property("PERFORMANCE_HINT"),
            "inference_precision_hint": compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name(),
            "cache": compiled.get_property(KV_CACHE_PRECISION).get_type_name(),
            "inputs_that_share_a_scale": int(compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")),
        }

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """Return logits [n, length, vocabulary]; rows may be padded on either side. See `Session.predict`."""
        check_inputs(self.inputs, batch, self.where)
        mask = batch.get(MASK)
        return {LOGITS: self.logits(np.asarray(batch[IDS]), None if mask is None else np.asarray(mask))}

    def decoder(self) -> StatefulDecoder:
        """Return a greedy decoder with a cache of its own."""
        return StatefulDecoder(StatefulSession(self._compiled, self.where, self.settings["intra_op_threads"]))

    def logits(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Return the logits [rows, length, vocabulary] of texts from their start."""
        self._request.reset_state()
        self._mask = (np.ones_like(ids) if mask is None else mask).astype(np.int64)
        return self._read(ids)

    def more(self, ids: np.ndarray) -> np.ndarray:
        """Return the logits [rows, length, vocabulary] of ``ids`` that continue the texts so far."""
        # New tokens are never padding.
        self._mask = np.concatenate([self._mask, np.ones(ids.shape, np.int64)], axis=1)
        return self._read(ids)

    def _read(self, ids: np.ndarray) -> np.ndarray:
        outside = ids[(ids < 0) | (ids >= self.vocabulary)] if ids.dtype.kind in "iu" and ids.ndim == 2 else ids
        if outside.size or not ids.size:
            raise InputError(
                f"{IDS} of the type {ids.dtype} and the shape {list(ids.shape)} are no tokens of the model.",
                where=self.where,
                expected=f"integers [n, length] from 0 to {self.vocabulary - 1}",
            )
        # Positions count unmasked tokens only, so that left padding does not shift them.
        position_ids = np.maximum(self._mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        beam_indices = np.arange(len(ids), dtype=np.int32)
        feed = {IDS: ids.astype(np.int64), MASK: self._mask, POSITIONS: position_ids, BEAMS: beam_indices}
        try:
            outputs = self._request.infer({name: value for name, value in feed.items() if name in self._taken})
        except (RuntimeError, TypeError, ValueError) as error:
            raise StageError(f"The model failed on a text: {reason(error)}", where=self.where) from error
        return np.array(outputs[LOGITS])


class StatefulDecoder:
    """Greedy decoder that uses the session's own cache."""

    cached = True

    def __init__(self, session: StatefulSession) -> None:
        self._session = session
        self.vocabulary = session.vocabulary

    def prefill(self, ids: Sequence[int]) -> int:
        """Start a new text with one or more ``ids`` and return the next token."""
        return likeliest(self._session.logits(np.array([ids]))[0, -1], self._session.where)

    def step(self, token: int) -> int:
        """Append ``token`` and return the next token."""
        return likeliest(self._session.more(np.array([[token]]))[0, -1], self._session.where)


def _vocabulary(model: openvino.Model | openvino.CompiledModel) -> int:
    return int(model.output(LOGITS).get_partial_shape()[2].get_length())


def _type(port: Any) -> TensorType:
    kind = port.get_element_type().get_type_name()
    shape = tuple(None if axis.is_dynamic else axis.get_length() for axis in port.get_partial_shape())
    return TensorType(_NUMPY_NAMES.get(kind, kind), shape)


class OpenVinoRuntime(PackagedRuntime):
    """Runtime that opens IR through OpenVINO's processor plugin."""

    name = distribution = "openvino"

    def open(self, artifact: Path, target: Target, threads: int) -> Session:
        """Open the only IR of ``artifact``, a folder or file, or those of an image generator's components.

        The number of ``threads`` applies within an operator.
        """
        check_target(self, target, threads)
        return open_together([self._open(graph, threads) for graph in find_graphs(artifact)], artifact)

    def _open(self, graph: Path, threads: int) -> OpenVinoSession | StatefulSession | GenaiSession:
        model = read_model(graph)
        # A language model keeps its cache as internal state.
        if not any(BEAMS in port.get_names() for port in model.inputs):
            return OpenVinoSession(_compiled(graph, model, threads, SETTINGS), str(graph), threads)
        open_directly = partial(_stateful_session, graph, model, threads, SETTINGS)
        # It runs in openvino-genai where possible, because apps use it.
        if genai_can_open(graph):
            with contextlib.suppress(RuntimeError):
                pipeline = Pipeline(graph.parent, SETTINGS, threads)
                return GenaiSession(pipeline, _vocabulary(model), SETTINGS, threads, open_directly)
        return open_directly()

    def build(self) -> str:
        """Return the versions of OpenVINO and of openvino-genai, which generates text where it is installed."""
        return f"{version('openvino')}, genai {genai_version() or 'none'}"


def read_model(artifact: Path) -> openvino.Model:
    """Return the graph of the only IR of ``artifact``, a folder or a file; raise `ModelError`."""
    graph = file_of(artifact, OpenVinoModel.kind)
    weights_of(graph)
    try:
        return core().read_model(graph)
    except RuntimeError as error:
        raise _cannot_open(graph, error) from error


def open_stateful(graph: Path, threads: int, exact: bool = False) -> StatefulSession:
    """Open a language model's IR; raise `ModelError` if it is invalid.

    Args:
        graph: XML file.
        threads: Number of threads.
        exact: Whether to turn off the 8-bit rounding of activations and keys.
    """
    return _stateful_session(graph, read_model(graph), threads, {**SETTINGS, **(EXACT if exact else {})})


def _stateful_session(
    graph: Path, model: openvino.Model, threads: int, settings: Mapping[str, object]
) -> StatefulSession:
    """Compile ``model``, which was read from ``graph``, whose folder may be gone by now."""
    return StatefulSession(_compiled(graph, model, threads, settings), str(graph), threads)


def _compiled(
    graph: Path, model: openvino.Model, threads: int, settings: Mapping[str, object]
) -> openvino.CompiledModel:
    try:
        return core().compile_model(model, "CPU", {**settings, "INFERENCE_NUM_THREADS": threads})
    except RuntimeError as error:
        raise _cannot_open(graph, error) from error


def _cannot_open(graph: Path, error: RuntimeError) -> ModelError:
    return unreadable_file_error(f"OpenVINO cannot open the IR: {reason(error)}", graph, "openvino")


@functools.cache
def core() -> openvino.Core:
    """Return the process-wide OpenVINO core, which is never freed.

    Each core loads the processor plugin. Loading gives the thread another signal stack, and freeing restores the
    previous one. After two cores are freed in creation order, the thread uses a freed stack and Ctrl-C crashes.
    """
    import openvino

    return openvino.Core()


RUNTIME = OpenVinoRuntime()
