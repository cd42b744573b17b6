"""Record of a profile: the time of each operator of one artifact, and the limits of the machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from pydantic import Field

from compress.numerics.roofline import Bottleneck, Roof, bottleneck
from compress.utils.pydantic_models import FrozenAliased

SCHEMA = 1
_WORDS = ("name", "operators", "layer")
"""Fields of a `ProfileRow` that are not summed."""
Phase = Literal["batch", "prompt", "token"]
"""Kind of call: a batch of examples, a decoder's prompt, or a token after a prompt."""


class MachineLimits(FrozenAliased):
    """Rates that the machine reached while the artifact was profiled: the best of all samples."""

    fp32_per_s: float = Field(gt=0, description="FLOP/s of matrix products in ONNX Runtime")
    int8_per_s: float = Field(gt=0, description="8-bit integer operations per second, likewise in ONNX Runtime")
    memory_bytes_per_s: float = Field(gt=0, description="bandwidth of memory, beyond the caches")
    working_set_bytes_per_s: float = Field(gt=0, description="bandwidth in a buffer as large as the working set")
    memory_buffer_bytes: int = Field(gt=0)
    working_set_bytes: int = Field(ge=0, description="weight bytes that a call reads, plus its largest activations")
    last_level_cache_bytes: int | None = None
    raw: dict[str, tuple[float, ...]] = Field({}, description="raw samples of the four rates")

    @property
    def cached(self) -> bool | None:
        """Return whether the working set fits into the last cache, or None if its size is unknown."""
        cache_bytes = self.last_level_cache_bytes
        return None if cache_bytes is None else self.working_set_bytes <= cache_bytes

    @property
    def roof(self) -> Roof:
        """Return the limits that apply to this artifact."""
        return Roof(self.working_set_bytes_per_s, self.fp32_per_s, self.int8_per_s)


class ProfileRow(FrozenAliased):
    """Node, several nodes, or the whole model, in one call: the mean over the profiled calls.

    ``compute_bound_ms`` and ``memory_bound_ms`` are the least times of the nodes that arithmetic bounds and of the
    nodes that memory bounds. Nodes run one after another, so their sum is the least time of the row.
    """

    name: str
    operators: tuple[str, ...]
    layer: str | None = None
    nodes: int = Field(ge=0)
    time_ms: float = Field(ge=0, description="mean over calls of the median over passes")
    uncounted_ms: float = Field(0.0, ge=0, description="milliseconds in operators whose cost is unknown")
    fp32_operations: float = Field(ge=0)
    int8_operations: float = Field(ge=0)
    weight_bytes: float = Field(ge=0)
    activation_bytes: float = Field(ge=0)
    compute_bound_ms: float = Field(ge=0)
    memory_bound_ms: float = Field(ge=0)

    @property
    def operations(self) -> float:
        """Return all operations."""
        return self.fp32_operations + self.int8_operations

    @property
    def transferred_bytes(self) -> float:
        """Return the bytes that are read and written."""
        return self.weight_bytes + self.activation_bytes

    @property
    def limit_ms(self) -> float:
        """Return the least time that the machine would need."""
        return self.compute_bound_ms + self.memory_bound_ms

    @property
    def counted_ms(self) -> float:
        """Return the time of the operators with known costs."""
        return max(0.0, self.time_ms - self.uncounted_ms)

    @property
    def counted(self) -> bool:
        """Return whether any operator has known costs."""
        return self.uncounted_ms < self.time_ms

    @property
    def share_of_roof(self) -> float | None:
        """Return the least time over the measured time of the operators with known costs, or None without any."""
        return self.limit_ms / self.counted_ms if self.counted_ms > 0 else None

    @property
    def operations_per_s(self) -> float:
        """Return the operations/s that were reached."""
        return 1e3 * self.operations / self.counted_ms if self.counted_ms > 0 else 0.0

    @property
    def bytes_per_s(self) -> float:
        """Return the bytes/s that were reached."""
        return 1e3 * self.transferred_bytes / self.counted_ms if self.counted_ms > 0 else 0.0

    @property
    def intensity(self) -> float | None:
        """Return the operations for each byte moved, or None if nothing is moved."""
        return self.operations / self.transferred_bytes if self.transferred_bytes else None

    @property
    def bottleneck(self) -> Bottleneck | None:
        """Return which limit binds, or None without known costs."""
        return bottleneck(self.compute_bound_ms, self.memory_bound_ms, self.counted_ms) if self.counted_ms > 0 else None

    def json_fields(self) -> dict[str, Any]:
        """Return the fields and values derived from them, for JSON."""
        derived = {
            "limit_ms": self.limit_ms,
            "share_of_roof": self.share_of_roof,
            "gflop_per_s": self.operations_per_s / 1e9,
            "gb_per_s": self.bytes_per_s / 1e9,
            "binds": self.bottleneck,
        }
        return {**self.model_dump(mode="json"), **derived}


