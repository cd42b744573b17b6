"""Numerical comparison of a model's graphs with the torch model that has the same weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import onnxruntime
import torch

from compress.formats.generation.decoder import Decoder, present_of
from compress.formats.generation.image_text import PIXELS, EmbeddedDecoder
from compress.formats.generation.seq2seq import PairDecoder
from compress.formats.onnx.decoder.traced_parts import IDS, MASK
from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel, all_graphs
from compress.formats.onnx.runtimes.onnxruntime import OnnxSession, session_of, session_options
from compress.formats.parity import distance
from compress.models.checkpoint import Checkpoint
from compress.models.lora_adapter import ADAPTER, load_adapted
from compress.models.meta_model import auto_class
from compress.tasks.task import Examples
from compress.utils.errors import InputError, IntegrityError, StageError, first_line

_FEW_BITS, _LEVEL, _FP32 = "MatMulNBits", "accuracy_level", 1
_CPU = "CPUExecutionProvider"
_PROMPT = 2
"""Number of tokens that are read at once, as a transcript's prompt is, before the others are read one by one."""
Inputs = Mapping[str, np.ndarray]
"""Inputs of an encoder: rows of examples by input name."""
Pairs = Iterator[tuple[np.ndarray, np.ndarray]]
"""Expected and actual logits; the first pair holds those of whole texts, read at once."""


@dataclass(frozen=True)
class DecoderParity:
    """Result of a comparison. ``difference`` is the largest of a logit from torch with all arithmetic in fp32.

    ``rounding`` is the effect of 8-bit activations in the shipped graph: the root mean square of the logits'
    differences over that of the logits about their mean; 0 where nothing is rounded. ``agreement`` is the share of
    positions with the same most likely token.
    """

    difference: float
    rounding: float
    agreement: float

    def __str__(self) -> str:
        text = f"logits differ by at most {self.difference:.1e} from torch in fp32"
        rounding = (
            f"; 8-bit activations change them by {self.rounding:.1%} of their spread, "
            f"and the most likely token at {1 - self.agreement:.1%} of the positions"
        )
        return text + (rounding if self.rounding else "")


def verify_decoder(
    model: OnnxModel, checkpoint: Checkpoint, sequences: np.ndarray, tolerance: float, rounding_limit: float
) -> DecoderParity:
    """Compare graph and torch on token ids, read as in `reading_orders`.

    Args:
        model: The exported decoder.
        checkpoint: Its checkpoint.
        sequences: Token ids [2 or more, length].
        tolerance: Largest accepted difference of a logit in fp32.
        rounding_limit: Largest accepted effect of 8-bit activations as shipped.

    Raises:
        IntegrityError: A limit is exceeded.
    """
    expected = torch_logits(checkpoint, sequences)
    return _verify(model, lambda one: reading_orders(_Session(one), sequences, expected), tolerance, rounding_limit)


