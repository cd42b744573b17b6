"""The contract that every stage's output keeps, checked on the files just written, before they get their name."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import IntegrityError
from compress.models.checkpoint import TABLES, Checkpoint
from compress.models.gguf_model import GgufModel
from compress.models.model import size_bytes
from compress.models.onnx_model import OnnxModel, processor_of
from compress.models.ort_model import ORT_FILE, OrtModel
from compress.models.torch_model import TorchModel
from compress.stages.stage import Promise

if TYPE_CHECKING:
    from compress.tasks.task import Examples

AnyModel = TorchModel | Checkpoint | OnnxModel | GgufModel | OrtModel

PROBES = 32
PROBE_WINDOWS = 4
PROBE_TOKENS = 64
PROBE_POSITIONS = 8
"""A checkpoint is probed at the last positions of the beginnings of a few windows."""
_SAME = 1e-5


@dataclass
class Contract:
    """The checks of one stage, in order; ``found`` keeps what each of them saw, for the report."""

    label: str
    promise: Promise
    found: list[tuple[str, str]] = field(default_factory=list)

    def check(
        self,
        model: AnyModel,
        before: Mapping[str, str],
        before_bytes: int,
        folder: Path,
        probe: Probe,
    ) -> None:
        """Hold ``model``, saved in ``folder``, to the contract. ``before`` are the input's tensor digests.

        Raises `IntegrityError` with the stage's name and what to try.
        """
        self._finite(model)
        self._changed(before, tensor_digests(model))
        self._size(before_bytes, size_bytes(folder))
        reason = _why_no_predictions(model)
        if reason is not None:
            self.found.append(("predictions", f"not looked at: {reason}"))
            return
        outputs = probe.in_memory(model)
        self._sane(outputs)
        self._reloads(outputs, probe.from_disk(folder))

    def _fail(self, what: str, mend: str) -> IntegrityError:
        return IntegrityError(f"Stage {self.label!r}: {what}", mend=mend)

    def _finite(self, model: AnyModel) -> None:
        for name, array in float_arrays(model):
            if not np.isfinite(array).all():
                raise self._fail(
                    f"the tensor {name!r} holds NaN or infinite values.",
                    "lower the learning rate or set precision: fp32, and look at the stage's input",
                )
        self.found.append(("weights finite", "all"))

    def _changed(self, before: Mapping[str, str], after: Mapping[str, str]) -> None:
        if not self.promise.changes_weights:
            return
        changed = sum(before.get(name) != digest for name, digest in after.items()) + len(before.keys() - after.keys())
        if changed == 0:
            raise self._fail("no weight changed.", "check the stage's parameters: as given they do nothing")
        self.found.append(("tensors changed", str(changed)))

    def _size(self, before: int, after: int) -> None:
        limit = self.promise.max_size_ratio
        self.found.append(("size", f"{after:,} bytes, {after / before:.1%} of its input"))
        if limit is not None and after > limit * before:
            raise self._fail(
                f"the result has {after:,} bytes, {after / before:.0%} of its input; at most {limit:.0%} was promised.",
                "look at `compress inspect` for the tensors that stayed large",
            )

    def _sane(self, outputs: np.ndarray) -> None:
        if not np.isfinite(outputs).all():
            raise self._fail("its predictions hold NaN or infinite values.", "look at the stage's input and parameters")
        if len(outputs) > 1 and np.ptp(outputs, axis=0).max() == 0:
            raise self._fail("it predicts the same for every example.", "compress less, or train longer afterwards")
        self.found.append(("predictions", "finite and not constant"))

    def _reloads(self, expected: np.ndarray, reloaded: np.ndarray) -> None:
        difference = float(np.abs(expected - reloaded).max())
        if not difference <= _SAME:
            raise self._fail(
                f"once saved and loaded it predicts otherwise (a logit differs by {difference:.1e}).",
                "this is a defect of the stage; please report it with the recipe",
            )
        self.found.append(("saved and loaded", f"logits differ by {difference:.0e}"))


@dataclass(frozen=True)
class Probe:
    """How to get predictions of a model for a few examples, from memory and from its files."""

    load: Callable[[Path], AnyModel]
    encode: Callable[[Any], Examples]

    def in_memory(self, model: AnyModel) -> np.ndarray:
        """Logits of the model object itself, [n, ...]."""
        if isinstance(model, TorchModel):
            from compress.training.predict import predict

            return predict(model.module, self.encode(model.processor))
        if isinstance(model, Checkpoint):
            return _stream(model, self.encode)
        if isinstance(model, GgufModel):
            from compress.pipeline.gguf_probe import gguf_logits

            return gguf_logits(model, self.encode, PROBE_WINDOWS, PROBE_TOKENS, PROBE_POSITIONS)
        if isinstance(model, OrtModel):
            return _run_onnx(model.graph, self.encode(processor_of(model)))
        if model.others:
            from compress.pipeline.speech_probe import speech_logits

            return speech_logits(model, self.encode)
        return _run_onnx(model.graph.SerializeToString(), self.encode(processor_of(model)))

    def from_disk(self, folder: Path) -> np.ndarray:
        """Logits after loading ``folder`` again, [n, ...]."""
        return self.in_memory(self.load(folder))


def _why_no_predictions(model: AnyModel) -> str | None:
    """Why a model cannot be asked here: its runtime is an optional package."""
    if not isinstance(model, GgufModel):
        return None
    from compress.pipeline.gguf_probe import why_no_predictions

    return why_no_predictions()


def _stream(checkpoint: Checkpoint, encode: Callable[[Any], Examples]) -> np.ndarray:
    """Logits [positions, vocabulary] with one block in memory at a time."""
    import torch

    from compress.models.tokenizer import load_tokenizer
    from compress.quantization.build import build_skeleton
    from compress.quantization.logits import last_hidden

    skeleton = build_skeleton(checkpoint)
    windows = [example["input_ids"] for example in encode(load_tokenizer(checkpoint.folder)).inputs[:PROBE_WINDOWS]]
    length = min(PROBE_TOKENS, *(len(window) for window in windows))
    ids = torch.from_numpy(np.stack([window[:length] for window in windows]))
    with torch.no_grad():
        logits = skeleton.logits(last_hidden(skeleton, ids)[:, -PROBE_POSITIONS:])
    return np.asarray(logits.flatten(0, 1))


def _run_onnx(graph: bytes, examples: Examples) -> np.ndarray:
    import onnxruntime

    from compress.runtimes.decoder import feeder
    from compress.runtimes.onnxruntime import OnnxSession

    name = "CPUExecutionProvider"
    session = OnnxSession(onnxruntime.InferenceSession(graph, providers=[name]), Path("the stage's graph"), name, 0)
    feed = feeder(session, "the stage's graph")
    batch = examples.batch(range(len(examples)))
    return examples.answers(session.predict(feed(batch)), batch)


def float_arrays(model: AnyModel) -> Iterable[tuple[str, np.ndarray]]:
    """Every floating-point weight with its name; those of a checkpoint come in pieces, mapped from their files."""
    if isinstance(model, Checkpoint):
        return _pieces(model)
    if isinstance(model, GgufModel):
        from compress.pipeline.gguf_probe import gguf_arrays

        return gguf_arrays(model)
    if isinstance(model, OrtModel):
        return ((name, array) for name, array in _ort_arrays(model) if array.dtype.kind == "f")
    if isinstance(model, TorchModel):
        tensors = model.tensors().items()
        return [(name, tensor.float().numpy()) for name, tensor in tensors if tensor.is_floating_point()]
    return [(name, array) for name, array in _graph_arrays(model) if array.dtype.kind == "f"]


def _graph_arrays(model: OnnxModel) -> Iterator[tuple[str, np.ndarray]]:
    """Every stored tensor; names are those of the weights' modules, and so of one graph alone."""
    from onnx import numpy_helper

    for graph in model.graphs.values():
        for tensor in graph.graph.initializer:
            yield tensor.name, numpy_helper.to_array(tensor)


