"""What a runtime does: open an artifact on a target and answer batches, for evaluation and bench alike."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from compress.formats.target_profile import Target
from compress.utils.errors import InputError, StageError
from compress.utils.progress import Progress

Batch = Mapping[str, np.ndarray]


class TensorType(NamedTuple):
    """Element type by numpy's name, or the runtime's own where numpy has none, and shape; free axes are no integers."""

    dtype: str
    shape: tuple[int | str | None, ...]


def check_inputs(inputs: Sequence[str], batch: Batch, where: str) -> None:
    """Raises `InputError` where a batch lacks any of a model's inputs; ``where`` is the model."""
    absent = [name for name in inputs if name not in batch]
    if absent:
        raise InputError(
            f"The batch lacks the model's input {', '.join(absent)}.",
            where=where,
            expected=f"inputs {', '.join(inputs)}; the batch has {', '.join(batch) or 'none'}",
        )


class Session(Protocol):
    """An artifact that was opened and answers."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names that a batch must hold."""

    @property
    def input_types(self) -> Mapping[str, TensorType]:
        """What each input takes."""

    @property
    def output_types(self) -> Mapping[str, TensorType]:
        """What each output gives."""

    @property
    def provider(self) -> str:
        """The device that was really taken, by the runtime's own name."""

    @property
    def settings(self) -> dict[str, Any]:
        """What the runtime was told that bears on its speed, for the record."""

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """All outputs by name. Names that the model doesn't have are dropped.

        Raises `InputError` for a missing input or one of the wrong type or shape, `StageError` when it fails.
        """


def check_target(runtime: Runtime, target: Target, threads: int) -> None:
    """Raises `InputError` for no threads at all, `StageError` where this machine lacks the target."""
    if threads < 1:
        raise InputError(f"{threads} threads cannot run a model.", expected="at least 1")
    reason = runtime.unavailable(target)
    if reason is not None:
        raise StageError(f"The target {target.name!r} is not to be had here: {reason}")


def why_missing(module: str, distribution: str, extra: str) -> str | None:
    """Why there is no runtime of a package that isn't installed, or ``None`` where it is."""
    found = importlib.util.find_spec(module)
    return None if found else f"{distribution} is not installed (pip install 'compress[{extra}]')"


class CacheInPlace(Protocol):
    """The cache of one text, kept where it is from token to token."""

    def predict(self, feed: Batch, seen: int, total: int) -> np.ndarray:
        """Logits of the tokens ``seen`` to ``total``, whose keys and values the cache then holds too.

        A ``seen`` of 0 begins a text. Raises `StageError` when the graph fails.
        """


@runtime_checkable
class SharesCache(Protocol):
    """A session that may keep a decoder's cache in place."""

    def shared_cache(self, names: Mapping[str, str]) -> CacheInPlace | None:
        """The cache with these inputs and their outputs, or None for a graph whose attention doesn't write in place."""


@runtime_checkable
class ComponentSession(Protocol):
    """Session of several components that answer together, each with its own session."""

    @property
    def parts(self) -> Mapping[str, Session]:
        """Return the components by the names of their folders, in the order in which they run."""


@runtime_checkable
class TimesItself(Protocol):
    """A session whose model runs in another process, so that a clock on this side would time the way there too."""

    @property
    def session_load_ms(self) -> float:
        """What opening the model took there, once its bytes and the runtime were there."""

    @property
    def runtime_bytes(self) -> int:
        """The peak of that process's memory before the model came."""

    @property
    def start_up(self) -> Mapping[str, float]:
        """What else was told of the start: names that end in their unit, `_ms` or `_bytes`."""

    def hold(self, batches: Sequence[Batch]) -> None:
        """Take batches over there, in place of those before."""

    def time(self, calls: Sequence[int]) -> list[float]:
        """Milliseconds of one call for each entry, the number of a batch, by the clock over there."""

    def arrivals(self, calls: Sequence[int], gaps_ms: Sequence[float]) -> list[float]:
        """Milliseconds from arrival to answer of calls that come ``gaps_ms`` after each other and wait in turn."""

    def cpu_seconds(self) -> float:
        """Processor time of that process so far."""

    def peak_bytes(self) -> int:
        """Its peak resident memory so far."""


@runtime_checkable
class Fetches(Protocol):
    """A runtime that is no package of Python's and is fetched when a target is wanted for the first time."""

    def fetch(self, target: Target, progress: Progress) -> None:
        """Fetch what isn't there yet. Raises `SampleError` where it can't be had, `StorageError` without room."""


@runtime_checkable
class Ships(Protocol):
    """A runtime whose files an app brings along, which are not those of its package in Python."""

    def shipped_files(self) -> tuple[Path, ...]:
        """The files, which are here."""


@runtime_checkable
class Remarks(Protocol):
    """A runtime that doesn't run every artifact as it is stored."""

    def remark(self, artifact: Path) -> str | None:
        """What a reader of its times must know of how it runs that folder."""


class Runtime(Protocol):
    """One way of running artifacts. One file each, registered in `compress.formats.runtimes`."""

    name: str

    def open(self, artifact: Path, target: Target, threads: int) -> Session:
        """Open an artifact. Raises `ModelError` if it cannot be read, `StageError` without the target."""

    def unavailable(self, target: Target) -> str | None:
        """Why this machine lacks the target, or ``None``."""

    def build(self) -> str:
        """What the runtime's answers and speed depend on: its version, or the digest of a library of one's own."""
