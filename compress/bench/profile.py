"""The record of a profile: where the time of one artifact goes, and how close that is to the machine's limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from pydantic import Field

from compress.frozen import FrozenAliased
from compress.numerics.roofline import Binds, Roof, binds

SCHEMA = 1
Phase = Literal["batch", "prompt", "token"]
"""What a call is: a batch of examples, a decoder's prompt, or a token after one."""


class MachineLimits(FrozenAliased):
    """What the machine reached while the artifact was profiled: the best of all samples."""

    fp32_per_s: float = Field(gt=0, description="float operations a second, of matrix products in ONNX Runtime")
    int8_per_s: float = Field(gt=0, description="operations on 8-bit integers a second, likewise")
    memory_bytes_per_s: float = Field(gt=0, description="bandwidth far beyond the caches")
    working_set_bytes_per_s: float = Field(gt=0, description="bandwidth within a buffer as large as the working set")
    memory_buffer_bytes: int = Field(gt=0)
    working_set_bytes: int = Field(ge=0, description="stored bytes that a call reads, and its largest activations")
    last_level_cache_bytes: int | None = None
    raw: dict[str, tuple[float, ...]] = Field({}, description="the samples behind the four rates")

    @property
    def cached(self) -> bool | None:
        """Whether the working set fits the last cache; None where that is not known."""
        known = self.last_level_cache_bytes
        return None if known is None else self.working_set_bytes <= known

    @property
    def roof(self) -> Roof:
        """The limits that apply to this artifact."""
        return Roof(self.working_set_bytes_per_s, self.fp32_per_s, self.int8_per_s)


class Row(FrozenAliased):
    """A node, several nodes, or the whole model, in one call: the mean over the calls that were profiled.

    ``compute_bound_ms`` and ``memory_bound_ms`` are the least times of the nodes that arithmetic bounds and of those
    that memory does. Nodes run one after the other, so their sum is the least time of the row.
    """

    name: str
    operators: tuple[str, ...]
    layer: str | None = None
    nodes: int = Field(ge=0)
    time_ms: float = Field(ge=0, description="mean over calls of the median over passes")
    uncounted_ms: float = Field(0.0, ge=0, description="the part of it in operators that nobody knows how to count")
    fp32_operations: float = Field(ge=0)
    int8_operations: float = Field(ge=0)
    weight_bytes: float = Field(ge=0)
    activation_bytes: float = Field(ge=0)
    compute_bound_ms: float = Field(ge=0)
    memory_bound_ms: float = Field(ge=0)

    @property
    def operations(self) -> float:
        """Of both classes."""
        return self.fp32_operations + self.int8_operations

    @property
    def moved_bytes(self) -> float:
        """Bytes read and written."""
        return self.weight_bytes + self.activation_bytes

    @property
    def limit_ms(self) -> float:
        """The least time that the machine could do this in."""
        return self.compute_bound_ms + self.memory_bound_ms

    @property
    def counted_ms(self) -> float:
        """The time of the operators that are counted."""
        return max(0.0, self.time_ms - self.uncounted_ms)

    @property
    def counted(self) -> bool:
        """Whether any of it is."""
        return self.uncounted_ms < self.time_ms

    @property
    def share_of_roof(self) -> float | None:
        """Least time over measured time, of the operators that are counted; None where there is none."""
        return self.limit_ms / self.counted_ms if self.counted_ms > 0 else None

    @property
    def operations_per_s(self) -> float:
        """Operations a second that were reached."""
        return 1e3 * self.operations / self.counted_ms if self.counted_ms > 0 else 0.0

    @property
    def bytes_per_s(self) -> float:
        """Bytes a second that were reached."""
        return 1e3 * self.moved_bytes / self.counted_ms if self.counted_ms > 0 else 0.0

    @property
    def intensity(self) -> float | None:
        """Operations for each byte moved; None where nothing moves."""
        return self.operations / self.moved_bytes if self.moved_bytes else None

    @property
    def binds(self) -> Binds | None:
        """Which side binds; None where nothing is counted."""
        return binds(self.compute_bound_ms, self.memory_bound_ms, self.counted_ms) if self.counted_ms > 0 else None

    def figures(self) -> dict[str, Any]:
        """The fields and what follows from them, for JSON."""
        derived = {
            "limit_ms": self.limit_ms,
            "share_of_roof": self.share_of_roof,
            "gflop_per_s": self.operations_per_s / 1e9,
            "gb_per_s": self.bytes_per_s / 1e9,
            "binds": self.binds,
        }
        return {**self.model_dump(mode="json"), **derived}


