"""Transfer of a registry to an address and from there, and download of a single version."""

from __future__ import annotations

import shutil
from pathlib import Path

from compress.plugins.registry.contents import contents_of, needed_by
from compress.plugins.registry.log import LogReader
from compress.plugins.registry.registry import Registry, put_pulled
from compress.plugins.registry.remote import Remote
from compress.plugins.registry.state import State, Version
from compress.plugins.registry.upkeep import SILENT, Fault, object_faults
from compress.utils.errors import InputError
from compress.utils.progress import Progress
from compress.utils.pydantic_models import Frozen

FETCHED = "fetched"


class Transfer(Frozen):
    """Number of new entries of the log, files, and bytes that a transfer moved."""

    entries: int
    files: int
    bytes: int


def push(registry: Registry, remote: Remote, progress: Progress = SILENT) -> Transfer:
    """Send what a remote lacks: first the files, each piece of which is read again, then the entries that name them.

    Raises `InputError` if the remote has entries that this registry lacks.
    """
    registry.state()
    lines, remote_lines = registry.log.lines(), remote.lines()
    _check_begins(lines, remote_lines, f"compress registry fetch {remote.url}, into a new folder, and register there")
    pieces, sent, digests = remote.pieces(), 0, dict[str, None]()
    for version in registry.log.state_so_far.all():
        digests.update(dict.fromkeys(() if version.collected else needed_by(version, registry.objects)))
    for digest in progress.track(digests, "sending files", len(digests)):
        sent += remote.send(registry.objects.sound(digest), digest, pieces.get(digest, {}))
    if len(lines) > len(remote_lines):
        remote.add_lines(remote_lines, lines[len(remote_lines) :])
    return Transfer(entries=len(lines) - len(remote_lines), files=len(digests), bytes=sent)


def fetch(registry: Registry, remote: Remote, progress: Progress = SILENT) -> Transfer:
    """Download what this registry lacks. Raises `InputError` if it has entries that the remote lacks."""
    lines, local_lines = remote.lines(), registry.log.lines()
    state = _read(remote, lines)
    _check_begins(lines, local_lines, f"compress registry push {remote.url}, or fetch into a new folder")
    pieces, present, received = remote.pieces(), registry.objects.names(), 0
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
                received += bring(version.record)
                record_folder = incoming.folder if version.record in new else registry.objects.folder
                record = (record_folder / version.record).read_bytes()
                needed.update(dict.fromkeys(needed_by(version, registry.objects, record)))
        received += sum(map(bring, progress.track(needed, "bringing files", len(needed))))
        with registry.log.writing():
            latest_lines = registry.log.lines()
            _check_begins(lines, latest_lines, "give the command again")
            if needed.keys() - new.keys() - registry.objects.names():
                raise InputError("Files were removed here meanwhile.", hint="give the command again, beside no `gc`")
            incoming.admit(new)
            registry.log.take(lines[len(latest_lines) :])
    return Transfer(entries=len(lines) - len(local_lines), files=len(new), bytes=received)


def _read(remote: Remote, lines: list[bytes]) -> State:
    """Return the state after the lines of a remote's log. Raises `InputError` if there are none."""
    if not lines:
        raise InputError(
            "There is no registry at this address.",
            where=remote.url,
            hint=f"send one there: compress registry push {remote.url}",
        )
    return LogReader(remote.url).take(lines).state


def pull_remote(remote: Remote, reference: str, output: Path, replace: bool = False) -> Version:
    """Download one version into a folder, as `Registry.pull` does. An interrupted download is resumed.

    Args:
        remote: The remote.
        reference: Reference of the version.
        output: Folder to create.
        replace: Replace a folder that was pulled before.

    Returns:
        The version.
    """
    state = _read(remote, remote.lines())
    version = state.wanted(state.find(reference))
    contents = contents_of(version, remote)
    pieces = remote.pieces()
    unfinished = output.with_name(f".{output.name}.part")

    def bring(digest: str, place: Path) -> None:
        part = unfinished / digest
        remote.receive(digest, part, pieces.get(digest, {}))
        shutil.copyfile(part, place)

    put_pulled(version, contents, output, replace, bring)
    shutil.rmtree(unfinished, ignore_errors=True)
    return version


def verify_remote(remote: Remote, progress: Progress = SILENT) -> tuple[Fault, ...]:
    """Return every damaged, missing or surplus file of a remote after reading all. A broken log raises an error."""
    return tuple(object_faults(_read(remote, remote.lines()), remote, progress))


def _check_begins(lines: list[bytes], beginning: list[bytes], hint: str) -> None:
    """Raise `InputError` unless ``lines`` begin with ``beginning``. One equal check stands for all lines before it."""
    if len(beginning) <= len(lines) and (not beginning or lines[len(beginning) - 1][:64] == beginning[-1][:64]):
        return
    common = sum(line == other for line, other in zip(lines, beginning, strict=False))
    raise InputError(
        f"The two registries part after line {common} of their logs.",
        expected="one that has every entry of the other",
        hint=hint,
    )
