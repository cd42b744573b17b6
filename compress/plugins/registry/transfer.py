"""Sending a registry to an address, bringing one from there, and bringing one version alone."""

from __future__ import annotations

import shutil
from pathlib import Path

from compress.plugins.registry.contents import contents_of, needed_by
from compress.plugins.registry.log import Reading
from compress.plugins.registry.registry import Registry, put_pulled
from compress.plugins.registry.remote import Remote
from compress.plugins.registry.state import State, Version
from compress.plugins.registry.upkeep import SILENT, Fault, object_faults
from compress.utils.errors import InputError
from compress.utils.progress import Progress
from compress.utils.pydantic_models import Frozen

FETCHED = "fetched"


class Transfer(Frozen):
    """What was sent or brought: new entries of the log, files, and bytes that were not there yet."""

    entries: int
    files: int
    bytes: int


def push(registry: Registry, remote: Remote, progress: Progress = SILENT) -> Transfer:
    """Send what a remote lacks: files first, each piece read again, then the entries that name them.

    Raises `InputError` where the remote has entries that this registry lacks.
    """
    registry.state()
    lines, there = registry.log.lines(), remote.lines()
    _check_begins(lines, there, f"compress registry fetch {remote.url}, into a new folder, and register there")
    pieces, sent, digests = remote.pieces(), 0, dict[str, None]()
    for version in registry.log.state_so_far.all():
        digests.update(dict.fromkeys(() if version.collected else needed_by(version, registry.objects)))
    for digest in progress.track(digests, "sending files", len(digests)):
        sent += remote.send(registry.objects.sound(digest), digest, pieces.get(digest, {}))
    if len(lines) > len(there):
        remote.add_lines(there, lines[len(there) :])
    return Transfer(entries=len(lines) - len(there), files=len(digests), bytes=sent)


def fetch(registry: Registry, remote: Remote, progress: Progress = SILENT) -> Transfer:
    """Bring what this registry lacks. Raises `InputError` where it has entries that the remote lacks."""
    lines, here = remote.lines(), registry.log.lines()
    state = _read(remote, lines)
    _check_begins(lines, here, f"compress registry push {remote.url}, or fetch into a new folder")
    pieces, present, brought = remote.pieces(), registry.objects.names(), 0
    with registry.objects.incoming(FETCHED) as incoming:
        new: dict[str, None] = {}
        needed: dict[str, None] = {}

        def bring(digest: str) -> int:
            if digest in present or digest in new:
                return 0
            new[digest] = None
            return remote.receive(digest, incoming.folder / digest, pieces.get(digest, {}))

        for version in state.all():
            if not version.collected:
                brought += bring(version.record)
                held = incoming.folder if version.record in new else registry.objects.folder
                record = (held / version.record).read_bytes()
                needed.update(dict.fromkeys(needed_by(version, registry.objects, record)))
        brought += sum(map(bring, progress.track(needed, "bringing files", len(needed))))
        with registry.log.writing():
            now = registry.log.lines()
            _check_begins(lines, now, "give the command again")
            if needed.keys() - new.keys() - registry.objects.names():
                raise InputError("Files were removed here meanwhile.", hint="give the command again, beside no `gc`")
            incoming.admit(new)
            registry.log.take(lines[len(now) :])
    return Transfer(entries=len(lines) - len(here), files=len(new), bytes=brought)


def _read(remote: Remote, lines: list[bytes]) -> State:
    """What the lines of a remote's log come to. Raises `InputError` where there are none."""
    if not lines:
        raise InputError(
            "There is no registry at this address.",
            where=remote.url,
            hint=f"send one there: compress registry push {remote.url}",
        )
    return Reading(remote.url).take(lines).state


def pull_remote(remote: Remote, reference: str, output: Path, replace: bool = False) -> Version:
    """Bring one version into a folder, as `Registry.pull` does; what had arrived of it before is gone on with."""
    state = _read(remote, remote.lines())
    version = state.wanted(state.find(reference))
    contents = contents_of(version, remote)
    pieces = remote.pieces()
    parts = output.with_name(f".{output.name}.part")

    def bring(digest: str, place: Path) -> None:
        part = parts / digest
        remote.receive(digest, part, pieces.get(digest, {}))
        shutil.copyfile(part, place)

    put_pulled(version, contents, output, replace, bring)
    shutil.rmtree(parts, ignore_errors=True)
    return version


def verify_remote(remote: Remote, progress: Progress = SILENT) -> tuple[Fault, ...]:
    """Every damaged, missing or surplus file of a remote, after reading all of them; a broken log is an error."""
    return tuple(object_faults(_read(remote, remote.lines()), remote, progress))


def _check_begins(lines: list[bytes], beginning: list[bytes], hint: str) -> None:
    """Raise `InputError` unless ``lines`` begin with ``beginning``: the last check tells, it stands for all before."""
    if len(beginning) <= len(lines) and (not beginning or lines[len(beginning) - 1][:64] == beginning[-1][:64]):
        return
    same = sum(one == other for one, other in zip(lines, beginning, strict=False))
    raise InputError(
        f"The two registries part after line {same} of their logs.",
        expected="one that has every entry of the other",
        hint=hint,
    )
