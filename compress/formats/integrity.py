"""Inspection of models of all formats: stored tensors, answers to probes, and references of a format's spec."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.formats.generation.decoder import feeder
from compress.formats.registry import FORMATS, part_of
from compress.formats.runtime import Runtime, open_model, why_unavailable
from compress.formats.spec import load
from compress.formats.targets import TARGETS
from compress.models.folder_checks import CHUNK_ELEMENTS
from compress.models.model import files_in
from compress.models.processor import processor_of
from compress.models.stored_tensor import Role, StoredTensor, stored

if TYPE_CHECKING:
    from compress.formats.model_file import FileModel
    from compress.formats.runtime import Session
    from compress.tasks.task import Examples


Encode = Callable[[Any], "Examples"]
"""Function from a processor to the probes, encoded with that processor."""
Stored = Iterable[tuple[StoredTensor, np.ndarray]]
"""Stored tensors with their bytes."""

WINDOWS = 4
TOKENS = 64
POSITIONS = 8
"""Running text is probed at the last positions of the first tokens of a few windows."""
_CALLS = 8
"""Number of examples that are run for a graph without a task, which may be slow."""


@dataclass(frozen=True)
class ModelInspector:
    """Functions that read the stored tensors of models of one kind and compute their answers to probes, [n, ...].

    ``target`` is the target whose optional package the answers need, or ``None`` if they need none.
    """

    stored: Callable[[Any], Stored]
    logits: Callable[[Any, Encode], np.ndarray]
    target: str | None = None


@dataclass(frozen=True)
class InspectedModel:
    """Model whose stored tensors and answers can be examined."""

    model: Any
    how: ModelInspector

    def float_arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield every floating-point weight and scale with its name; a large one is split into pieces.

        A constant of the graph may be infinite, such as the mask of an attention or a router. It is left out.
        """
        for tensor, data in self.how.stored(self.model):
            # Packed weights are decoded to the values that the model computes with.
            values = tensor.decoded(data) if tensor.readable else data
            if "float" not in values.dtype.name:
                continue
            if not (tensor.role == "constant" and np.isinf(values).any() and not np.isnan(values).any()):
                flat = values.reshape(-1)
                starts = range(0, max(flat.size, 1), CHUNK_ELEMENTS)
                yield from ((tensor.name, flat[start : start + CHUNK_ELEMENTS]) for start in starts)

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of each stored tensor's type, shape and bytes, by name."""
        digests = {}
        for tensor, data in self.how.stored(self.model):
            digest = hashlib.sha256(f"{tensor.dtype} {tensor.shape}".encode())
            digest.update(data.data)
            digests[tensor.name] = digest.hexdigest()
        return digests

    def unavailable_reason(self) -> str | None:
        """Return the reason why the model cannot run here, or ``None``; its runtime may be an optional package."""
        return None if self.how.target is None else why_unavailable(TARGETS[self.how.target])

    def logits(self, encode: Encode) -> np.ndarray:
        """Return the model's answers to the probes, [n, ...]."""
        return self.how.logits(self.model, encode)


def stored_arrays(arrays: Iterable[tuple[str, np.ndarray]], constants: str | None = None) -> Stored:
    """Return arrays in memory as stored tensors; names that begin with ``constants`` are constants of a graph."""
    for name, array in arrays:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        role: Role = "constant" if constants is not None and name.startswith(constants) else "weight"
        yield stored(name, array.dtype.name, array.shape, Path(), (0, data.nbytes), role=role), data


def file_inspector(form: str) -> ModelInspector:
    """Return the `ModelInspector` of a file format, which uses the format's own tensor reader and target."""
    spec, read_tensors = FORMATS[form], part_of(form, "tensors")

    def stored_tensors(model: FileModel) -> Stored:
        with tempfile.TemporaryDirectory() as folder:
            model.save(Path(folder))
            for file in files_in(Path(folder), spec.tensors_suffix or spec.suffix, spec.beside):
                yield from ((tensor, tensor.data()) for tensor in read_tensors(file, Path(folder)))

    def logits(model: FileModel, encode: Encode) -> np.ndarray:
        return answers_of(open_model(model), encode(processor_of(model)))

    return ModelInspector(stored_tensors, logits, spec.targets[0].name)


def answers_of(session: Session, examples: Examples) -> np.ndarray:
    """Return the answers of a session to all ``examples`` at once.

    Whole calls run one by one, and their answers are cut to the smallest common size.
    """
    feed = feeder(session, "the stage's model")
    if examples.full_call:
        calls = [examples.batch([index]) for index in range(min(len(examples), _CALLS))]
        # Outputs of whole calls may differ in length; only the common part is compared.
        call_answers = [examples.answers(session.predict(call), call) for call in calls]
        fewest = min(answers.shape[1] for answers in call_answers)
        return np.concatenate([answers[:, :fewest] for answers in call_answers])
    batch = examples.batch(range(len(examples)))
    return examples.answers(session.predict(feed(batch)), batch)


def missing_references(form: str) -> list[str]:
    """Import everything that a format refers to and return what cannot be used, with the reasons."""
    faults = []
    for what, reference in FORMATS[form].references().items():
        try:
            fault = _fault(what, load(reference))
        except Exception as error:  # noqa: BLE001  # somebody else's module may raise anything while it is imported
            fault = f"cannot be imported: {error}"
        faults += [f"its {what} {reference} {fault}"] if fault else []
    return faults


def _fault(what: str, found: object) -> str | None:
    if what == "inspector":
        return None if isinstance(found, ModelInspector) else "is no ModelInspector"
    if not what.startswith("runtime "):
        return None if callable(found) else "cannot be called"
    absent = [name for name in vars(Runtime) if not name.startswith("_") and not hasattr(found, name)]
    return f"lacks {', '.join(absent)}" if absent else None
