"""Interfaces of runtimes, which open an artifact on a target and run batches for evaluation and benchmarks."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from compress.formats.registry import FORMATS, RUNTIMES
from compress.formats.spec import load
from compress.formats.target_profile import Target
from compress.utils.errors import InputError, SampleError, StageError, StorageError, install_command
from compress.utils.progress import Progress

if TYPE_CHECKING:
    from compress.models.model import Model


Batch = Mapping[str, np.ndarray]


class TensorType(NamedTuple):
    """Element type and shape of a tensor.

    The type has numpy's name, or the runtime's own name where numpy has none. Free axes are not integers.
    """

    dtype: str
    shape: tuple[int | str | None, ...]


def check_inputs(inputs: Sequence[str], batch: Batch, where: str) -> None:
    """Raise `InputError` if a batch lacks an input of the model that ``where`` names."""
    absent = [name for name in inputs if name not in batch]
    if absent:
        raise InputError(
            f"The batch lacks the model's input {', '.join(absent)}.",
            where=where,
            expected=f"inputs {', '.join(inputs)}; the batch has {', '.join(batch) or 'none'}",
        )


class Session(Protocol):
    """Opened artifact that runs batches."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names that a batch must contain."""

    @property
    def input_types(self) -> Mapping[str, TensorType]:
        """Element type and shape of each input."""

    @property
    def output_types(self) -> Mapping[str, TensorType]:
        """Element type and shape of each output."""

    @property
    def provider(self) -> str:
        """Device that the session runs on, by the runtime's own name."""

    @property
    def settings(self) -> dict[str, Any]:
        """Return the runtime settings that affect speed, for the report."""

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """Return all outputs by name; entries of the batch that are no inputs of the model are ignored.

        Raises:
            InputError: An input is missing or has the wrong type or shape.
            StageError: The runtime fails.
        """


def check_target(runtime: Runtime, target: Target, threads: int) -> None:
    """Raise `InputError` for fewer than one thread, `StageError` if this machine lacks the target."""
    if threads < 1:
        raise InputError(f"{threads} threads cannot run a model.", expected="at least 1")
    refuse_unavailable(target, runtime.unavailable(target))


def refuse_unavailable(target: Target, reason: str | None) -> None:
    """Raise `StageError` with the reason why a target is not available, if there is one."""
    if reason is not None:
        raise StageError(f"The target {target.name!r} is not available here: {reason}")


def why_missing(module: str, distribution: str, extra: str) -> str | None:
    """Return the reason why the runtime of a package is not installed, or ``None`` if it is installed."""
    module_spec = importlib.util.find_spec(module)
    return None if module_spec else f"{distribution} is not installed ({install_command(extra)})"


class PackagedRuntime:
    """Base class of runtimes that are one Python ``distribution``, which the extra of the runtime's name installs."""

    name: str
    distribution: str

    def unavailable(self, target: Target) -> str | None:
        """Return the reason why this machine lacks the target: the package is not installed."""
        return why_missing(self.distribution.replace("-", "_"), self.distribution, self.name)

    def build(self) -> str:
        """Return the package's version."""
        return version(self.distribution)


class CacheInPlace(Protocol):
    """Key-value cache of one text that stays in the same memory from token to token."""

    def predict(self, feed: Batch, seen: int, total: int) -> np.ndarray:
        """Return the logits of the tokens ``seen`` to ``total`` and add their keys and values to the cache.

        A ``seen`` of 0 starts a new text. Raises `StageError` if the graph fails.
        """


@runtime_checkable
class SharesCache(Protocol):
    """Session that can update a decoder's key-value cache in place."""

    def shared_cache(self, names: Mapping[str, str]) -> CacheInPlace | None:
        """Return the cache for these inputs and outputs, or None if the graph's attention does not write in place."""


@runtime_checkable
class ComponentSession(Protocol):
    """Session of several components, each with a session of its own."""

    @property
    def parts(self) -> Mapping[str, Session]:
        """Return the components by the names of their folders, in the order in which they run."""


