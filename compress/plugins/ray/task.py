"""Execution of one task on a worker: a stage or an evaluation, from files that the worker has or receives."""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import platform
import socket
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import DISTRIBUTION
from compress.pipeline.cache import CONTENT, Cache, Entry
from compress.sources.build_model import write_once
from compress.utils.environment import PACKAGES, features, package_versions, processor, processor_class
from compress.utils.errors import CompressError, StorageError
from compress.utils.storage import digest_directory, digest_file

if TYPE_CHECKING:
    from compress.data.dataset import Dataset
    from compress.pipeline.runner import StageRunner
    from compress.plugins.ray.jobs import RunnerFunction
    from compress.recipe.recipe import Recipe


_MEND = "free space where the worker keeps its files (COMPRESS_WORKER_FOLDER)"


def pack(folder: Path) -> bytes:
    """Return all files below a folder as a tar archive. Links are followed."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", dereference=True) as tar:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            tar.add(path, path.relative_to(folder).as_posix(), recursive=False)
    return content.getvalue()


def unpack(content: bytes, folder: Path) -> None:
    """Write the files of an archive into a folder, which may exist. Members outside of the folder are refused."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(content), mode="r") as tar:
        tar.extractall(folder, filter="data")


def unpack_verified(content: bytes, digest: str, folder: Path) -> None:
    """Write the files of an archive into a new folder, which appears complete or not at all.

    Raises:
        StorageError: The files have another digest, or cannot be written.
    """

    def write(made: Path) -> None:
        unpack(content, made)
        if digest_directory(made) != digest:
            raise StorageError(f"The files of {digest[:12]} are incomplete.", where=str(folder))

    write_once(folder, write, _MEND)


FOLDER_VARIABLE = "COMPRESS_WORKER_FOLDER"
"""Environment variable with the folder of a worker's files."""
_datasets: dict[str, Dataset] = {}
"""Data that this process read last, by digest."""


@dataclass(frozen=True)
class MachineInfo:
    """Properties of a machine that affect its outputs and timings."""

    host: str
    python: str
    code: str
    """Digest of the source files of this package."""
    packages: Mapping[str, str]
    processor: str
    features: tuple[str, ...]
    processor_class: str

    def differs(self, other: MachineInfo) -> str | None:
        """Return the first difference that could change outputs, or None: Python, packages, or this package."""
        if self.python != other.python:
            return f"Python {other.python} (here {self.python})"
        for name, version in self.packages.items():
            if other.packages.get(name) != version:
                return f"{name} {other.packages.get(name)} (here {version})"
        return None if self.code == other.code else "another version of compress itself"

    @property
    def is_timed_as(self) -> tuple[str, tuple[str, ...]]:
        """Properties that timings depend on."""
        return self.processor, self.features


