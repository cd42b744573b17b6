"""Verification of every byte of a registry, and removal of files that nothing needs."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from compress.plugins.registry.contents import FileStore, contents_of, needed_by
from compress.plugins.registry.log import LOCK, LOG, Log, NewerRegistryError
from compress.plugins.registry.object_store import INCOMING, OBJECTS, freed_bytes
from compress.plugins.registry.registry import Registry
from compress.plugins.registry.state import Collected, State, Version
from compress.plugins.registry.trust import TRUST
from compress.recipe.recipe import START
from compress.report.run_folder import LOCK as RUN_LOCK
from compress.utils.errors import InputError, UntrustedError
from compress.utils.progress import Progress, SilentProgress
from compress.utils.pydantic_models import Frozen
from compress.utils.storage import storage_errors


class Fault(Frozen):
    """File of a registry with a fault, and the files of versions that it stands for.

    A log is ``untrusted`` if it is not signed as it must be.
    """

    path: str
    fault: Literal["damaged", "missing", "surplus", "untrusted"]
    why: str = ""
    of: tuple[str, ...] = ()


SILENT = SilentProgress()


def verify(registry: Registry, progress: Progress = SILENT) -> tuple[Fault, ...]:
    """Return every file of the registry with a fault after reading all files, and whether its log counts."""
    faults = []
    # Forget what was read, so that every line of the log is checked again.
    registry.log = Log(registry.root)
    try:
        registry.state()
    except NewerRegistryError:
        raise
    except InputError as error:
        if not registry.log.path.is_file():
            raise
        faults.append(Fault(path=LOG, fault="damaged", why=error.what))
    else:
        try:
            registry.signer()
        except UntrustedError as error:
            faults.append(Fault(path=LOG, fault="untrusted", why=error.what))
        if unfinished := registry.log.unfinished():
            why = f"{unfinished} bytes of a line that was cut short; the next writer removes them"
            faults.append(Fault(path=LOG, fault="surplus", why=why))
    # A damaged log names fewer versions than exist, so no file can be called surplus then.
    complete = not any(fault.fault == "damaged" for fault in faults)
    faults += object_faults(registry.log.state_so_far, registry.objects, progress, complete)
    # Look for files beside the log and the objects, and files that killed writers left.
    left = {name for token in registry.objects.abandoned() for name in (token, f"{token}.lock")}
    for path in sorted(registry.root.iterdir()):
        if path.name == INCOMING:
            why = "left by a killed writer; `gc` removes it"
            abandoned = sorted(left & {entry.name for entry in path.iterdir()})
            faults += [Fault(path=f"{INCOMING}/{name}", fault="surplus", why=why) for name in abandoned]
        elif path.name not in (OBJECTS, LOG, LOCK, TRUST):
            faults.append(Fault(path=path.name, fault="surplus", why="no part of a registry"))
    return tuple(faults)


def object_faults(state: State, objects: FileStore, progress: Progress, complete: bool = True) -> Iterator[Fault]:
    """Yield the faults of files that are stored by their digests, on this machine or elsewhere.

    Args:
        state: State of the registry.
        objects: The files.
        progress: Shows the reading.
        complete: The whole log could be read. Only then, and if every list of files can be read, a file that no
            version lists is surplus.
    """
    needed: dict[str, list[str]] = defaultdict(list)
    for version in state.all():
        if version.collected:
            continue
        # Remember every version that needs a file, for the message.
        needed[version.record].append(f"{version.reference} (the list of its files)")
        try:
            contents = contents_of(version, objects)
        except InputError:
            complete = False
            continue
        for path, file in contents.files.items():
            needed[file.sha256].append(f"{version.reference} {path}")
    digests = sorted(objects.names() | needed.keys())
    for digest in progress.track(digests, "reading files", len(digests)):
        fault = objects.fault(digest)
        if fault is not None:
            of = tuple(needed.get(digest, ()))
            yield Fault.model_validate({"path": f"{OBJECTS}/{digest}", "fault": fault, "of": of})
        elif complete and digest not in needed:
            yield Fault(path=f"{OBJECTS}/{digest}", fault="surplus", why="no version needs it; `gc` removes it")


class Collection(Frozen):
    """Files that `gc` removes, and retired versions that it keeps, with the reasons."""

    versions: tuple[str, ...]
    objects: tuple[str, ...]
    freed_bytes: int
    kept: dict[str, str] = {}


def collect(registry: Registry, runs: Path, dry_run: bool) -> Collection:
    """Remove files that no alias, no version in use and no run below ``runs`` needs; ``dry_run`` only lists them.

    Raises `InputError` if the log or a list of files is damaged, since it is unknown then which files are needed.
    """
    state = registry.state()
    if dry_run:
        return _garbage(registry, state, runs)[0]
    with storage_errors(registry.root):
        # The entry is durable before the first file is removed, and no other process can use the files meanwhile.
        with registry.writing() as (state, stamp, add):
            collection, removed = _garbage(registry, state, runs)
            if removed:
                add(Collected(**stamp, versions=tuple((version.name, version.number) for version in removed)))
            for digest in collection.objects:
                registry.objects.path(digest).unlink(missing_ok=True)
        # Files of killed writers are in no version.
        freed = registry.objects.remove_abandoned()
    return collection.model_copy(update={"freed_bytes": collection.freed_bytes + freed})


def _garbage(registry: Registry, state: State, runs: Path) -> tuple[Collection, list[Version]]:
    """Return the files to remove, and the versions whose files these are."""
    # A retired version remains if a run started from its model. Map digests of starting models to folders of runs.
    starts = {}
    for lock in sorted(runs.glob(f"*/*/{RUN_LOCK}")) if runs.is_dir() else []:
        try:
            start = json.loads(lock.read_text(encoding="utf-8"))[START]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"The starting model of a run cannot be read: {error}",
                where=str(lock),
                hint="remove that run's folder, or name other runs with --artifacts",
            ) from None
        starts[str(start)] = str(lock.parent)
    removed, retained, needed = [], {}, set[str]()
    for version in state.all():
        if version.collected:
            continue
        contents = contents_of(version, registry.objects)
        run = starts.get(contents.model_digest)
        # Nothing needs this version.
        if version.retired and run is None:
            removed.append(version)
            continue
        if version.retired:
            retained[version.reference] = f"{run} started from it"
        needed.update(needed_by(version, contents))
    surplus = sorted(registry.objects.names() - needed)
    freed = sum(freed_bytes(registry.objects.path(digest)) for digest in surplus)
    names = tuple(version.reference for version in removed)
    return Collection(versions=names, objects=tuple(surplus), freed_bytes=freed, kept=retained), removed
