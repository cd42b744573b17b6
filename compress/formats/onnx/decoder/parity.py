"""Proof that a model's graphs compute what the torch model with the same weights computes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from compress.checkpoints.adapter import load_adapted
from compress.checkpoints.checkpoint import Checkpoint
from compress.errors import IntegrityError, first_line
from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel
from compress.formats.onnx.runtimes.onnxruntime import FAILURES
from compress.formats.prove import distance
from compress.runtimes.decoder import present_of

_FEW_BITS, _LEVEL, _FP32 = "MatMulNBits", "accuracy_level", 1


@dataclass(frozen=True)
class Equality:
    """``difference``: the largest of a logit from torch, all arithmetic in fp32.

    ``rounding`` is what activations rounded to 8 bits add in the graph that ships: the root mean square of the
    logits' differences over that of the logits about their mean; 0 where nothing is rounded. ``agreement`` is the
    share of positions with the same likeliest token.
    """

    difference: float
    rounding: float
    agreement: float

    def __str__(self) -> str:
        text = f"logits differ by at most {self.difference:.1e} from torch in fp32"
        if self.rounding == 0:
            return text
        return (
            f"{text}; activations in 8 bits move them by {self.rounding:.1%} of their spread, "
            f"and the likeliest token of {1 - self.agreement:.1%} of the positions"
        )


def prove_decoder(
    model: OnnxModel, checkpoint: Checkpoint, windows: np.ndarray, tolerance: float, rounding_limit: float
) -> Equality:
    """Compare graph and torch on ``windows`` [2 or more, length] of token ids.

    Three ways: all windows in one go; the first half in one go and every later token by itself; and the second row
    cut to half its length and padded on the right. Raises `IntegrityError` for a difference above ``tolerance`` in
    fp32, or above ``rounding_limit`` as shipped.
    """
    module = load_adapted(checkpoint)
    with torch.inference_mode():
        expected = module(torch.from_numpy(windows)).logits.numpy()
    del module
    exact = with_level(model)
    difference = held_to(tolerance, _answers(_Session(exact), windows, expected))
    if exact is model:
        return Equality(difference, 0.0, 1.0)
    shipped = _Session(model).logits(windows)
    return Equality(difference, *rounding_of(shipped, expected[:, -shipped.shape[1] :], rounding_limit))


def held_to(tolerance: float, pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """The largest difference of pairs of expected and found logits. Raises `IntegrityError` above ``tolerance``."""
    worst = distance(pairs).worst
    difference = worst if np.isfinite(worst) else float("inf")
    if not difference <= tolerance:
        raise IntegrityError(
            f"The decoder's logits differ from torch by {difference:.2e}, all arithmetic in fp32.",
            expected=f"at most {tolerance:g}",
            mend="raise tolerance if the difference is acceptable; else please report it with the model's config",
        )
    return difference


def rounding_of(shipped: np.ndarray, expected: np.ndarray, limit: float) -> tuple[float, float]:
    """How far logits are off in the root mean square, and how often both have the same likeliest token."""
    spread = expected - expected.mean(-1, keepdims=True)
    rounding = float(np.sqrt(np.square(shipped - expected).mean() / np.square(spread).mean()))
    if not rounding <= limit:
        raise IntegrityError(
            f"With activations in 8 bits the decoder's logits are off by {rounding:.1%} of their spread.",
            expected=f"at most {limit:.1%}",
            mend="set accuracy_level: 1, which computes in fp32 and is slower, or raise rounding_limit",
        )
    return rounding, float((shipped.argmax(-1) == expected.argmax(-1)).mean())


def _answers(session: _Session, windows: np.ndarray, expected: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of ``expected`` and what the graph answers in each of the three ways, the positions that the graph gives."""
    length = windows.shape[1]
    half = length // 2

    def last(of: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return of[..., -found.shape[-2] :, :], found

    yield last(expected, session.logits(windows))
    yield last(expected[:, :half], session.logits(windows[:, :half]))
    for place in range(half, length):
        yield last(expected[:, place : place + 1], session.more(windows[:, place : place + 1]))
    mask = np.ones_like(windows)
    mask[1, half:] = 0
    padded = session.logits(np.where(mask == 1, windows, windows[0, 0]), mask)
    if padded.shape[1] == length:
        yield expected[0], padded[0]
        yield expected[1, :half], padded[1, :half]


def with_level(model: OnnxModel, level: int = _FP32) -> OnnxModel:
    """The model itself where nothing is rounded, else a copy whose few-bit products have that accuracy level."""
    if all(found.i == level for graph in model.graphs.values() for found in _levels(graph.graph)):
        return model
    graphs = {}
    for name, graph in model.graphs.items():
        graphs[name] = onnx.ModelProto()
        graphs[name].CopyFrom(graph)
        for attribute in _levels(graphs[name].graph):
            attribute.i = level
    return model.with_graphs(graphs)


def _levels(graph: onnx.GraphProto) -> Iterator[onnx.AttributeProto]:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _levels(attribute.g)
            elif node.op_type == _FEW_BITS and attribute.name == _LEVEL:
                yield attribute


def opened(graph: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """A graph opened from its own file, as whoever gets it will."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        OnnxModel(graph, FLOAT_GRAPH, {}).save(Path(folder))
        path = next(Path(folder).rglob("*.onnx"))
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class _Session:
    """An opened graph with the cache of what it has read."""

    def __init__(self, model: OnnxModel) -> None:
        self._session = opened(model.graph)
        self._cache: dict[str, Any] = {}
        self._mask = np.ones((0, 0), np.int64)

    def logits(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """[rows, length, vocabulary] of texts from their beginning."""
        past = [entry for entry in self._session.get_inputs() if entry.name.startswith("past")]
        # Rows in the first place; any other free axis is the length of what is kept, of which there is nothing yet.
        shapes = {
            entry.name: (len(ids), *(axis if isinstance(axis, int) else 0 for axis in entry.shape[1:]))
            for entry in past
        }
        self._cache = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        self._mask = np.ones_like(ids) if mask is None else mask
        return self._run(ids)

    def more(self, ids: np.ndarray) -> np.ndarray:
        """[rows, length, vocabulary] of what follows the texts so far."""
        self._mask = np.concatenate([self._mask, np.ones_like(ids)], axis=1)
        return self._run(ids)

    def _run(self, ids: np.ndarray) -> np.ndarray:
        names = ["logits", *(present_of(name) for name in self._cache)]
        try:
            found = self._session.run(names, {"input_ids": ids, "attention_mask": self._mask, **self._cache})
        except FAILURES as error:
            new, seen = ids.shape[1], self._mask.shape[1] - ids.shape[1]
            raise IntegrityError(
                f"The decoder's graph does not run on {new} tokens after {seen}: {first_line(error)}",
                expected="a graph for prompts and tokens of any length",
                mend="ship the model as a GPTQ checkpoint or GGUF instead",
            ) from error
        self._cache = dict(zip(self._cache, found[1:], strict=True))
        logits: np.ndarray = found[0]
        return logits