def machine_info(packages: Sequence[str]) -> MachineInfo:
    """Return the properties of this machine, with the versions of ``packages`` besides the usual ones."""
    import compress

    root, code = Path(compress.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        code.update(f"{path.relative_to(root).as_posix()}\0{digest_file(path)}\0".encode())
    return MachineInfo(
        host=socket.gethostname(),
        python=platform.python_version(),
        code=code.hexdigest(),
        packages=package_versions(tuple(sorted({*PACKAGES, *packages} - {DISTRIBUTION}))),
        processor=processor(),
        features=features(),
        processor_class=processor_class(),
    )


@dataclass(frozen=True)
class WorkOrder:
    """One task: a stage by its label, or an evaluation of finished stages.

    ``earlier`` are the stages before it, each with the key and the record of its output. ``models`` and ``folders`` are
    those that the recipe names, each with its digest and its path on the driver. ``data`` is the digest of the rows.
    ``shared`` is the driver's own folder, on the machine ``host``.
    """

    recipe: Recipe
    label: str | None
    function: RunnerFunction | None
    earlier: tuple[tuple[str, str, Mapping[str, Any]], ...]
    needs: frozenset[str]
    baseline_entries: tuple[tuple[str, Mapping[str, Any]], ...]
    is_baseline_evaluation: bool
    models: Mapping[str, tuple[str, str]]
    folders: Mapping[str, tuple[str, str]]
    data: str
    threads: int
    host: str
    shared: str

    def digests(self) -> set[str]:
        """Return the digests of everything that the machine needs."""
        return {*self.entries(), *(digest for digest, _ in (*self.models.values(), *self.folders.values())), self.data}

    def entries(self) -> dict[str, Mapping[str, Any]]:
        """Return the records of the cache entries that the machine needs, by key."""
        read = {key: record for label, key, record in self.earlier if label in self.needs}
        return {**read, **dict(self.baseline_entries)}


@dataclass(frozen=True)
class MissingInputs:
    """Answer of a machine that lacks inputs: keys of entries, and digests of models, folders and data."""

    digests: frozenset[str]


@dataclass(frozen=True)
class WorkFailure:
    """Text of a `CompressError`. ``storage`` is True if the machine's disk is full or cannot be written."""

    what: str
    where: str | None
    expected: str | None
    hint: str | None
    storage: bool


@dataclass(frozen=True)
class TransferredEntry:
    """Cache entry of a worker. ``content`` is None if the driver uses the same folder."""

    key: str
    record: dict[str, Any]
    content: bytes | None


@dataclass(frozen=True)
class WorkResult:
    """Result of a task: new cache entries, the stage's own first, or the output of an evaluation."""

    entries: tuple[TransferredEntry, ...]
    output: Any
    seconds: float


def execute(order: WorkOrder, references: Mapping[str, Any]) -> MissingInputs | WorkFailure | WorkResult:
    """Run a task, or return its missing inputs.

    ``references`` refer to objects in Ray's store that this machine lacked before.
    """
    # A worker gets all that it needs from the driver.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # What a process loads once is no trial's time.
    importlib.import_module("compress.pipeline.target_session")
    importlib.import_module("transformers")
    importlib.import_module("torch")
    began = time.perf_counter()
    try:
        execution = OrderExecution(order, references)
        return MissingInputs(frozenset(execution.missing)) if execution.missing else execution.execute(began)
    except CompressError as error:
        return WorkFailure(error.what, error.where, error.expected, error.hint, isinstance(error, StorageError))


class OrderExecution:
    """Execution of an order in one machine's folder. ``missing`` collects the inputs that are not there."""

    def __init__(self, order: WorkOrder, references: Mapping[str, Any]) -> None:
        from compress.data.samples.fetch import cache_root

        self.order, self.references = order, references
        # The driver's own machine uses the driver's folder. Others have one for outputs and received files.
        folder = os.environ.get(FOLDER_VARIABLE)
        self.is_shared = order.host == socket.gethostname() and folder is None
        self.folder = Path(order.shared if self.is_shared else folder or cache_root().parent / "worker")
        self.missing: set[str] = set()
        cache = Cache(self.folder / "cache")
        for key, record in order.entries().items():
            entry = cache.find(key)
            is_valid = entry is not None and entry.digest == record["digest"]
            if not is_valid and (content := self._sent(key)) is not None:
                cache.remove(key)  # the present entry is damaged, or of another origin
                cache.admit(key, dict(record), partial(unpack, content))
        self.models = {name: self._source(*source) for name, source in order.models.items()}
        self.folders = {name: self._source(*source) for name, source in order.folders.items()}
        # A process keeps one data set, since trials of a search read the same rows.
        if order.data not in _datasets and (data := self._sent(order.data)) is not None:
            _datasets.clear()
            _datasets[order.data] = data

    def _sent(self, digest: str) -> Any:
        """Return an object that the driver sent. If it sent none, add the digest to ``missing`` and return None."""
        import ray

        if digest in self.references:
            return ray.get(self.references[digest][0])
        self.missing.add(digest)
        return None

    def _source(self, digest: str, path: str) -> Path:
        if self.is_shared:
            return Path(path)
        folder = self.folder / "cache" / "sources" / digest
        if not folder.is_dir() and (content := self._sent(digest)) is not None:
            unpack_verified(content, digest, folder)
        return folder

    def execute(self, began: float) -> WorkResult:
        """Run the stage, or evaluate."""
        import torch

        from compress.formats.quiet_output import quiet_libraries

        quiet_libraries()
        # The number of threads changes the order of sums, so it must be the driver's.
        if torch.get_num_threads() != self.order.threads:
            torch.set_num_threads(self.order.threads)
        runner, label, output = self._runner(), self.order.label, None
        if label is not None:
            new_entries = [runner.run_stage(label).entry]
        else:
            assert self.order.function is not None
            output = self.order.function(runner)
            extra_entries = [(result.entry, result.record.cached) for _, result in runner.extra_results.values()]
            extra_entries += runner.measurement_entries
            # Cached entries are already on the driver. Those of the baseline are sent anyway, for other machines.
            new_entries = [entry for entry, cached in extra_entries if self.order.is_baseline_evaluation or not cached]
        sent = (
            TransferredEntry(entry.key, entry.record, None if self.is_shared else pack(entry.folder))
            for entry in {entry.key: entry for entry in new_entries}.values()
        )
        return WorkResult(tuple(sent), output, time.perf_counter() - began)

    def _runner(self) -> StageRunner:
        """Return a runner of the recipe whose inputs are the received files."""
        from compress.models.config_checks import allow_repository_code
        from compress.pipeline.runner import StageRunner
        from compress.utils.progress import SilentProgress

        runner = StageRunner(self.order.recipe, self.folder, self.folder, SilentProgress())
        runner.inputs.data = _datasets[self.order.data]
        runner.inputs.models |= self.models
        runner.inputs.local_folders |= self.folders
        if self.order.recipe.trust_remote_code:
            for model in self.models.values():
                allow_repository_code(model)
        for label, key, record in self.order.earlier:
            # Earlier stages are not run again.
            runner.use_cached(label, Entry(key, runner.cache.root / key / CONTENT, dict(record)))
        return runner
