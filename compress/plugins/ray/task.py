"""What runs on a worker: a stage or a look at what stages made, from files that its own folder has or is sent."""

from __future__ import annotations

import importlib
import os
import platform
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.pipeline.cache import CONTENT, Cache, Entry
from compress.plugins.ray.archive import pack, unpack, unpack_verified
from compress.utils.environment import PACKAGES, features, package_versions, processor, processor_class
from compress.utils.errors import CompressError, StorageError
from compress.utils.storage import digest_file

if TYPE_CHECKING:
    from compress.data.dataset import Dataset
    from compress.pipeline.runner import StageRunner
    from compress.plugins.ray.jobs import RunnerFunction
    from compress.recipe.recipe import Recipe

FOLDER_VARIABLE = "COMPRESS_WORKER_FOLDER"
"""Environment variable with the folder of a worker's files."""
_datasets: dict[str, Dataset] = {}
"""Data that this process read last, by digest."""


@dataclass(frozen=True)
class MachineInfo:
    """What a machine is, as far as it bears on what is made and measured there."""

    host: str
    python: str
    code: str
    """Digest of the source files of this package."""
    packages: Mapping[str, str]
    processor: str
    features: tuple[str, ...]
    processor_class: str

    def differs(self, other: MachineInfo) -> str | None:
        """What would give other files there than here: the first of Python, packages and this package itself."""
        if self.python != other.python:
            return f"Python {other.python} (here {self.python})"
        for name, version in self.packages.items():
            if other.packages.get(name) != version:
                return f"{name} {other.packages.get(name)} (here {version})"
        return None if self.code == other.code else "another version of compress itself"

    @property
    def is_timed_as(self) -> tuple[str, tuple[str, ...]]:
        """What times depend on."""
        return self.processor, self.features


def machine_info(packages: Sequence[str]) -> MachineInfo:
    """Those of this machine; ``packages`` are looked at beside the usual ones."""
    import compress

    root = Path(compress.__file__).parent
    return MachineInfo(
        host=socket.gethostname(),
        python=platform.python_version(),
        code=_code(root),
        packages=package_versions(tuple(sorted({*PACKAGES, *packages} - {"compress"}))),
        processor=processor(),
        features=features(),
        processor_class=processor_class(),
    )


def _code(root: Path) -> str:
    import hashlib

    total = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(f"{path.relative_to(root).as_posix()}\0{digest_file(path)}\0".encode())
    return total.hexdigest()


def own_folder() -> Path:
    """Where this machine keeps what it makes and is sent, unless it is the driver's."""
    from compress.data.samples.fetch import cache_root

    return Path(os.environ.get(FOLDER_VARIABLE) or cache_root().parent / "worker")


@dataclass(frozen=True)
class WorkOrder:
    """One piece of work: a stage by its label, or a look at all that was made.

    ``earlier`` are the stages before it, each with the key and the record of its output; ``models`` and ``folders``
    are what the recipe names, each with its digest and where it lies for the driver; ``data`` is the digest of its
    rows. ``shared`` is the driver's own folder, on the machine named ``host``.
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
        """Everything that the machine has to have, as it travels."""
        return {*self.entries(), *(digest for digest, _ in (*self.models.values(), *self.folders.values())), self.data}

    def entries(self) -> dict[str, Mapping[str, Any]]:
        """Records of the entries whose files it has to have, by their keys."""
        read = {key: record for label, key, record in self.earlier if label in self.needs}
        return {**read, **dict(self.baseline_entries)}


@dataclass(frozen=True)
class MissingInputs:
    """What the machine hasn't got: keys of entries, and digests of models, folders and data."""

    digests: frozenset[str]


@dataclass(frozen=True)
class WorkFailure:
    """A `CompressError` in words; ``storage``: the machine's disk is full or can't be written."""

    what: str
    where: str | None
    expected: str | None
    hint: str | None
    storage: bool


@dataclass(frozen=True)
class TransferredEntry:
    """An entry of a machine's cache; without ``content`` where the driver has the same folder."""

    key: str
    record: dict[str, Any]
    content: bytes | None


