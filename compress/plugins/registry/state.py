"""State of a registry after all entries of its log: versions, and the history of every alias."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import assert_never

from compress.plugins.registry.entry import (
    CHAMPION,
    LATEST,
    Began,
    Collected,
    Entry,
    Promoted,
    Registered,
    Retired,
    RolledBack,
)
from compress.utils.errors import InputError, did_you_mean


@dataclass(frozen=True)
class Version:
    """Version of a model. Its files may be removed once it is ``retired``, and are removed once it is ``collected``."""

    name: str
    number: int
    record: str
    at: str
    who: str
    run: str
    summary: str
    note: str
    retired: bool = False
    collected: bool = False

    @property
    def reference(self) -> str:
        """Return the reference, such as `reviews@12`."""
        return f"{self.name}@{self.number}"


@dataclass
class State:
    """State that grows with every entry."""

    entries: list[Entry] = field(default_factory=list)
    versions: dict[str, dict[int, Version]] = field(default_factory=dict)
    stacks: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    """Versions that an alias referred to by (model, alias), the present one last, without those rolled back."""

    def apply(self, entry: Entry) -> None:
        """Apply the next entry of the log."""
        self.entries.append(entry)
        match entry:
            case Began():
                pass
            case Registered():
                version = Version(
                    *(entry.name, entry.version, entry.record, entry.at, entry.who),
                    *(entry.run, entry.summary, entry.note),
                )
                self.versions.setdefault(entry.name, {})[entry.version] = version
            case Promoted():
                self.stacks.setdefault((entry.name, entry.alias), []).append(entry.version)
            case RolledBack():
                stack = self.stacks[entry.name, entry.alias]
                del stack[max(index for index, number in enumerate(stack) if number == entry.version) + 1 :]
            case Retired():
                versions = self.versions[entry.name]
                versions[entry.version] = replace(versions[entry.version], retired=True)
            case Collected():
                for name, number in entry.versions:
                    self.versions[name][number] = replace(self.versions[name][number], collected=True)
            case _:
                assert_never(entry)

    def all(self) -> Iterator[Version]:
        """Yield every version in the order of names and numbers."""
        for name in sorted(self.versions):
            yield from self.of(name)

    def of(self, name: str) -> tuple[Version, ...]:
        """Return the versions of a model, oldest first. Raises `InputError` for an unknown model."""
        if name not in self.versions:
            near = did_you_mean(name, self.versions)
            raise InputError(
                f"There is no model {name!r} in the registry.{near}",
                expected=_one_of(sorted(self.versions)),
                hint=None if near else f"register a run by that name: compress registry register RUN --name {name}",
            )
        return tuple(self.versions[name].values())

    def entries_of(self, name: str, number: int | None = None) -> list[Entry]:
        """Return the entries about a model, or about one version of it."""
        entries = [entry for entry in self.entries if not isinstance(entry, Began | Collected) and entry.name == name]
        return [entry for entry in entries if number in (None, entry.version)]

    def aliases(self, name: str) -> dict[str, int]:
        """Return the version that each alias of a model refers to."""
        return {alias: stack[-1] for (model, alias), stack in sorted(self.stacks.items()) if model == name and stack}

    def champion(self, name: str, alias: str) -> Version | None:
        """Return the version that an alias refers to, or None."""
        stack = self.stacks.get((name, alias))
        return self.versions[name][stack[-1]] if stack else None

    def before(self, name: str, alias: str) -> Version:
        """Return the version that a rollback of an alias leads to, skipping retired ones. Raises `InputError`."""
        current = self.find(f"{name}@{alias}")
        earlier = (self.versions[name][number] for number in reversed(self.stacks[name, alias][:-1]))
        previous = next((version for version in earlier if not version.retired and version != current), None)
        if previous is None:
            raise InputError(
                f"There is nothing to go back to: {current.reference} is the first that was {alias}.",
                expected=f"a version that was {alias} before, and is not retired",
                hint=f"promote another: compress registry promote {name}@VERSION --as {alias}",
            )
        return previous

    def find(self, reference: str) -> Version:
        """Return the version of a reference: `reviews@12`, `reviews@champion` or `reviews@latest`.

        Raises `InputError`, which names the closest match.
        """
        name, at, which = reference.partition("@")
        if not at or not which:
            raise InputError(
                f"{reference!r} names no version.",
                expected=f"NAME@NUMBER or NAME@ALIAS, such as {name}@{CHAMPION}",
            )
        versions, aliases = {version.number: version for version in self.of(name)}, self.aliases(name)
        if which.isascii() and which.isdigit():
            if int(which) not in versions:
                raise InputError(f"There is no version {which} of {name}.", expected=f"1 to {max(versions)}")
            return versions[int(which)]
        if which == LATEST:
            return next(
                (version for version in reversed(versions.values()) if not version.retired), versions[max(versions)]
            )
        if which not in aliases:
            near = did_you_mean(which, aliases)
            raise InputError(
                f"No version of {name} is called {which!r}.{near}",
                expected=f"a number from 1 to {max(versions)}, or {_one_of(aliases)}",
                hint=None if near else f"compress registry promote {name}@{max(versions)} --as {which}",
            )
        return versions[aliases[which]]

    def wanted(self, version: Version) -> Version:
        """Return the version if it is not retired. Raises `InputError` otherwise."""
        if version.retired:
            removed = " and its files are gone" if version.collected else ""
            raise InputError(
                f"{version.reference} was retired{removed}.",
                expected="a version that is not retired",
                hint=f"register its run again: compress registry register {version.run} --name {version.name}",
            )
        return version


def _one_of(names: Iterable[str]) -> str:
    """Return names as the expectation of a message."""
    listed = ", ".join(names)
    return f"one of: {listed}" if listed else "none is there yet"
