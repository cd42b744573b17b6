"""State of a registry after all entries of its log: versions, and the history of every alias."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Annotated, Literal, assert_never, get_args

from pydantic import AfterValidator, Field, TypeAdapter

from compress.utils.errors import InputError, did_you_mean
from compress.utils.pydantic_models import Frozen

VERSION = 1
CHAMPION = "champion"
LATEST = "latest"
"""Reserved alias of the newest version that is not retired."""
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Pattern of the names of models and aliases. An alias, in addition, is not a number."""
DIGEST = r"^[0-9a-f]{64}$"


def _timestamp(text: str) -> str:
    """Return the text if it is a time with an offset from UTC. Raises `ValueError`."""
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("a time without an offset from UTC")
    return text


class _Action(Frozen):
    at: Annotated[str, AfterValidator(_timestamp)] = Field(
        description="ISO 8601, with the offset from UTC; the order of entries is that of the log"
    )
    who: str


class Began(_Action):
    """First line of a log."""

    kind: Literal["began"] = "began"
    version: int = VERSION


class Registered(_Action):
    """New version of a model. ``record`` is the digest of the file that lists its contents."""

    kind: Literal["registered"] = "registered"
    name: str = Field(pattern=NAME_PATTERN)
    version: int = Field(ge=1)
    record: str = Field(pattern=DIGEST)
    run: str = Field(description="folder of the run, as the user named it")
    summary: str = Field("", description="main metrics, shown in lists")
    note: str = ""


class GateOutcome(Frozen):
    """Result of the gate for a version, compared with the version that the alias referred to."""

    against: int | None = Field(description="number of the other version; None for the first version of an alias")
    status: Literal["passed", "warned", "failed", "not compared"]
    failed: tuple[str, ...] = Field((), description="metrics that are worse, or why nothing could be compared")


class Promoted(_Action):
    """Change of an alias to another version."""

    kind: Literal["promoted"] = "promoted"
    name: str
    version: int
    alias: str = Field(pattern=NAME_PATTERN)
    before: int | None
    gate: GateOutcome
    forced: bool = Field(False, description="promoted although the gate or a limit refused it")
    why: str = ""


class RolledBack(_Action):
    """Return of an alias to the version that it referred to before."""

    kind: Literal["rolled back"] = "rolled back"
    name: str
    version: int
    alias: str
    before: int
    why: str = ""


class Retired(_Action):
    """Retirement of a version, whose files `gc` may remove."""

    kind: Literal["retired"] = "retired"
    name: str
    version: int
    why: str = ""


class Signed(_Action):
    """Statement of whoever signed the line that all lines before it are right."""

    kind: Literal["signed"] = "signed"
    why: str = ""


class Collected(_Action):
    """Removal of the files of retired versions."""

    kind: Literal["collected"] = "collected"
    versions: tuple[tuple[str, int], ...]


Action = Began | Registered | Promoted | RolledBack | Retired | Collected | Signed
Entry = Annotated[Action, Field(discriminator="kind")]
ENTRY: TypeAdapter[Entry] = TypeAdapter(Entry)
KINDS = frozenset(action.model_fields["kind"].default for action in get_args(Action))
"""Kinds of the lines of a log."""


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
        """Apply the next entry of the log. Raises `ValueError` for one that does not follow from those before it."""
        self._check(entry)
        self.entries.append(entry)
        match entry:
            case Began() | Signed():
                pass
            case Registered():
                origin = (entry.record, entry.at, entry.who, entry.run)
                version = Version(entry.name, entry.version, *origin, entry.summary, entry.note)
                self.versions.setdefault(entry.name, {})[entry.version] = version
            case Promoted():
                self.stacks.setdefault((entry.name, entry.alias), []).append(entry.version)
            case RolledBack():
                # Drop every version after the last occurrence of the one that the alias returns to.
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

    def _check(self, entry: Entry) -> None:
        """Raise `ValueError` if the entry is about a version or an alias that earlier entries do not have."""
        if isinstance(entry, Began | Signed):
            return
        if isinstance(entry, Registered):
            if entry.version != len(self.versions.get(entry.name, {})) + 1:
                raise ValueError(f"it registers {entry.name}@{entry.version} out of order")
            return
        subjects = entry.versions if isinstance(entry, Collected) else ((entry.name, entry.version),)
        for name, number in subjects:
            if number not in self.versions.get(name, {}):
                raise ValueError(f"it is about {name}@{number}, which was not registered")
        if isinstance(entry, RolledBack) and entry.version not in self.stacks.get((entry.name, entry.alias), ()):
            raise ValueError(f"{entry.name}@{entry.version} was never {entry.alias}")

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
        about = (entry for entry in self.entries if not isinstance(entry, Began | Collected | Signed))
        entries = [entry for entry in about if entry.name == name]
        return [entry for entry in entries if number in (None, entry.version)]

    def aliases(self, name: str) -> dict[str, int]:
        """Return the version that each alias of a model refers to."""
        return {alias: stack[-1] for (model, alias), stack in sorted(self.stacks.items()) if model == name and stack}

    def version_of_alias(self, name: str, alias: str) -> Version | None:
        """Return the version that an alias refers to, or None."""
        stack = self.stacks.get((name, alias))
        return self.versions[name][stack[-1]] if stack else None

    def previous(self, name: str, alias: str) -> Version:
        """Return the version that a rollback of an alias leads to, skipping retired ones. Raises `InputError`."""
        current = self.find(f"{name}@{alias}")
        # A number and `latest` find a version too, but were never promoted.
        if (name, alias) not in self.stacks:
            raise InputError(f"{alias!r} is no alias of {name}.", expected=_one_of(self.aliases(name)))
        # Walk back over the versions that the alias referred to.
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
        name, _, selector = reference.partition("@")
        if not selector:
            raise InputError(
                f"{reference!r} names no version.",
                expected=f"NAME@NUMBER or NAME@ALIAS, such as {name}@{CHAMPION}",
            )
        # Numbers come first, since an alias cannot be a number.
        versions, aliases = {version.number: version for version in self.of(name)}, self.aliases(name)
        if selector.isascii() and selector.isdigit():
            if selector.lstrip("0") not in map(str, versions):
                raise InputError(f"There is no version {selector} of {name}.", expected=f"1 to {max(versions)}")
            return versions[int(selector)]
        if selector == LATEST:
            active = [version for version in versions.values() if not version.retired]
            return active[-1] if active else versions[max(versions)]
        if selector not in aliases:
            near = did_you_mean(selector, aliases)
            raise InputError(
                f"No version of {name} is called {selector!r}.{near}",
                expected=f"a number from 1 to {max(versions)}, or {_one_of(aliases)}",
                hint=None if near else f"compress registry promote {name}@{max(versions)} --as {selector}",
            )
        return versions[aliases[selector]]

    def require_active(self, version: Version) -> Version:
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
    return f"one of: {listed}" if listed else "there is none yet"