class Profile(FrozenAliased):
    """Everything that was found. ``whole.time_ms`` is measured without profiling, ``rows`` with it."""

    schema_version: int = Field(SCHEMA, alias="schema")
    artifact: str
    target: str
    threads: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    phase: Phase = "batch"
    context: int | None = Field(None, ge=1, description="tokens of the prompt, for a decoder")
    calls: int = Field(ge=1, description="different batches of real examples, prompts, or tokens one after the other")
    lengths: tuple[int, ...] = Field(
        (), description="padded length of each of them, in tokens; of a token, with all that it follows"
    )
    passes: int = Field(ge=1, description="times that each was run, without and with profiling")
    whole: Row
    low_ms: float = Field(description="bounds of the 95% interval of the whole's time")
    high_ms: float
    profiled_ms: float = Field(description="the whole's time with profiling")
    operators_ms: float = Field(ge=0, description="the part of that in which an operator was at work")
    rows: tuple[Row, ...] = Field(description="one a node, in the order of the graph")
    limits: MachineLimits
    notes: tuple[str, ...] = ()
    environment: dict[str, Any] = {}
    raw: dict[str, tuple[tuple[float, ...], ...]] = Field({}, description="ms, [passes][calls]")

    @property
    def profiler_overhead(self) -> float:
        """How much longer a call takes with profiling, as a share."""
        return self.profiled_ms / self.whole.time_ms - 1

    def by_operator(self) -> tuple[Row, ...]:
        """Rows by operator type, the longest first."""
        return tuple(sorted(combine(self.rows, lambda row: row.operators[0]), key=lambda row: -row.time_ms))

    def by_layer(self) -> tuple[Row, ...]:
        """Rows by layer, in the order of the graph."""
        return combine(self.rows, lambda row: row.layer or "")

    def to_json(self) -> dict[str, Any]:
        """The record with its views and derived figures."""
        content = self.model_dump(mode="json", exclude={"rows", "whole"})
        return {
            **content,
            "profiler_overhead": self.profiler_overhead,
            "whole": self.whole.figures(),
            "by_operator": [row.figures() for row in self.by_operator()],
            "by_layer": [row.figures() for row in self.by_layer()],
            "nodes": [row.figures() for row in self.rows],
        }


def combine(rows: Iterable[Row], key: Callable[[Row], str]) -> tuple[Row, ...]:
    """One row for each key, in the order of first appearance: sums of times, work and limits."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return tuple(total(name, members) for name, members in groups.items())


def total(name: str, members: Iterable[Row]) -> Row:
    """The sum of rows under one name."""
    members = tuple(members)
    layers = {row.layer for row in members}
    return Row(
        name=name,
        operators=tuple(dict.fromkeys(operator for row in members for operator in row.operators)),
        layer=layers.pop() if len(layers) == 1 else None,
        nodes=sum(row.nodes for row in members),
        time_ms=sum(row.time_ms for row in members),
        uncounted_ms=sum(row.uncounted_ms for row in members),
        fp32_operations=sum(row.fp32_operations for row in members),
        int8_operations=sum(row.int8_operations for row in members),
        weight_bytes=sum(row.weight_bytes for row in members),
        activation_bytes=sum(row.activation_bytes for row in members),
        compute_bound_ms=sum(row.compute_bound_ms for row in members),
        memory_bound_ms=sum(row.memory_bound_ms for row in members),
    )
