"""What a stage says that it will cost, before any model is loaded, by the shape of the model: all of it estimates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from compress.utils.errors import InputError
from compress.utils.pydantic_models import Frozen


@dataclass(frozen=True)
class Shape:
    """Parameters by kind, and the sizes that memory depends on (0 if unknown).

    ``processor_bytes``: tokenizer and other files beside the weights; ``matrix_bits``, ``table_bits``: of a weight of
    the matrices and of the embedding tables, as earlier stages left them; ``packed_bytes``: the size of files that are
    laid out otherwise. ``tensors`` are those it has.
    """

    embeddings: float
    attention: float
    feed_forward: float
    other: float
    layers: int
    hidden: int = 0
    intermediate: int = 0
    heads: int = 0
    processor_bytes: int = 0
    matrix_bits: int = 32
    table_bits: int = 32
    packed_bytes: int | None = None
    tensors: int = 0

    @property
    def parameters(self) -> float:
        """Return the number of all parameters."""
        return self.embeddings + self.working

    @property
    def working(self) -> float:
        """Parameters that multiply every token: all but the embedding tables."""
        return self.attention + self.feed_forward + self.other

    def in_bits(self, matrices: int, tables: int) -> Shape:
        """Return the shape with weights of other bit widths."""
        return replace(self, matrix_bits=matrices, table_bits=tables)

    def with_selected_layers(self, indices: Sequence[int]) -> Shape:
        """Return the shape with some of the layers. Raises `InputError` for an index that the model does not have."""
        if self.layers and not (len(set(indices)) == len(indices) and set(indices) <= set(range(self.layers))):
            raise InputError(
                f"Layers {list(indices)} cannot be kept in a model with {self.layers}.",
                expected=f"distinct indices from 0 to {self.layers - 1}",
                hint="keep others, evenly spread",
            )
        return self.with_layers(len(indices))

    def with_layers(self, layers: int) -> Shape:
        """Return the shape with another number of layers, all of them alike."""
        share = layers / self.layers if self.layers else 1.0
        attention, feed_forward = self.attention * share, self.feed_forward * share
        tensors = round(self.tensors * share)
        return replace(self, layers=layers, attention=attention, feed_forward=feed_forward, tensors=tensors)


OF_ARITHMETIC = 0.4, 2.4
"""Seconds by arithmetic alone are this many times too short or too long: small products and bytes moved cost more."""
OF_HANDLING = 0.6, 1.8
"""The same of seconds by how stages of that kind went elsewhere."""
HANDLING_SECONDS, HANDLED_BYTES_PER_SECOND = 0.5, 2e8
"""What any stage takes, and how fast it reads, changes, checks and writes weights."""
BYTES_PER_TOKEN = 4
"""Of English text in WordPiece or byte-pair tokens, about."""
SIZE_UNKNOWN = "the size of the model is not known yet"
PACKED = "packed layers, float16 tables with their integers beside them, and the processor's files"


class Estimate(Frozen):
    """A predicted quantity, or ``None``; ``note`` says how it was predicted, or why it was not.

    ``flops`` are those that a time was told by; ``low`` and ``high`` are what it may well be.
    """

    value: float | None
    note: str
    flops: float | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def unknown(cls, reason: str) -> Estimate:
        """Return an estimate without a value, for a reason."""
        return cls(value=None, note=reason)

    def within(self, less: float, more: float) -> Estimate:
        """Return the estimate with bounds at ``less`` and ``more`` times its value."""
        if self.value is None:
            return self
        return self.model_copy(update={"low": self.value * less, "high": self.value * more})


@dataclass(frozen=True)
class Text:
    """Number of rows and bytes of a data file."""

    rows: int
    size_bytes: int

    def tokens(self, max_length: int) -> int:
        """About how many tokens the examples hold, each cut at ``max_length``."""
        return min(self.size_bytes // BYTES_PER_TOKEN, self.rows * max_length)


@dataclass(frozen=True)
class PlanContext:
    """Facts about data and machine that a stage predicts its cost from, besides the shape of its input.

    ``splits`` and ``unlabeled`` are the data files that are here, by name, and ``unlabeled`` those that are not as
    ``None``; ``shapes`` has the output of each earlier stage by its label, and `start`; ``find_model`` gives the shape
    of a model that the stage names, ``None`` while it isn't here. ``rate`` measures this machine in FLOPs a second.
    ``generates``: whether the task's answer is text, so that stages read models tensor by tensor.
    """

    max_length: int
    reads_text: bool
    splits: Mapping[str, Text]
    unlabeled: Mapping[str, Text | None]
    find_model: Callable[[str, bool], Shape | None]
    rate: Callable[[], float]
    shapes: dict[str, Shape | None] = field(default_factory=dict)
    generates: bool = False

    def tokens(self, text: Text) -> float:
        """Return the tokens of a file's examples, estimated from its bytes."""
        return float(text.tokens(self.max_length))

    def answers(self, shape: Shape, examples: float) -> float | None:
        """Return the seconds in which a model of a shape predicts ``examples``; None unless they are local text."""
        train = self.splits.get("train")
        if not self.reads_text or train is None:
            return None
        return 2 * shape.working * self.tokens(train) / train.rows * examples / self.rate()

    def seconds(self, flops: float) -> Estimate:
        """Return how long an amount of arithmetic takes on this machine."""
        rate = self.rate()
        note = f"estimate: {flops:.2g} FLOPs at the {rate / 1e9:.0f} GFLOP/s of fp32 matrix products here"
        return Estimate(value=flops / rate, note=note, flops=flops).within(*OF_ARITHMETIC)


