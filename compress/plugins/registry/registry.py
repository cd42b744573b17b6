"""Registry in a folder that several processes, also of several machines, may use at once."""

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

from compress.plugins.registry.contents import VersionContents, add_run, check_files, contents_of, summary
from compress.plugins.registry.log import Log
from compress.plugins.registry.object_store import ObjectStore
from compress.plugins.registry.state import (
    LATEST,
    NAME_PATTERN,
    Began,
    Entry,
    Registered,
    Retired,
    RolledBack,
    Signed,
    State,
    Version,
)
from compress.plugins.registry.trust import Trust, log_signer
from compress.report.compare.baseline import run_git
from compress.utils.errors import InputError, StorageError
from compress.utils.storage import digest_file, storage_errors

PULLED = "version.json"


class Stamp(TypedDict):
    """Author and time of an entry."""

    at: str
    who: str


class Registry:
    """Registry in the folder ``root``, which the first `register` creates. ``note`` receives messages for the user.

    New entries are signed with the SSH key ``key``, if there is one. Raises `InputError` for unknown names, damage and
    newer versions, `UntrustedError` for a log that is not signed as it must be, and `StorageError` if nothing can be
    written.
    """

    def __init__(self, root: Path, note: Callable[[str], None] = lambda _: None, key: Path | None = None) -> None:
        self.root = root
        self.log = Log(root)
        self.objects = ObjectStore(root)
        self.trust = Trust(root)
        self.note = note
        self.key = key

    def state(self) -> State:
        """Return the present state."""
        if not self.log.path.is_file():
            raise InputError(
                "There is no registry here.",
                where=str(self.root),
                expected="the folder of a registry",
                hint="register a run, which begins one: compress registry register RUN --name NAME",
            )
        return self.log.state()

    @contextlib.contextmanager
    def writing(self, endorse: bool = False) -> Iterator[tuple[State, Stamp, Callable[[Entry], None]]]:
        """Lock the registry, and yield its state, the stamp of a new entry, and a function that adds it durably.

        With ``endorse``, the new entry may be signed although those before it are not. Raises `UntrustedError` for a
        log that must be signed and is not, and `InputError` for a key that cannot be used.
        """
        with self.log.writing() as append:
            state = self.log.state_so_far
            signer = log_signer(self.log.head, self.trust, self.key, str(self.log.path), endorse)
            stamp = Stamp(at=datetime.now(UTC).astimezone().isoformat(timespec="seconds"), who=_who())
            if not state.entries:
                append(Began(**stamp), signer)

            def add(entry: Entry) -> None:
                last = state.entries[-1].at
                # The order of entries is that of the log, since clocks of several machines differ.
                if datetime.fromisoformat(last) > datetime.fromisoformat(entry.at):
                    self.note(f"This machine's clock is behind the last entry, {last}; the log's order is used.")
                append(entry, signer)

            yield state, stamp, add

    def register(self, run: Path, name: str, bundle: Path | None = None, note: str = "") -> tuple[Version, bool]:
        """Make a run's files a version of a model.

        Args:
            run: Folder of the run.
            name: Name of the model.
            bundle: Bundle that was made from the run.
            note: Note for the list of versions.

        Returns:
            The version, and whether it is new: equal files are the same version.

        Raises:
            InputError: The run has no report or no model, or the bundle was made from another run.
        """
        check_name(name, "a model")
        with self.objects.incoming() as incoming:
            record, report = add_run(run, bundle, incoming)
            with self.writing() as (state, stamp, add):
                # Files come before the entry that names them, and replace damaged ones even if no entry is new.
                incoming.admit(incoming.sealed)
                versions = state.versions.get(name, {})
                # Equal files give the same record, so registering a run twice gives one version.
                for version in versions.values():
                    if version.record == record and not version.retired:
                        return version, False
                number = max(versions, default=0) + 1
                fields = {"name": name, "version": number, "record": record, "run": str(run)}
                add(Registered(**stamp, **fields, summary=summary(report), note=note))
                return state.versions[name][number], True

    def contents(self, version: Version) -> VersionContents:
        """Return the contents of a version."""
        return contents_of(version, self.objects)

    def verified(self, version: Version) -> VersionContents:
        """Return the contents of a version after comparing every byte of its files with their digests."""
        contents = self.contents(version)
        check_files(version, contents, self.objects)
        return contents

    def rollback(self, name: str, alias: str, why: str = "") -> RolledBack:
        """Let an alias refer to its previous version, whose files are compared with their digests."""
        verified = self.state().previous(name, alias)
        self.verified(verified)
        with self.writing() as (state, stamp, add):
            current, previous = state.find(f"{name}@{alias}"), state.previous(name, alias)
            # The bytes are read before the registry is locked, unless somebody has changed the alias meanwhile.
            check_files(previous, self.contents(previous), self.objects, thorough=previous != verified)
            fields = {"name": name, "version": previous.number, "alias": alias, "before": current.number, "why": why}
            entry = RolledBack.model_validate(stamp | fields)
            add(entry)
        return entry

    def retire(self, reference: str, why: str = "") -> Version:
        """Retire a version. Raises `InputError` if an alias refers to it."""
        self.state()
        with self.writing() as (state, stamp, add):
            version = state.find(reference)
            # An alias must always lead to a version with files.
            aliases = [alias for alias, number in state.aliases(version.name).items() if number == version.number]
            if aliases:
                raise InputError(
                    f"{version.reference} is the {aliases[0]} and cannot be retired.",
                    hint=f"promote another first: compress registry promote {version.name}@VERSION --as {aliases[0]}",
                )
            if not version.retired:
                add(Retired(**stamp, name=version.name, version=version.number, why=why))
            return state.find(reference)

    def sign(self, why: str = "") -> bool:
        """Sign all lines of the log, which the user has looked at, and return whether they were not signed before."""
        self.state()
        with self.writing(endorse=True) as (_, stamp, add):
            try:
                log_signer(self.log.head, self.trust, self.key, str(self.log.path))
            except InputError:
                add(Signed(**stamp, why=why))
                return True
        return False

    def signer(self) -> str | None:
        """Return the fingerprint of the key that signed the log. Raises `UntrustedError` as `Trust.signer` does."""
        self.state()
        return self.trust.signer(self.log.head, str(self.log.path))

    def pull(self, reference: str, output: Path, replace: bool = False) -> Version:
        """Copy a version into the folder ``output``, which then equals its run's folder; every byte is checked.

        Raises the errors of `write_pulled`, and `UntrustedError` if the log must be signed and is not.
        """
        state = self.state()
        self.trust.check(self.log.head, str(self.log.path))
        version = state.require_active(state.find(reference))

        def copy(digest: str, target: Path) -> None:
            if self.objects.path(digest).is_file():
                shutil.copyfile(self.objects.path(digest), target)

        write_pulled(version, self.contents(version), output, replace, copy)
        return version


