"""What the entries of a registry's log come to: versions, and what each alias stands for and stood for."""

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
    """A version of a model. Its files may be gone once it is ``retired``, and are once it is ``collected``."""

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
        """`reviews@12`."""
        return f"{self.name}@{self.number}"


@dataclass
class State:
    """Grows by one entry after the other."""

    entries: list[Entry] = field(default_factory=list)
    versions: dict[str, dict[int, Version]] = field(default_factory=dict)
    stacks: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    """(model, alias) -> the versions it stood for, the present one last; what was rolled back is off."""

    def apply(self, entry: Entry) -> None:
        """Let an entry, which is the next of the log, have its effect."""
        self.entries.append(entry)
        match entry:
            case Began():
                pass
            case Registered():
                made = Version(
                    *(entry.name, entry.version, entry.record, entry.at, entry.who),
                    *(entry.run, entry.summary, entry.note),
                )
                self.versions.setdefault(entry.name, {})[entry.version] = made
            case Promoted():
                self.stacks.setdefault((entry.name, entry.alias), []).append(entry.version)
            case RolledBack():
                stack = self.stacks[entry.name, entry.alias]
                del stack[max(place for place, number in enumerate(stack) if number == entry.version) + 1 :]
            case Retired():
                versions = self.versions[entry.name]
                versions[entry.version] = replace(versions[entry.version], retired=True)
            case Collected():
                for name, number in entry.versions:
                    self.versions[name][number] = replace(self.versions[name][number], collected=True)
            case _:
                assert_never(entry)

    def all(self) -> Iterator[Version]:
        """Every version, in the order of names and numbers."""
        for name in sorted(self.versions):
            yield from self.of(name)

    def of(self, name: str) -> tuple[Version, ...]:
        """The versions of a model, the oldest first. Raises `InputError` for a model that isn't there."""
        if name not in self.versions:
            near = did_you_mean(name, self.versions)
            raise InputError(
                f"There is no model {name!r} in the registry.{near}",
                expected=_one_of(sorted(self.versions)),
                hint=None if near else f"register a run by that name: compress registry register RUN --name {name}",
            )
        return tuple(self.versions[name].values())

    def entries_of(self, name: str, number: int | None = None) -> list[Entry]:
        """What was done with a model, or with one version of it."""
        own = [entry for entry in self.entries if not isinstance(entry, Began | Collected) and entry.name == name]
        return [entry for entry in own if number in (None, entry.version)]

    def aliases(self, name: str) -> dict[str, int]:
        """Alias -> the version of the model that it stands for."""
        return {alias: stack[-1] for (model, alias), stack in sorted(self.stacks.items()) if model == name and stack}

    def champion(self, name: str, alias: str) -> Version | None:
        """The version that an alias stands for, if it stands for one."""
        stack = self.stacks.get((name, alias))
        return self.versions[name][stack[-1]] if stack else None

    def before(self, name: str, alias: str) -> Version:
        """The version to which an alias goes back, past those that were retired. Raises `InputError`."""
        now = self.find(f"{name}@{alias}")
        earlier = (self.versions[name][number] for number in reversed(self.stacks[name, alias][:-1]))
        found = next((version for version in earlier if not version.retired and version != now), None)
        if found is None:
            raise InputError(
                f"There is nothing to go back to: {now.reference} is the first that was {alias}.",
                expected=f"a version that was {alias} before, and is not retired",
                hint=f"promote another: compress registry promote {name}@VERSION --as {alias}",
            )
        return found

    def find(self, reference: str) -> Version:
        """`reviews@12`, `reviews@champion` or `reviews@latest`. Raises `InputError` that names what comes nearest."""
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
        """The same, unless it is retired. Raises `InputError`."""
        if version.retired:
            gone = " and its files are gone" if version.collected else ""
            raise InputError(
                f"{version.reference} was retired{gone}.",
                expected="a version that is not retired",
                hint=f"register its run again: compress registry register {version.run} --name {version.name}",
            )
        return version


def _one_of(names: Iterable[str]) -> str:
    known = ", ".join(names)
    return f"one of: {known}" if known else "none is there yet"