@runtime_checkable
class TimesItself(Protocol):
    """Session whose model runs in another process and is timed there, so that transfers do not count."""

    @property
    def session_load_ms(self) -> float:
        """Milliseconds that loading the model took after its bytes and the runtime had arrived."""

    @property
    def runtime_bytes(self) -> int:
        """Peak memory of the other process before the model was loaded."""

    @property
    def start_up(self) -> Mapping[str, float]:
        """Return other measurements of the start, with names that end in their unit, `_ms` or `_bytes`."""

    def hold(self, batches: Sequence[Batch]) -> None:
        """Send batches to the other process in place of the previous ones."""

    def time(self, calls: Sequence[int]) -> list[float]:
        """Return the milliseconds of one call for each batch number in ``calls``, by the other process's clock."""

    def queued_latencies(self, calls: Sequence[int], gaps_ms: Sequence[float]) -> list[float]:
        """Return the milliseconds from arrival to answer of queued calls that arrive ``gaps_ms`` after each other."""

    def cpu_seconds(self) -> float:
        """Return the processor time that the other process has used so far."""

    def peak_bytes(self) -> int:
        """Return the peak resident memory of the other process so far."""


@runtime_checkable
class Fetches(Protocol):
    """Runtime that is not a Python package and is downloaded when a target is first used."""

    def fetch(self, target: Target, progress: Progress) -> None:
        """Download missing files of the runtime.

        Raises:
            SampleError: The files cannot be downloaded.
            StorageError: There is not enough space.
        """


@runtime_checkable
class Ships(Protocol):
    """Runtime whose app files differ from the files of its Python package."""

    def shipped_files(self) -> tuple[Path, ...]:
        """Return the local paths of the files that an app ships."""


@runtime_checkable
class HasExecutionNote(Protocol):
    """Runtime that does not run every artifact exactly as it is stored."""

    def remark(self, artifact: Path) -> str | None:
        """Return a note on how the runtime executes that folder, for readers of its times, or None."""


class Runtime(Protocol):
    """One way of running artifacts. One file each, registered in `compress.formats.runtime`."""

    name: str

    def open(self, artifact: Path, target: Target, threads: int) -> Session:
        """Open an artifact. Raises `ModelError` if it cannot be read, `StageError` without the target."""

    def unavailable(self, target: Target) -> str | None:
        """Return the reason why this machine lacks the target, or ``None`` if it has it."""

    def build(self) -> str:
        """Return the version, or the digest of a custom library, that answers and speed depend on."""


def get_runtime(name: str) -> Runtime:
    """Return the runtime of that name; raise `KeyError` for a name outside `RUNTIMES`."""
    runtime: Runtime = load(RUNTIMES[name].runtime)
    return runtime


def why_unavailable(target: Target) -> str | None:
    """Return the reason why nothing can run on ``target`` on this machine, or ``None`` if it is available."""
    if target.runtime not in RUNTIMES:
        return f"its runtime, {target.runtime}, is not one that compress runs"
    try:
        runtime = get_runtime(target.runtime)
    except ImportError as error:
        return f"the runtime {target.runtime!r} cannot be imported: {error}"
    return runtime.unavailable(target)


def open_model(model: Model) -> Session:
    """Open a model with the first target of its format and one thread."""
    target = FORMATS[model.kind].targets[0].target
    with tempfile.TemporaryDirectory() as folder:
        # The session keeps the file's content, so the folder may be deleted.
        model.save(Path(folder))
        return get_runtime(target.runtime).open(Path(folder), target, threads=1)


def prepare_runtime(target: Target, progress: Progress) -> str | None:
    """Fetch missing files of the runtime of ``target``; return the reason if it is still unavailable, else ``None``."""
    reason = why_unavailable(target)
    if reason is None and isinstance(runtime := get_runtime(target.runtime), Fetches):
        try:
            runtime.fetch(target, progress)
        except (SampleError, StorageError) as error:
            return error.what
    return reason