class OperatorProfile(FrozenAliased):
    """Profile of one artifact. ``whole.time_ms`` is measured without profiling, ``rows`` with it."""

    schema_version: int = Field(SCHEMA, alias="schema")
    artifact: str
    target: str
    threads: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    phase: Phase = "batch"
    context: int | None = Field(None, ge=1, description="decoders: tokens of the prompt")
    calls: int = Field(ge=1, description="number of different batches of examples, prompts or successive tokens")
    lengths: tuple[int, ...] = Field(
        (), description="padded length of each call in tokens; for a single token, including its context"
    )
    passes: int = Field(ge=1, description="number of runs of each call, without and with profiling")
    whole: ProfileRow
    low_ms: float = Field(description="bounds of the 95% interval of the total time")
    high_ms: float
    profiled_ms: float = Field(description="total time with profiling")
    operators_ms: float = Field(ge=0, description="part of `profiled_ms` spent inside operators")
    rows: tuple[ProfileRow, ...] = Field(description="one entry per node, in graph order")
    limits: MachineLimits
    notes: tuple[str, ...] = ()
    environment: dict[str, Any] = {}
    raw: dict[str, tuple[tuple[float, ...], ...]] = Field({}, description="milliseconds, [passes][calls]")

    @property
    def profiler_overhead(self) -> float:
        """Return the additional time of a call with profiling, as a share."""
        return self.profiled_ms / self.whole.time_ms - 1

    def by_operator(self) -> tuple[ProfileRow, ...]:
        """Return rows by operator type, the longest first."""
        return tuple(sorted(combine(self.rows, lambda row: row.operators[0]), key=lambda row: -row.time_ms))

    def by_layer(self) -> tuple[ProfileRow, ...]:
        """Return rows by layer, in the order of the graph."""
        return combine(self.rows, lambda row: row.layer or "")

    def to_json(self) -> dict[str, Any]:
        """Return the record with its views and derived values."""
        content = self.model_dump(mode="json", exclude={"rows", "whole"})
        return {
            **content,
            "profiler_overhead": self.profiler_overhead,
            "whole": self.whole.json_fields(),
            "by_operator": [row.json_fields() for row in self.by_operator()],
            "by_layer": [row.json_fields() for row in self.by_layer()],
            "nodes": [row.json_fields() for row in self.rows],
        }


def combine(rows: Iterable[ProfileRow], key: Callable[[ProfileRow], str]) -> tuple[ProfileRow, ...]:
    """Return one row for each key, in the order of first appearance: sums of times, work and limits."""
    groups: dict[str, list[ProfileRow]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return tuple(total(name, members) for name, members in groups.items())


def total(name: str, members: Iterable[ProfileRow]) -> ProfileRow:
    """Return the sum of rows under one name."""
    members = tuple(members)
    layers = {row.layer for row in members}
    return ProfileRow(
        name=name,
        operators=tuple(dict.fromkeys(operator for row in members for operator in row.operators)),
        layer=layers.pop() if len(layers) == 1 else None,
        **{name: sum(getattr(row, name) for row in members) for name in ProfileRow.model_fields if name not in _WORDS},
    )