def write_pulled(
    version: Version, contents: VersionContents, output: Path, replace: bool, copy: Callable[[str, Path], None]
) -> None:
    """Write the files of a version, check them, and rename their folder at the end.

    Args:
        version: The version.
        contents: Its contents.
        output: Folder to create.
        replace: Replace a folder that was pulled before.
        copy: Writes the file of a digest to a path.

    Raises:
        InputError: The folder contains something else.
        StorageError: A file is missing or has other contents.
    """
    if output.exists() and not (replace and (output / PULLED).is_file()):
        raise InputError(
            "There is something here already.",
            where=str(output),
            expected=f"a folder with {PULLED}, as pulled ones have" if replace else "a folder that does not exist",
            hint="name another with -o" if replace else "name another with -o, or give --replace to pull anew",
        )
    with storage_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        # Write into a folder beside the final one and rename it at the end, so that a partial version is never visible.
        unfinished = output.with_name(f".{output.name}-{uuid.uuid4().hex}")
        try:
            for path, file in contents.files.items():
                target = unfinished / path
                target.parent.mkdir(parents=True, exist_ok=True)
                copy(file.sha256, target)
                # Verify the written copy and not the source, since the copy is what will be used.
                if not target.is_file() or digest_file(target) != file.sha256:
                    raise StorageError(
                        f"{path} of {version.reference} is {'damaged' if target.is_file() else 'missing'}.",
                        where=file.sha256,
                        hint="`compress registry verify` lists all faults; registering its run again replaces the "
                        "damaged files",
                    )
            fields = {"name": version.name, "version": version.number, "registered": version.at}
            fields |= {"record": version.record, "model_digest": contents.model_digest}
            (unfinished / PULLED).write_text(json.dumps(fields, indent=1) + "\n")
            # A folder cannot be renamed onto one with files, so the old folder is moved away first.
            old = output.with_name(f".{output.name}-{uuid.uuid4().hex}")
            if output.exists():
                output.replace(old)
            unfinished.replace(output)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def check_name(name: str, owner: str) -> None:
    """Raise `InputError` if ``name`` is no valid name for ``owner``, such as "an alias"."""
    alias = owner == "an alias"
    if not re.fullmatch(NAME_PATTERN, name) or (alias and (name.isdigit() or name == LATEST)):
        also = f", neither digits alone nor {LATEST}" if alias else ""
        raise InputError(
            f"{name!r} cannot be the name of {owner}.", expected=f"letters, digits, '.', '_' and '-'{also}"
        )


@functools.cache
def _who() -> str:
    """Return the name that git is configured with, or that of the user."""
    return run_git(Path(), "config", "user.name") or os.environ.get("USER") or getpass.getuser()
