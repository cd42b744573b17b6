"""A registry in a folder, which several processes, also of several machines, may use at once."""

from __future__ import annotations

import contextlib
import functools
import getpass
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TypedDict

from compress.plugins.registry.contents import Contents, check_files, contents_of, summary, take_run
from compress.plugins.registry.entry import LATEST, WORD, Began, Entry, Registered, Retired, RolledBack
from compress.plugins.registry.log import Log
from compress.plugins.registry.objects import Objects
from compress.plugins.registry.state import State, Version
from compress.report.compare.baseline import run_git
from compress.utils.digests import digest_file
from compress.utils.errors import InputError, StorageError
from compress.utils.storage import storage_errors

PULLED = "version.json"


class Stamp(TypedDict):
    """Who writes an entry, and when."""

    at: str
    who: str


class Registry:
    """The folder ``root``; the first `register` makes it. ``note`` is told what a user should know.

    Raises `InputError` for names that aren't there, damage and newer versions, `StorageError` where nothing can be
    written.
    """

    def __init__(self, root: Path, note: Callable[[str], None] = lambda _: None) -> None:
        self.root = root
        self.log = Log(root)
        self.objects = Objects(root)
        self.note = note

    def state(self) -> State:
        """What is known now."""
        if not self.log.path.is_file():
            raise InputError(
                "There is no registry here.",
                where=str(self.root),
                expected="the folder of a registry",
                hint="register a run, which begins one: compress registry register RUN --name NAME",
            )
        return self.log.state()

    def write(self, decide: Callable[[State, Stamp], Entry | None]) -> Entry | None:
        """Hold the registry and add the entry that ``decide`` finds right then, if any; it counts once this returns."""
        with self.holding(decide) as entry:
            return entry

    @contextlib.contextmanager
    def holding(self, decide: Callable[[State, Stamp], Entry | None]) -> Iterator[Entry | None]:
        """The same; what is done within is done before anybody else writes."""
        with self.log.writing() as add:
            state = self.log.state_so_far
            stamp = Stamp(at=datetime.now(UTC).astimezone().isoformat(timespec="seconds"), who=_who())
            if not state.entries:
                add(Began(**stamp))
            last = state.entries[-1].at
            entry = decide(state, stamp)
            if entry is not None:
                if datetime.fromisoformat(last) > datetime.fromisoformat(entry.at):
                    self.note(f"This machine's clock stands before {last}, the last entry's: the order is the log's.")
                add(entry)
            yield entry

    def register(self, run: Path, name: str, bundle: Path | None = None, note: str = "") -> tuple[Version, bool]:
        """Make a run's files a version of a model, and whether it is new: the same files are the same version.

        Raises `InputError` for a run without a report or a model, and a bundle of another run.
        """
        check_word(name, "a model")
        with self.objects.incoming() as incoming:
            record, report = take_run(run, bundle, incoming)
            known: list[Version] = []

            def decide(state: State, stamp: Stamp) -> Entry | None:
                versions = state.versions.get(name, {})
                incoming.admit(incoming.sealed)
                same = (one for one in versions.values() if one.record == record and not one.retired)
                known.extend(same)
                if known:
                    return None
                return Registered(
                    **stamp,
                    name=name,
                    version=max(versions, default=0) + 1,
                    record=record,
                    run=str(run),
                    summary=summary(report),
                    note=note,
                )

            entry = self.write(decide)
        if isinstance(entry, Registered):
            return self.log.state_so_far.versions[name][entry.version], True
        return known[0], False

    def contents(self, version: Version) -> Contents:
        """What a version holds."""
        return contents_of(version, self.objects)

    def verified(self, version: Version) -> Contents:
        """The same, every byte of its files read and found as it was registered."""
        contents = self.contents(version)
        check_files(version, contents, self.objects)
        return contents

    def rollback(self, name: str, alias: str, why: str = "") -> RolledBack:
        """Let an alias stand for what it stood for before. Only sizes of files are looked at, so that it is quick."""
        self.state()

        def decide(state: State, stamp: Stamp) -> Entry:
            now, before = state.find(f"{name}@{alias}"), state.before(name, alias)
            check_files(before, self.contents(before), self.objects, thorough=False)
            return RolledBack(**stamp, name=name, version=before.number, alias=alias, before=now.number, why=why)

        done = self.write(decide)
        assert isinstance(done, RolledBack)
        return done

    def retire(self, reference: str, why: str = "") -> Version:
        """Say that a version is no longer wanted. Raises `InputError` for one that an alias stands for."""
        self.state()

        def decide(state: State, stamp: Stamp) -> Entry | None:
            version = state.find(reference)
            held = [alias for alias, number in state.aliases(version.name).items() if number == version.number]
            if held:
                raise InputError(
                    f"{version.reference} is the {held[0]} and cannot be retired.",
                    hint=f"promote another first: compress registry promote {version.name}@VERSION --as {held[0]}",
                )
            if version.retired:
                return None
            return Retired(**stamp, name=version.name, version=version.number, why=why)

        self.write(decide)
        return self.log.state_so_far.find(reference)

    def pull(self, reference: str, output: Path, replace: bool = False) -> Version:
        """Copy a version into the folder ``output``, which then is as its run's folder was; every byte is checked.

        Raises as `put_pulled` does.
        """
        state = self.state()
        version = state.wanted(state.find(reference))

        def copy(digest: str, place: Path) -> None:
            if self.objects.path(digest).is_file():
                shutil.copyfile(self.objects.path(digest), place)

        put_pulled(version, self.contents(version), output, replace, copy)
        return version