def _ort_arrays(model: OrtModel) -> Iterator[tuple[str, np.ndarray]]:
    from compress.models.ort_file import load_ort_tensor, read_ort

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / ORT_FILE
        file.write_bytes(model.graph)
        for tensor in read_ort(file).tensors:
            yield tensor.name, load_ort_tensor(file, tensor)


def tensor_digests(model: AnyModel) -> dict[str, str]:
    """SHA-256 of each weight's shape and bytes, by name."""
    import hashlib

    if isinstance(model, Checkpoint):
        return _stored_digests(model)
    if isinstance(model, GgufModel):
        from compress.pipeline.gguf_probe import gguf_digests

        return gguf_digests(model)
    if isinstance(model, TorchModel):
        arrays = [(name, tensor.numpy()) for name, tensor in model.tensors().items()]
    else:
        arrays = list(_ort_arrays(model) if isinstance(model, OrtModel) else _graph_arrays(model))
    return {
        name: hashlib.sha256(str(array.shape).encode() + np.ascontiguousarray(array).tobytes()).hexdigest()
        for name, array in arrays
    }


def _stored(checkpoint: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    from compress.models.checks import weight_files
    from compress.models.safetensors_file import load_array, read_header

    tables = checkpoint.folder / TABLES
    for file in (*weight_files(checkpoint.folder), *([tables] if tables.is_file() else [])):
        for tensor in read_header(file):
            yield tensor.name, load_array(tensor)


def _pieces(checkpoint: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    from compress.models.checks import CHUNK_ELEMENTS

    for name, array in _stored(checkpoint):
        if "float" in array.dtype.name:
            values = array.reshape(-1)
            for start in range(0, values.size, CHUNK_ELEMENTS):
                yield name, values[start : start + CHUNK_ELEMENTS]


def _stored_digests(checkpoint: Checkpoint) -> dict[str, str]:
    import hashlib

    digests = {}
    for name, array in _stored(checkpoint):
        digest = hashlib.sha256(f"{array.shape} {array.dtype}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
        digests[name] = digest.hexdigest()
    return digests
