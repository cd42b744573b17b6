"""What other packages add by entry points, and which of it cannot be used.

A package registers a format, a task, a stage or samples under one of `GROUPS`. What does not import, has a name that is
taken or lacks what its group needs is left out and recorded with its package; everything else works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

Loaded = TypeVar("Loaded")
FORMATS, TASKS, STAGES, SAMPLES = GROUPS = (
    "compress.formats",
    "compress.tasks",
    "compress.stages",
    "compress.samples",
)


@dataclass(frozen=True)
class PluginError:
    """A plugin that was left out: ``name`` is what it registers, ``package`` the distribution that does so."""

    group: str
    name: str
    package: str
    reason: str

    def __str__(self) -> str:
        kind = self.group.rpartition(".")[2].removesuffix("s")
        return f"The {kind} {self.name!r} of the package {self.package} is left out: {self.reason}"


class UnusablePluginError(Exception):
    """What a plugin registers lacks something; the message says what, and what was expected."""


_errors: dict[tuple[str, str, str], PluginError] = {}


def plugin_errors() -> tuple[PluginError, ...]:
    """Every plugin that was left out so far, in the order of the groups. A registry records its own once it is read."""
    return tuple(sorted(_errors.values(), key=lambda error: (GROUPS.index(error.group), error.package, error.name)))


def plugins(group: str, built_in: Iterable[str]) -> dict[str, EntryPoint]:
    """The entry points of a group by name; nothing is imported. A name that is taken is recorded and left out."""
    taken, found = set(built_in), dict[str, EntryPoint]()
    for entry in sorted(entry_points(group=group), key=lambda entry: (_package(entry), entry.name)):
        if _is_free(entry, entry.name, taken, found):
            found[entry.name] = entry
    return found


def load_plugin(entry: EntryPoint, accept: Callable[[Any], Loaded]) -> Loaded | None:
    """What ``accept`` makes of the object that an entry point names; ``None``, and recorded, where it can't be used.

    ``accept`` raises `UnusablePluginError` for an object that lacks something.
    """
    try:
        return accept(entry.load())
    except UnusablePluginError as error:
        _record(entry, entry.name, str(error))
    except Exception as error:  # noqa: BLE001  # a module of somebody else's may raise anything while it is imported
        _record(entry, entry.name, f"it cannot be imported: {type(error).__name__}: {error}")
    return None


def load_plugins(
    group: str, built_in: Iterable[str], accept: Callable[[Any], Loaded], name_of: Callable[[Loaded], str]
) -> dict[str, Loaded]:
    """Every plugin of a group that can be used, by the name that it has by itself, whatever its entry point is called.

    ``accept`` is that of `load_plugin`.
    """
    taken, found, loaded = set(built_in), dict[str, EntryPoint](), dict[str, Loaded]()
    for entry in sorted(entry_points(group=group), key=lambda entry: (_package(entry), entry.name)):
        one = load_plugin(entry, accept)
        if one is not None and _is_free(entry, name := name_of(one), taken, found):
            found[name], loaded[name] = entry, one
    return loaded


def _is_free(entry: EntryPoint, name: str, built_in: set[str], found: dict[str, EntryPoint]) -> bool:
    if name in built_in:
        _record(entry, name, "compress has one of that name built in; give it another name")
        return False
    if name in found:
        _record(entry, name, f"the package {_package(found[name])} has one of that name; uninstall one of the two")
        return False
    return True


def _record(entry: EntryPoint, name: str, reason: str) -> None:
    error = PluginError(entry.group, name, _package(entry), reason)
    _errors[error.group, error.package, error.name] = error


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else entry.module.partition(".")[0]