def put_pulled(
    version: Version, contents: Contents, output: Path, replace: bool, copy: Callable[[str, Path], None]
) -> None:
    """Let ``copy`` write each file of a version by its digest, check it, and give their folder its name at the end.

    With ``replace`` it takes the place of what was pulled there before. Raises `InputError` where something else is
    there, `StorageError` for a file that is missing or another.
    """
    if output.exists() and not (replace and (output / PULLED).is_file()):
        raise InputError(
            "There is something here already.",
            where=str(output),
            expected=f"a folder with {PULLED}, as pulled ones have" if replace else "a folder that isn't there yet",
            hint="name another with -o" if replace else "name another with -o, or give --replace to pull anew",
        )
    with storage_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        beside = output.with_name(f".{output.name}-{uuid.uuid4().hex}")
        try:
            for path, file in contents.files.items():
                place = beside / path
                place.parent.mkdir(parents=True, exist_ok=True)
                copy(file.sha256, place)
                if not place.is_file() or digest_file(place) != file.sha256:
                    raise StorageError(
                        f"{path} of {version.reference} is {'damaged' if place.is_file() else 'missing'}.",
                        where=file.sha256,
                        hint="`compress registry verify` names whatever else is wrong; registering its run again puts "
                        "sound files there",
                    )
            (beside / PULLED).write_text(_about(version, contents))
            _put(beside, output)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def _about(version: Version, contents: Contents) -> str:
    """What a folder that was pulled says of itself."""
    fields = {"name": version.name, "version": version.number, "registered": version.at, "record": version.record}
    return json.dumps({**fields, "model_digest": contents.model_digest}, indent=1) + "\n"


def _put(beside: Path, output: Path) -> None:
    """Give a folder its name; what had it before goes."""
    if output.exists():
        old = output.with_name(f".{output.name}-{uuid.uuid4().hex}")
        output.replace(old)
        beside.replace(output)
        shutil.rmtree(old, ignore_errors=True)
    else:
        beside.replace(output)


def check_word(word: str, what: str) -> None:
    """Raise `InputError` for what ``what`` cannot be called."""
    alias = what == "an alias"
    if not re.match(WORD, word) or (alias and (word.isdigit() or word == LATEST)):
        also = f", neither digits alone nor {LATEST}" if alias else ""
        raise InputError(f"{word!r} cannot be the name of {what}.", expected=f"letters, digits, '.', '_' and '-'{also}")


@functools.cache
def _who() -> str:
    """Whom git knows, else the user."""
    return run_git(Path(), "config", "user.name") or os.environ.get("USER") or getpass.getuser()