@dataclass(frozen=True)
class Prediction:
    """Predicted cost of one stage, and the shape of its output (None if unknown)."""

    shape: Shape | None
    seconds: Estimate
    peak_memory_bytes: Estimate
    disk_bytes: Estimate


UNPREDICTED = "not predicted"
"""Note on time or memory that libraries need; `predict_cost` adds the names of the stage and of its libraries."""


def predicted(
    before: Shape | None,
    after: Shape | None,
    seconds: Estimate | None = None,
    memory: Estimate | None = None,
    disk_note: str | None = None,
) -> Prediction:
    """Return the prediction of a stage whose output has the shape ``after``; missing quantities are unknown.

    ``disk_note`` is said of the size in place of how it was computed.
    """
    seconds = seconds or handling(before)
    memory = memory or Estimate.unknown(UNPREDICTED)
    if before is None or after is None:
        memory = Estimate.unknown(SIZE_UNKNOWN)
    return Prediction(after, seconds, memory, _disk(after, disk_note))


_PRECISIONS = {"fp32": 32, "fp16": 16, "int8": 8, "int8_weights": 8}


def in_precision(before: Shape | None, precision: str, table_bits: int | None = None) -> Prediction:
    """Return the prediction of a stage that writes a file in one of the formats' precisions; integers stay.

    ``table_bits`` are those of embedding tables where weights become integers; what is traced and proven takes unknown
    time.
    """
    if before is None:
        return predicted(None, None)
    bits = _PRECISIONS[precision]
    tables = (table_bits or bits) if bits == 8 else bits
    after = before.in_bits(min(bits, before.matrix_bits), min(tables, before.table_bits))
    unknown = Estimate.unknown(UNPREDICTED)
    return predicted(before, replace(after, packed_bytes=None), unknown)


def handling(before: Shape | None, more_seconds: float = 0.0, what: str = "") -> Estimate:
    """Return the time to read, change and write a model's weights, plus ``more_seconds`` for ``what``."""
    if before is None:
        return Estimate.unknown(SIZE_UNKNOWN)
    seconds = HANDLING_SECONDS + 4 * before.parameters / HANDLED_BYTES_PER_SECOND + more_seconds
    return Estimate(value=seconds, note="for handling the weights" + what).within(*OF_HANDLING)


def _disk(shape: Shape | None, note: str | None) -> Estimate:
    if shape is None:
        return Estimate.unknown("its output size is unknown before it runs")
    if shape.packed_bytes is not None:
        return Estimate(value=shape.packed_bytes, note=note or PACKED)
    matrices, tables = shape.matrix_bits, shape.table_bits
    size = shape.working * matrices / 8 + shape.embeddings * tables / 8 + shape.processor_bytes
    words = f"{matrices}-bit matrices, {tables}-bit embeddings, and the processor's files"
    return Estimate(value=round(size), note=note or words)
