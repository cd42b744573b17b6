"""Proof that a model's graphs compute what the torch model with the same weights computes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import onnxruntime
import torch

from compress.formats.onnx.decoder.traced_parts import IDS, MASK
from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel, all_graphs
from compress.formats.onnx.runtimes.onnxruntime import OnnxSession, session_of, session_options
from compress.formats.prove import distance
from compress.models.checkpoint import Checkpoint
from compress.models.lora_adapter import ADAPTER, load_adapted
from compress.models.meta_model import auto_class
from compress.runtimes.decoder import Decoder, present_of
from compress.runtimes.image_answers import PIXELS, EmbeddedDecoder
from compress.runtimes.pair_decoder import PairDecoder
from compress.tasks.task import Examples
from compress.utils.errors import InputError, IntegrityError, StageError, first_line

_FEW_BITS, _LEVEL, _FP32 = "MatMulNBits", "accuracy_level", 1
_CPU = "CPUExecutionProvider"
_PROMPT = 2
"""Tokens that are read at once, as a transcript's prompt is, before the others come one by one."""
Inputs = Mapping[str, np.ndarray]
"""What an encoder is given: rows of examples, by the names of its inputs."""
Pairs = Iterator[tuple[np.ndarray, np.ndarray]]
"""Logits that are expected and that were found; the first are those of whole texts, read in one go."""


@dataclass(frozen=True)
class DecoderParity:
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


def verify_decoder(
    model: OnnxModel, checkpoint: Checkpoint, windows: np.ndarray, tolerance: float, rounding_limit: float
) -> DecoderParity:
    """Compare graph and torch on ``windows`` [2 or more, length] of token ids.

    They are read as `reading_orders` reads them. Raises `IntegrityError` for a difference above ``tolerance`` in fp32, or
    above ``rounding_limit`` as shipped.
    """
    expected = torch_logits(checkpoint, windows)
    return _held_to(model, lambda one: reading_orders(_Session(one), windows, expected), tolerance, rounding_limit)