class TokenReader(Protocol):
    """Reader of rows of tokens that keeps a cache of them."""

    def logits(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Return the logits [rows, length, vocabulary] of new texts."""

    def more(self, ids: np.ndarray) -> np.ndarray:
        """Return the logits [rows, length, vocabulary] of tokens that continue the texts."""


def torch_logits(checkpoint: Checkpoint, sequences: np.ndarray) -> np.ndarray:
    """Return the logits [rows, length, vocabulary] of transformers with the weights of ``checkpoint``."""
    return _logits(load_adapted(checkpoint), input_ids=sequences)


def reading_orders(session: TokenReader, sequences: np.ndarray, expected: np.ndarray) -> Pairs:
    """Yield expected and actual logits of texts read in three ways.

    All sequences are read at once; then the first half at once and every later token singly; then padded on the right,
    with the second row cut to half its length.
    """
    length = sequences.shape[1]
    # A past of the first half, then one token at a time.
    half = length // 2
    yield _last(expected, session.logits(sequences))
    yield _last(expected[:, :half], session.logits(sequences[:, :half]))
    for position in range(half, length):
        yield _last(expected[:, position : position + 1], session.more(sequences[:, position : position + 1]))
    mask = np.ones_like(sequences)
    mask[1, half:] = 0
    padded = session.logits(np.where(mask == 1, sequences, sequences[0, 0]), mask)
    # A graph that returns the last logits alone cannot be compared on padded rows.
    if padded.shape[1] == length:
        yield expected[0], padded[0]
        yield expected[1, :half], padded[1, :half]


def verify_encoder_decoder(
    model: OnnxModel,
    checkpoint: Checkpoint,
    inputs: Sequence[Inputs],
    texts: Sequence[np.ndarray],
    tolerance: float,
    rounding_limit: float,
    more: int = 0,
) -> DecoderParity:
    """Compare graphs and torch over ``inputs`` and ``texts``.

    Each text is read at once, and again as it is generated: its beginning, then token by token.

    Args:
        model: The exported encoder and decoder.
        checkpoint: Their checkpoint.
        inputs: Inputs of the encoder.
        texts: Token ids [rows, length] for each of the inputs.
        tolerance: Largest accepted difference of a logit in fp32.
        rounding_limit: Largest accepted effect of 8-bit activations as shipped.
        more: Number of tokens after each text, those that torch finds most likely.

    Raises:
        IntegrityError: A limit is exceeded.
    """
    from transformers import AutoConfig

    if checkpoint.quantization is not None or (checkpoint.folder / ADAPTER).is_dir():
        module = load_adapted(checkpoint)
    else:
        # transformers computes position tables that no file holds.
        kind = auto_class(AutoConfig.from_pretrained(checkpoint.folder))
        module = kind.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    written = []
    for batch, tokens in zip(inputs, texts, strict=True):
        for _ in range(more):
            likeliest = _logits(module, **batch, decoder_input_ids=tokens)[:, -1:].argmax(-1)
            tokens = np.concatenate([tokens, likeliest], axis=1)
        written.append((batch, tokens, _logits(module, **batch, decoder_input_ids=tokens)))
    # The torch model is released before the graphs are opened, to limit memory.
    del module

    def answers(model: OnnxModel) -> Pairs:
        graphs = _opened_pair(model)
        for batch, tokens, expected in written:
            for parts in ([tokens], np.split(tokens, range(_PROMPT, tokens.shape[1]), axis=1)):
                yield _last(expected, _read(*graphs, batch, parts))

    return _verify(model, answers, tolerance, rounding_limit)


def verify_image_reader(
    model: OnnxModel, checkpoint: Checkpoint, examples: Examples, image: int, tolerance: float, rounding_limit: float
) -> DecoderParity:
    """Compare the three graphs with torch on ``examples``, prompts with their answers, one by one.

    Each is read at once, and again with the tokens after its image one by one.

    Args:
        model: The exported graphs.
        checkpoint: Their checkpoint.
        examples: The examples.
        image: Token that stands for image features.
        tolerance: Largest accepted difference of a logit in fp32.
        rounding_limit: Largest accepted effect of 8-bit activations as shipped.

    Raises:
        IntegrityError: A limit is exceeded.
    """
    module, batches = load_adapted(checkpoint), [examples.batch([index]) for index in range(len(examples))]
    expected = [_logits(module, **batch) for batch in batches]
    del module

    def answers(model: OnnxModel) -> Pairs:
        graphs = open_image_reader(model, image)
        actual = [graphs.begin(batch[IDS], batch[PIXELS]) for batch in batches]
        yield np.concatenate(expected, axis=1), np.concatenate(actual, axis=1)
        for batch, example_logits in zip(batches, expected, strict=True):
            behind = int(np.flatnonzero(batch[IDS][0] == image)[-1]) + 1
            start, *tokens = np.split(batch[IDS], range(behind, batch[IDS].shape[1]), axis=1)
            parts = [graphs.begin(start, batch[PIXELS]), *map(graphs.read, tokens)]
            yield example_logits, np.concatenate(parts, axis=1)

    return _verify(model, answers, tolerance, rounding_limit)


def teacher_forced_logits(model: OnnxModel, example: Inputs, tokens: np.ndarray) -> np.ndarray:
    """Return the logits [tokens, vocabulary] of one text that is read at once; ``example`` has no batch axis."""
    batch = {name: array[np.newaxis] for name, array in example.items()}
    logits: np.ndarray = _read(*_opened_pair(model), batch, [tokens[np.newaxis]])[0]
    return logits


def open_image_reader(model: OnnxModel, image: int) -> EmbeddedDecoder:
    """Open the three graphs of a vision-language model on the processor."""
    vision, table, decoder = map(session_of, model.graphs.values())
    return EmbeddedDecoder(vision, table, decoder, image, "the stage's graphs")


def _logits(module: Any, **inputs: np.ndarray) -> np.ndarray:
    """Return the logits of a torch model."""
    with torch.inference_mode():
        logits: np.ndarray = module(**{name: torch.from_numpy(array) for name, array in inputs.items()}).logits.numpy()
    return logits


def _last(expected: np.ndarray, actual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both logits for the last positions, since a graph may return only those."""
    return expected[:, -actual.shape[1] :], actual


def _verify(
    model: OnnxModel, answers: Callable[[OnnxModel], Pairs], tolerance: float, rounding_limit: float
) -> DecoderParity:
    """Compare the model, in fp32 and as it is, with the expected logits."""
    exact = model
    if any(level.i != _FP32 for graph in model.graphs.values() for level in _levels(graph)):
        # Only the accuracy level of the few-bit products differs in fp32.
        graphs = {name: deepcopy(graph) for name, graph in model.graphs.items()}
        for level in (level for graph in graphs.values() for level in _levels(graph)):
            level.i = _FP32
        exact = model.with_graphs(graphs)
    hint = "set accuracy_level: 1, which computes in fp32 and is slower, or raise rounding_limit"
    return check_limits(answers(exact), None if exact is model else answers(model), tolerance, rounding_limit, hint)


def check_limits(
    exact: Pairs, shipped: Pairs | None, tolerance: float, rounding_limit: float, hint: str
) -> DecoderParity:
    """Check fp32 logits and those of the shipped file against their limits.

    Args:
        exact: Expected and actual logits, all arithmetic in fp32.
        shipped: Expected and actual logits of the shipped file, or None if it computes in fp32.
        tolerance: Largest accepted difference of a logit in fp32.
        rounding_limit: Largest accepted effect of rounding.
        hint: Advice if rounding has too large an effect.

    Raises:
        IntegrityError: A limit is exceeded.
    """
    worst = distance(exact).worst
    # NaN counts as an infinite difference.
    difference = worst if np.isfinite(worst) else float("inf")
    if not difference <= tolerance:
        raise IntegrityError(
            f"The decoder's logits differ from torch by {difference:.2e}, all arithmetic in fp32.",
            expected=f"at most {tolerance:g}",
            hint="raise tolerance if the difference is acceptable; else please report it with the model's config",
        )
    if shipped is None:
        return DecoderParity(difference, 0.0, 1.0)
    expected, actual = next(shipped)
    # A shift of all logits of a position changes no probability, so the spread is about their mean.
    spread = expected - expected.mean(-1, keepdims=True)
    rounding = float(np.sqrt(np.square(actual - expected).mean() / np.square(spread).mean()))
    if not rounding <= rounding_limit:
        raise IntegrityError(
            f"With activations in 8 bits the decoder's logits are off by {rounding:.1%} of their spread.",
            expected=f"at most {rounding_limit:.1%}",
            hint=hint,
        )
    return DecoderParity(difference, rounding, float((actual.argmax(-1) == expected.argmax(-1)).mean()))


def _levels(model: onnx.ModelProto) -> list[onnx.AttributeProto]:
    """Return the accuracy levels of all few-bit products."""
    products = (node for graph in all_graphs(model.graph) for node in graph.node if node.op_type == _FEW_BITS)
    return [attribute for node in products for attribute in node.attribute if attribute.name == _LEVEL]


def _opened(graph: onnx.ModelProto) -> OnnxSession:
    """Open a graph from a file of its own, as a user will."""
    with tempfile.TemporaryDirectory() as folder:
        OnnxModel(graph, FLOAT_GRAPH, {}).save(Path(folder))
        path = next(Path(folder).rglob("*.onnx"))
        return OnnxSession(onnxruntime.InferenceSession(path, session_options(0), providers=[_CPU]), path, _CPU, 0)


def _opened_pair(model: OnnxModel) -> tuple[OnnxSession, PairDecoder]:
    """Open an encoder and its decoder."""
    encoder, decoder = map(_opened, model.graphs.values())
    return encoder, PairDecoder(decoder, "the stage's graph")


def _read(encoder: OnnxSession, decoder: PairDecoder, inputs: Inputs, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the logits [rows, tokens, vocabulary] of texts that are read in ``parts``."""
    (hidden,) = encoder.predict(inputs).values()
    decoder.begin(hidden, inputs.get(MASK))
    return np.concatenate([decoder.read_all(part) for part in parts], axis=1)


class _Session:
    """An opened decoder with the cache of the tokens that it has read."""

    def __init__(self, model: OnnxModel) -> None:
        self._session = _opened(model.graph)
        self._whole = Decoder(self._session, "the stage's graph").whole
        self._feed: dict[str, np.ndarray] = {}

    def logits(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Return the logits [rows, length, vocabulary] of new texts."""
        self._feed = dict(self._whole({IDS: ids, MASK: np.ones_like(ids) if mask is None else mask}))
        return self._run()

    def more(self, ids: np.ndarray) -> np.ndarray:
        """Return the logits [rows, length, vocabulary] of tokens that continue the texts."""
        self._feed |= {IDS: ids, MASK: np.concatenate([self._feed[MASK], np.ones_like(ids)], axis=1)}
        return self._run()

    def _run(self) -> np.ndarray:
        """Run the graph and keep the cache that it returns."""
        new = self._feed[IDS].shape[1]
        try:
            outputs = self._session.predict(self._feed)
        except (InputError, StageError) as error:
            past_length = self._feed[MASK].shape[1] - new
            raise IntegrityError(
                f"The decoder's graph does not run on {new} tokens after {past_length}: {first_line(error)}",
                expected="a graph for prompts and tokens of any length",
                hint="ship the model as a GPTQ checkpoint or GGUF instead",
            ) from error
        self._feed |= {name: outputs[present_of(name)] for name in self._feed if name.startswith("past")}
        return outputs["logits"]
