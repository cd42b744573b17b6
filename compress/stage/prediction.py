"""What a stage says that it will cost, before any model is loaded, by the shape of the model: all of it estimates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from compress.frozen import Frozen


@dataclass(frozen=True)
class Shape:
    """Parameters by sort, and the sizes that memory depends on (0 where they are not known).

    ``processor_bytes``: tokenizer and other files beside the weights; ``matrix_bits``, ``table_bits``: of a weight of
    the matrices and of the embedding tables, as earlier stages left them; ``packed_bytes``: the size of files that are
    laid out otherwise.
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

    @property
    def parameters(self) -> float:
        """All parameters."""
        return self.embeddings + self.working

    @property
    def working(self) -> float:
        """Parameters that multiply every token: all but the embedding tables."""
        return self.attention + self.feed_forward + self.other

    def in_bits(self, matrices: int, tables: int) -> Shape:
        """The same with weights of so many bits."""
        return replace(self, matrix_bits=matrices, table_bits=tables)

    def first_token_only(self) -> Shape:
        """What multiplies a token where the last layer gives the first one alone: there, what makes keys and values."""
        layers = max(self.layers, 1)
        attention, feed_forward = self.attention * (1 - 0.5 / layers), self.feed_forward * (1 - 1 / layers)
        return replace(self, attention=attention, feed_forward=feed_forward)

    def with_layers(self, layers: int) -> Shape:
        """The same with as many layers, all of them alike."""
        share = layers / self.layers if self.layers else 1.0
        return replace(self, layers=layers, attention=self.attention * share, feed_forward=self.feed_forward * share)


BYTES_PER_TOKEN = 4
"""Of English text in WordPiece or byte-pair tokens, about."""
SIZE_UNKNOWN = "the size of the model is not known yet"
PACKED = "packed layers, float16 tables with their integers beside them, and the processor's files"


class Estimate(Frozen):
    """A predicted quantity, or ``None``; ``note`` says how it was predicted, or why it was not.

    ``flops`` are those that a time was told by.
    """

    value: float | None
    note: str
    flops: float | None = None

    @classmethod
    def unknown(cls, reason: str) -> Estimate:
        """No value, for that reason."""
        return cls(value=None, note=reason)


@dataclass(frozen=True)
class Text:
    """Size of a data file. ``rows`` is exact for Parquet and else estimated from the file's beginning."""

    rows: int
    size_bytes: int

    def tokens(self, max_length: int) -> int:
        """About how many tokens the examples hold, each cut at ``max_length``."""
        return min(self.size_bytes // BYTES_PER_TOKEN, self.rows * max_length)


@dataclass(frozen=True)
class PlanContext:
    """What a stage may know when it predicts its cost, beside the shape of its input.

    ``splits`` and ``unlabeled`` are the data files that are here, by name, and ``unlabeled`` those that are not as
    ``None``; ``shapes`` has the output of each earlier stage by its label, and `start`; ``find_model`` gives the shape
    of a model that the stage names, ``None`` while it isn't here. ``rate`` measures this machine in FLOPs a second.
    """

    max_length: int
    reads_text: bool
    splits: Mapping[str, Text]
    unlabeled: Mapping[str, Text | None]
    find_model: Callable[[str, bool], Shape | None]
    rate: Callable[[], float]
    shapes: dict[str, Shape | None] = field(default_factory=dict)

    def seconds(self, flops: float) -> Estimate:
        """How long so much arithmetic takes here."""
        rate = self.rate()
        note = f"estimate: {flops:.2g} FLOPs at the {rate / 1e9:.0f} GFLOP/s of fp32 matrix products here"
        return Estimate(value=flops / rate, note=note, flops=flops)


@dataclass(frozen=True)
class Prediction:
    """What one stage costs, and the shape of what it gives (``None`` if that cannot be told)."""

    shape: Shape | None
    seconds: Estimate
    peak_memory_bytes: Estimate
    disk_bytes: Estimate


def predicted(
    before: Shape | None,
    after: Shape | None,
    seconds: Estimate | None = None,
    memory: Estimate | None = None,
    disk_note: str | None = None,
) -> Prediction:
    """The prediction of a stage whose output is stored as ``after`` says; what isn't given is unknown.

    ``disk_note`` is said of the size in place of how it was computed.
    """
    seconds = seconds or Estimate.unknown("not predicted: it does not train")
    memory = memory or Estimate.unknown("not predicted: it depends on the tool that is called")
    if before is None or after is None:
        memory = Estimate.unknown(SIZE_UNKNOWN)
    return Prediction(after, seconds, memory, _disk(after, disk_note))


def _disk(shape: Shape | None, note: str | None) -> Estimate:
    if shape is None:
        return Estimate.unknown("the size of its output is not known before it runs")
    if shape.packed_bytes is not None:
        return Estimate(value=shape.packed_bytes, note=note or PACKED)
    matrices, tables = shape.matrix_bits, shape.table_bits
    size = shape.working * matrices / 8 + shape.embeddings * tables / 8 + shape.processor_bytes
    words = f"{matrices}-bit matrices, {tables}-bit embeddings, and the processor's files"
    return Estimate(value=round(size), note=note or words)
