"""Proof that the graphs of an encoder and its decoder compute what the torch model with the same weights computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from compress.checkpoints.adapter import ADAPTER, load_adapted
from compress.checkpoints.checkpoint import Checkpoint
from compress.checkpoints.hollow import auto_class
from compress.formats.onnx.decoder.parity import Equality, held_to, opened, rounding_of, with_level
from compress.formats.onnx.decoder.parts import CACHED, ENCODER_MASK, HIDDEN, IDS, MASK
from compress.formats.onnx.model import OnnxModel
from compress.runtimes.decoder import PAST, present_of

_PROMPT = 2
"""Tokens that are read at once, as a transcript's prompt is, before the others come one by one."""
Inputs = Mapping[str, np.ndarray]
"""What an encoder is given: rows of examples, by the names of its inputs."""


def prove_encoder_decoder(
    model: OnnxModel,
    checkpoint: Checkpoint,
    inputs: Sequence[Inputs],
    texts: Sequence[np.ndarray],
    tolerance: float,
    rounding_limit: float,
    more: int = 0,
) -> Equality:
    """Compare graphs and torch over ``inputs`` and their ``texts`` of token ids [rows, length].

    After a text come ``more`` tokens, those that torch finds likeliest. Each is read in one go, and again as it is
    written: its beginning, then token by token. Raises `IntegrityError` for a difference above ``tolerance`` in fp32,
    or above ``rounding_limit`` as shipped.
    """
    module = _module(checkpoint)
    written = [_continued(module, *pair, more) for pair in zip(inputs, texts, strict=True)]
    expected = [_logits(module, *pair) for pair in zip(inputs, written, strict=True)]
    del module
    exact = with_level(model)

    def answers() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        pair = _Pair(exact)
        for batch, tokens, wanted in zip(inputs, written, expected, strict=True):
            for parts in ([tokens], np.split(tokens, range(_PROMPT, tokens.shape[1]), axis=1)):
                found = pair.logits(batch, parts)
                yield wanted[:, -found.shape[1] :], found

    difference = held_to(tolerance, answers())
    if exact is model:
        return Equality(difference, 0.0, 1.0)
    shipped = _Pair(model).logits(inputs[0], [written[0]])
    return Equality(difference, *rounding_of(shipped, expected[0][:, -shipped.shape[1] :], rounding_limit))


def teacher_forced(model: OnnxModel, example: Inputs, tokens: np.ndarray) -> np.ndarray:
    """Logits [tokens, vocabulary] of a text that is read at once; nothing of the ``example`` has an axis of rows."""
    batch = {name: array[np.newaxis] for name, array in example.items()}
    logits: np.ndarray = _Pair(model).logits(batch, [tokens[np.newaxis]])[0]
    return logits


def _module(checkpoint: Checkpoint) -> Any:
    from transformers import AutoConfig

    if checkpoint.quantization is not None or (checkpoint.folder / ADAPTER).is_dir():
        return load_adapted(checkpoint)
    config = AutoConfig.from_pretrained(checkpoint.folder)
    return auto_class(config).from_pretrained(checkpoint.folder, dtype=torch.float32).eval()


def _logits(module: Any, inputs: Inputs, tokens: np.ndarray) -> np.ndarray:
    given = {name: torch.from_numpy(array) for name, array in inputs.items()}
    with torch.inference_mode():
        logits: np.ndarray = module(**given, decoder_input_ids=torch.from_numpy(tokens)).logits.numpy()
    return logits


def _continued(module: Any, inputs: Inputs, tokens: np.ndarray, count: int) -> np.ndarray:
    for _ in range(count):
        likeliest = _logits(module, inputs, tokens)[:, -1:].argmax(-1)
        tokens = np.concatenate([tokens, likeliest], axis=1)
    return tokens


class _Pair:
    """Both graphs, opened."""

    def __init__(self, model: OnnxModel) -> None:
        self._encoder, self._decoder = (opened(graph) for graph in model.graphs.values())
        self._inputs = {entry.name: entry.shape for entry in self._decoder.get_inputs()}
        self._pasts = [name for name in self._inputs if name.startswith(PAST)]

    def logits(self, inputs: Inputs, parts: Sequence[np.ndarray]) -> np.ndarray:
        """[rows, tokens, vocabulary] of texts that come in ``parts``."""
        (hidden,) = self._encoder.run(None, dict(inputs))
        feed = {HIDDEN: hidden} | ({ENCODER_MASK: inputs[MASK]} if ENCODER_MASK in self._inputs else {})
        shapes = {name: (len(hidden), self._inputs[name][1], 0, self._inputs[name][3]) for name in self._pasts}
        past = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        logits = []
        for index, part in enumerate(parts):
            again = {IDS: part, CACHED: np.array([index > 0])}
            outputs = ["logits", *(present_of(name) for name in self._pasts)]
            found = dict(zip(outputs, self._decoder.run(outputs, {**feed, **again, **past}), strict=True))
            logits.append(found["logits"])
            past |= {name: found[present_of(name)] for name in self._pasts if index == 0 or ".decoder." in name}
        return np.concatenate(logits, axis=1)