@dataclass(frozen=True)
class WorkResult:
    """What came of an order: new entries, the stage's own first, or what a look found; and the seconds of it all."""

    entries: tuple[TransferredEntry, ...]
    output: Any
    seconds: float


def execute(order: WorkOrder, references: Mapping[str, Any]) -> MissingInputs | WorkFailure | WorkResult:
    """Do it, or say what is lacking; ``parcels`` are references to what the machine was found to lack before."""
    # A worker gets all that it needs from the driver.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # What a process loads once is no trial's time.
    importlib.import_module("compress.pipeline.target_session")
    importlib.import_module("transformers")
    importlib.import_module("torch")
    began = time.perf_counter()
    try:
        at = OrderExecution(order, references)
        return MissingInputs(frozenset(at.missing)) if at.missing else at.execute(began)
    except CompressError as error:
        return WorkFailure(error.what, error.where, error.expected, error.hint, isinstance(error, StorageError))


class OrderExecution:
    """One machine's folder, with everything in its place that an order needs; ``lacking`` is what isn't."""

    def __init__(self, order: WorkOrder, references: Mapping[str, Any]) -> None:
        self.order, self.references = order, references
        self.is_shared = order.host == socket.gethostname() and FOLDER_VARIABLE not in os.environ
        self.folder = Path(order.shared) if self.is_shared else own_folder()
        self.missing: set[str] = set()
        cache = Cache(self.folder / "cache")
        for key, record in self.order.entries().items():
            found = cache.find(key)
            if found is not None and found.digest == record["digest"]:
                continue
            content = self._sent(key)
            if content is not None:
                cache.remove(key)  # what is there is damaged, or of another making
                cache.admit(key, dict(record), partial(unpack, content))
        self.models = {name: self._source(*told) for name, told in order.models.items()}
        self.folders = {name: self._source(*told) for name, told in order.folders.items()}
        if order.data not in _datasets and (data := self._sent(order.data)) is not None:
            _datasets.clear()
            _datasets[order.data] = data

    def _sent(self, digest: str) -> Any:
        """What the driver sent, or None, and then it is lacking."""
        import ray

        if digest in self.references:
            return ray.get(self.references[digest][0])
        self.missing.add(digest)
        return None

    def _source(self, digest: str, path: str) -> Path:
        if self.is_shared:
            return Path(path)
        there = self.folder / "cache" / "sources" / digest
        if not there.is_dir() and (content := self._sent(digest)) is not None:
            unpack_verified(content, digest, there)
        return there

    def execute(self, began: float) -> WorkResult:
        """Take the stage, or look."""
        import torch

        from compress.formats.quiet_output import quiet_libraries

        quiet_libraries()
        if torch.get_num_threads() != self.order.threads:
            torch.set_num_threads(self.order.threads)
        runner, label, found = self._runner(), self.order.label, None
        if label is not None:
            made = [runner.run_stage(label).entry]
        else:
            assert self.order.function is not None
            found = self.order.function(runner)
            left = [
                (one.entry, one.record.cached) for _, one in runner.extra_results.values()
            ] + runner.measurement_entries
            made = [entry for entry, cached in left if self.order.is_baseline_evaluation or not cached]
        entries = {entry.key: entry for entry in made}.values()
        sent = (TransferredEntry(one.key, one.record, None if self.is_shared else pack(one.folder)) for one in entries)
        return WorkResult(tuple(sent), found, time.perf_counter() - began)

    def _runner(self) -> StageRunner:
        """The recipe's runner, by what came from the driver."""
        from compress.models.config_checks import allow
        from compress.pipeline.runner import StageRunner
        from compress.utils.progress import SilentProgress

        runner = StageRunner(self.order.recipe, self.folder, self.folder, SilentProgress())
        runner.inputs.data = _datasets[self.order.data]
        runner.inputs.models |= self.models
        runner.inputs.local_folders |= self.folders
        if self.order.recipe.trust_remote_code:
            for model in self.models.values():
                allow(str(model.resolve()), model)
        for label, key, record in self.order.earlier:
            runner.use_cached(label, Entry(key, runner.cache.root / key / CONTENT, dict(record)))
        return runner