class TokenReader(Protocol):
    """What reads rows of tokens and keeps what it has read."""

    def logits(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """[rows, length, vocabulary] of texts from their beginning."""

    def more(self, ids: np.ndarray) -> np.ndarray:
        """[rows, length, vocabulary] of what follows the texts so far."""


def torch_logits(checkpoint: Checkpoint, windows: np.ndarray) -> np.ndarray:
    """Logits [rows, length, vocabulary] of ``windows`` by transformers, with the weights of ``checkpoint``."""
    return _logits(load_adapted(checkpoint), input_ids=windows)


def reading_orders(session: TokenReader, windows: np.ndarray, expected: np.ndarray) -> Pairs:
    """All windows in one go; the first half in one go and every later token by itself; and padded on the right.

    For the latter the second row is cut to half its length.
    """
    length = windows.shape[1]
    half = length // 2
    yield _last(expected, session.logits(windows))
    yield _last(expected[:, :half], session.logits(windows[:, :half]))
    for place in range(half, length):
        yield _last(expected[:, place : place + 1], session.more(windows[:, place : place + 1]))
    mask = np.ones_like(windows)
    mask[1, half:] = 0
    padded = session.logits(np.where(mask == 1, windows, windows[0, 0]), mask)
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
    """Compare graphs and torch over ``inputs`` and their ``texts`` of token ids [rows, length].

    After a text come ``more`` tokens, those that torch finds likeliest. Each is read in one go, and again as it is
    written: its beginning, then token by token. Raises as `verify_decoder` does.
    """
    module, written = _pair_in_torch(checkpoint), []
    for batch, tokens in zip(inputs, texts, strict=True):
        for _ in range(more):
            likeliest = _logits(module, **batch, decoder_input_ids=tokens)[:, -1:].argmax(-1)
            tokens = np.concatenate([tokens, likeliest], axis=1)
        written.append((batch, tokens, _logits(module, **batch, decoder_input_ids=tokens)))
    del module

    def answers(model: OnnxModel) -> Pairs:
        graphs = _opened_pair(model)
        for batch, tokens, wanted in written:
            for parts in ([tokens], np.split(tokens, range(_PROMPT, tokens.shape[1]), axis=1)):
                yield _last(wanted, _read(*graphs, batch, parts))

    return _held_to(model, answers, tolerance, rounding_limit)


def verify_image_reader(
    model: OnnxModel, checkpoint: Checkpoint, examples: Examples, image: int, tolerance: float, rounding_limit: float
) -> DecoderParity:
    """Compare the three graphs with torch on ``examples``, prompts with their answers, one by one.

    ``image`` is the token in whose place features stand. Each is read in one go, and again with the tokens behind its
    image one by one. Raises as `verify_decoder` does.
    """
    module, batches = load_adapted(checkpoint), [examples.batch([place]) for place in range(len(examples))]
    expected = [_logits(module, **batch) for batch in batches]
    del module

    def answers(model: OnnxModel) -> Pairs:
        graphs = open_image_reader(model, image)
        found = [graphs.begin(batch[IDS], batch[PIXELS]) for batch in batches]
        yield np.concatenate([one[0] for one in expected]), np.concatenate([one[0] for one in found])
        for batch, wanted in zip(batches, expected, strict=True):
            behind = int(np.flatnonzero(batch[IDS][0] == image)[-1]) + 1
            start, *tokens = np.split(batch[IDS], range(behind, batch[IDS].shape[1]), axis=1)
            yield wanted, np.concatenate([graphs.begin(start, batch[PIXELS]), *map(graphs.read, tokens)], axis=1)

    return _held_to(model, answers, tolerance, rounding_limit)


def _pair_in_torch(checkpoint: Checkpoint) -> Any:
    """By transformers itself where it can: it makes tables of positions that no file has."""
    from transformers import AutoConfig

    if checkpoint.quantization is not None or (checkpoint.folder / ADAPTER).is_dir():
        return load_adapted(checkpoint)
    kind = auto_class(AutoConfig.from_pretrained(checkpoint.folder))
    return kind.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()


def teacher_forced_logits(model: OnnxModel, example: Inputs, tokens: np.ndarray) -> np.ndarray:
    """Logits [tokens, vocabulary] of a text that is read at once; nothing of the ``example`` has an axis of rows."""
    batch = {name: array[np.newaxis] for name, array in example.items()}
    logits: np.ndarray = _read(*_opened_pair(model), batch, [tokens[np.newaxis]])[0]
    return logits


def open_image_reader(model: OnnxModel, image: int) -> EmbeddedDecoder:
    """Three graphs that read images, on the processor."""
    vision, table, decoder = map(session_of, model.graphs.values())
    return EmbeddedDecoder(vision, table, decoder, image, "the stage's graphs")


def _logits(module: Any, **given: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        logits: np.ndarray = module(**{name: torch.from_numpy(array) for name, array in given.items()}).logits.numpy()
    return logits


def _last(expected: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A graph may give the logits of the last positions alone."""
    return expected[:, -found.shape[1] :], found


def _held_to(
    model: OnnxModel, answers: Callable[[OnnxModel], Pairs], tolerance: float, rounding_limit: float
) -> DecoderParity:
    exact = _in_fp32(model)
    hint = "set accuracy_level: 1, which computes in fp32 and is slower, or raise rounding_limit"
    return held(answers(exact), None if exact is model else answers(model), tolerance, rounding_limit, hint)


def held(exact: Pairs, shipped: Pairs | None, tolerance: float, rounding_limit: float, hint: str) -> DecoderParity:
    """What answers in fp32, ``exact``, are held to, and those of the file that ships, if it computes otherwise.

    ``hint``: what helps where rounding does too much. Raises `IntegrityError`.
    """
    worst = distance(exact).worst
    difference = worst if np.isfinite(worst) else float("inf")
    if not difference <= tolerance:
        raise IntegrityError(
            f"The decoder's logits differ from torch by {difference:.2e}, all arithmetic in fp32.",
            expected=f"at most {tolerance:g}",
            hint="raise tolerance if the difference is acceptable; else please report it with the model's config",
        )
    if shipped is None:
        return DecoderParity(difference, 0.0, 1.0)
    expected, found = next(shipped)
    spread = expected - expected.mean(-1, keepdims=True)
    rounding = float(np.sqrt(np.square(found - expected).mean() / np.square(spread).mean()))
    if not rounding <= rounding_limit:
        raise IntegrityError(
            f"With activations in 8 bits the decoder's logits are off by {rounding:.1%} of their spread.",
            expected=f"at most {rounding_limit:.1%}",
            hint=hint,
        )
    return DecoderParity(difference, rounding, float((found.argmax(-1) == expected.argmax(-1)).mean()))


def _in_fp32(model: OnnxModel) -> OnnxModel:
    """The model itself where nothing is rounded, else a copy whose few-bit products compute in fp32."""
    if all(found.i == _FP32 for graph in model.graphs.values() for found in _levels(graph)):
        return model
    graphs = {}
    for name, graph in model.graphs.items():
        graphs[name] = onnx.ModelProto()
        graphs[name].CopyFrom(graph)
        for attribute in _levels(graphs[name]):
            attribute.i = _FP32
    return model.with_graphs(graphs)


def _levels(model: onnx.ModelProto) -> list[onnx.AttributeProto]:
    products = (node for graph in all_graphs(model.graph) for node in graph.node if node.op_type == _FEW_BITS)
    return [attribute for node in products for attribute in node.attribute if attribute.name == _LEVEL]


def _opened(graph: onnx.ModelProto) -> OnnxSession:
    """A graph opened from its own file, as whoever gets it will."""
    with tempfile.TemporaryDirectory() as folder:
        OnnxModel(graph, FLOAT_GRAPH, {}).save(Path(folder))
        path = next(Path(folder).rglob("*.onnx"))
        return OnnxSession(onnxruntime.InferenceSession(path, session_options(0), providers=[_CPU]), path, _CPU, 0)


def _opened_pair(model: OnnxModel) -> tuple[OnnxSession, PairDecoder]:
    encoder, decoder = map(_opened, model.graphs.values())
    return encoder, PairDecoder(decoder, "the stage's graph")


def _read(encoder: OnnxSession, decoder: PairDecoder, inputs: Inputs, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Logits [rows, tokens, vocabulary] of texts that come in ``parts``."""
    (hidden,) = encoder.predict(inputs).values()
    decoder.begin(hidden, inputs.get(MASK))
    return np.concatenate([decoder.read_all(part) for part in parts], axis=1)


class _Session:
    """An opened graph with the cache of what it has read."""

    def __init__(self, model: OnnxModel) -> None:
        self._session = _opened(model.graph)
        self._whole = Decoder(self._session, "the stage's graph").whole
        self._feed: dict[str, np.ndarray] = {}

    def logits(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """[rows, length, vocabulary] of texts from their beginning."""
        self._feed = dict(self._whole({IDS: ids, MASK: np.ones_like(ids) if mask is None else mask}))
        return self._run()

    def more(self, ids: np.ndarray) -> np.ndarray:
        """[rows, length, vocabulary] of what follows the texts so far."""
        self._feed |= {IDS: ids, MASK: np.concatenate([self._feed[MASK], np.ones_like(ids)], axis=1)}
        return self._run()

    def _run(self) -> np.ndarray:
        new = self._feed[IDS].shape[1]
        try:
            found = self._session.predict(self._feed)
        except (InputError, StageError) as error:
            seen = self._feed[MASK].shape[1] - new
            raise IntegrityError(
                f"The decoder's graph does not run on {new} tokens after {seen}: {first_line(error)}",
                expected="a graph for prompts and tokens of any length",
                hint="ship the model as a GPTQ checkpoint or GGUF instead",
            ) from error
        self._feed |= {name: found[present_of(name)] for name in self._feed if name.startswith("past")}
        return found["logits"]
