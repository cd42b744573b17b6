"""Plug-ins: the declaration of one (`PluginSpec`) and the discovery of those that are installed.

A plug-in is a package with a `PluginSpec` called ``SPEC``. Every folder beside this file is one. Other distributions
register theirs under the entry point group ``compress.plugins``, and single objects under ``compress.stages``,
``compress.tasks``, ``compress.formats`` and ``compress.samples``. A spec holds names, help texts and references in the
form ``"module:attribute"``, so that discovery imports no code of a plug-in. A plug-in that cannot be used is left out
and recorded as a `PluginProblem`; everything else works.

The core imports this module and no plug-in. This module imports the standard library alone, because the plug-in for
devices sends it to other machines, on which nothing else is installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from itertools import chain
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Literal, NamedTuple, TypeVar

Loaded = TypeVar("Loaded")
API_VERSION = 1
"""Version of `PluginSpec`. It rises when a plug-in that was written for the previous version no longer works."""
CATALOGUE = Path(__file__).with_name("catalogue.json")
"""Names of everything that the project's own plug-ins register, including plug-ins that are not installed."""
_ENTRY_POINTS = "compress.plugins"


@dataclass(frozen=True)
class Command:
    """Command of the command line.

    Attributes:
        reference: ``"module:attribute"`` of a function or a `typer.Typer`.
        help: Line of the command in `compress --help`.
        example: Command line that the command's own help shows.
        panel: Title of the panel of `compress --help`. The core has Start, Inspect, Compare, Ship and Operate.
        hidden: Whether `compress --help` leaves the command out, as for the former name of a command.
        isolation: Whether the command has a child process with limits, for one that only reads the files of models
            ("read") or also runs models ("run").
    """

    reference: str
    help: str
    example: str = ""
    panel: str = "Commands of plug-ins"
    hidden: bool = False
    isolation: Literal["read", "run"] | None = None


def _extension_point() -> Any:
    return field(default_factory=dict, metadata={"extension_point": True})


@dataclass(frozen=True)
class PluginSpec:
    """Declaration of a plug-in. The mappings lead from a name to a reference ``"module:attribute"``.

    Attributes:
        name: Name of the plug-in, the same as its folder in `compress/plugins`.
        summary: One sentence for `compress doctor` and messages.
        install: Command that installs the plug-in.
        api_version: `API_VERSION` that the plug-in was written for.
        requires: Names of the plug-ins that this one imports. It is disabled if one of them is missing.
        commands: Commands of the command line.
        stages: Subclasses of `compress.stages.base.Stage`, by kind.
        tasks: Objects with the interface of `compress.tasks.task.Task`, by name.
        formats: Objects of `compress.formats.spec.FormatSpec`, by name.
        samples: Samples for recipes and tests.
        hosts: Functions with the signature of `compress.benchmark.restarts.HostFinder`, which open other machines.
        run_finished: Functions that receive a `compress.pipeline.run.FinishedRun` after its report is written.
        verifiers: Objects of `compress.cli.verify.Verifier`, for `compress verify`.
        doctor_checks: Functions without parameters that return findings for `compress doctor`.
        metrics: Sequences of `compress.results.metrics.Metric`, rows of the metrics table.
        image_generation: Functions for models that generate images, by the names of
            `compress.models.pipeline_folder.HOOKS`.
        bundled_formats: Objects of `BundledFormat` of the plug-in apps, by the name of the format.
        functions: Functions of the Python API, by their name in `compress`, such as `search`.
    """

    name: str
    summary: str
    install: str = "reinstall compress; its folder compress/plugins lacks this plug-in"
    api_version: int = API_VERSION
    requires: tuple[str, ...] = ()
    commands: Mapping[str, Command] = field(default_factory=dict)
    stages: Mapping[str, str] = _extension_point()
    tasks: Mapping[str, str] = _extension_point()
    formats: Mapping[str, str] = _extension_point()
    samples: Mapping[str, str] = _extension_point()
    hosts: Mapping[str, str] = _extension_point()
    run_finished: Mapping[str, str] = _extension_point()
    verifiers: Mapping[str, str] = _extension_point()
    doctor_checks: Mapping[str, str] = _extension_point()
    metrics: Mapping[str, str] = _extension_point()
    image_generation: Mapping[str, str] = _extension_point()
    bundled_formats: Mapping[str, str] = _extension_point()
    functions: Mapping[str, str] = _extension_point()


EXTENSION_POINTS = tuple(spec.name for spec in fields(PluginSpec) if spec.metadata.get("extension_point"))
"""Fields of `PluginSpec` that register objects."""


@dataclass(frozen=True)
class Extension:
    """Object that a plug-in or an entry point registers; it is imported by `load`."""

    point: str
    name: str
    provider: str
    reference: str

    def load(self) -> Any:
        """Import and return the object. Raises whatever the import raises."""
        return EntryPoint(self.name, self.reference, self.point).load()


@dataclass(frozen=True)
class PluginProblem:
    """Plug-in, or object of one, that was left out.

    Attributes:
        point: Extension point, or "plugins" for a whole plug-in and "commands" for a command.
        name: Name that was to be registered.
        provider: "the plug-in NAME" or "the package NAME VERSION" that registers it.
        reason: Why it was left out.
    """

    point: str
    name: str
    provider: str
    reason: str

    def __str__(self) -> str:
        kind = {"plugins": "plug-in"}.get(self.point, self.point.removesuffix("s").replace("_", " "))
        provider = "" if self.provider == f"the plug-in {self.name}" else f" of {self.provider}"
        return f"The {kind} {self.name!r}{provider} is left out: {self.reason}"


class UnusablePluginError(Exception):
    """Registered object that lacks something; the message states what is missing and what was expected."""


class _Discovered(NamedTuple):
    spec: PluginSpec
    provider: str


_problems: dict[tuple[str, str, str], PluginProblem] = {}


def plugin_problems() -> tuple[PluginProblem, ...]:
    """Return everything that was left out so far. A registry adds its own problems when it is first imported."""
    _discover()
    order = ("plugins", "commands", *EXTENSION_POINTS)
    return tuple(sorted(_problems.values(), key=lambda it: (order.index(it.point), it.provider, it.name)))


def installed_plugins() -> Mapping[str, PluginSpec]:
    """Return the specs of all usable plug-ins by name, those of this folder first."""
    return {name: plugin.spec for name, plugin in _discover().items()}


def find_commands(reserved: Collection[str]) -> dict[str, Command]:
    """Return the commands of all plug-ins by name. A name that is ``reserved`` or registered before is left out."""
    commands: dict[str, Command] = {}
    owners: dict[str, str] = {}
    for plugin in _discover().values():
        for name, command in plugin.spec.commands.items():
            if name in reserved:
                _record("commands", name, plugin.provider, "compress has a command of this name; choose another one")
            elif name in commands:
                reason = f"{owners[name]} registers a command of this name; uninstall one of the two"
                _record("commands", name, plugin.provider, reason)
            else:
                commands[name], owners[name] = command, plugin.provider
    return commands


def find_extensions(point: str, reserved: Iterable[str] = ()) -> dict[str, Extension]:
    """Return what plug-ins and entry points register at an extension point, by name. Nothing is imported.

    Args:
        point: One of `EXTENSION_POINTS`.
        reserved: Names that the core uses; they are recorded as a problem and left out, like names registered twice.
    """
    extensions: dict[str, Extension] = {}
    core_names = set(reserved)
    for extension in _registered(point):
        if _is_free(extension, extension.name, core_names, extensions):
            extensions[extension.name] = extension
    return extensions


def load_extension(extension: Extension, accept: Callable[[Any], Loaded]) -> Loaded | None:
    """Import an extension and return what ``accept`` makes of it; record a problem and return None if that fails.

    ``accept`` raises `UnusablePluginError` for an object that lacks something.
    """
    try:
        return accept(extension.load())
    except UnusablePluginError as error:
        _record(extension.point, extension.name, extension.provider, str(error))
    except Exception as error:  # noqa: BLE001  # the module of another author may raise anything while it is imported
        reason = f"it cannot be imported: {type(error).__name__}: {error}"
        _record(extension.point, extension.name, extension.provider, reason)
    return None


def load_extensions(
    point: str, reserved: Iterable[str], accept: Callable[[Any], Loaded], name_of: Callable[[Loaded], str]
) -> dict[str, Loaded]:
    """Import all usable extensions of a point and return them by the name that the object itself has.

    Args:
        point: One of `EXTENSION_POINTS`.
        reserved: Names that the core uses.
        accept: Checks and converts an imported object, as in `load_extension`.
        name_of: Returns the object's own name, which counts even if it is registered under another one.
    """
    core_names, extensions, loaded = set(reserved), dict[str, Extension](), dict[str, Loaded]()
    for extension in _registered(point):
        value = load_extension(extension, accept)
        if value is not None and _is_free(extension, name := name_of(value), core_names, extensions):
            extensions[name], loaded[name] = extension, value
    return loaded


def load_all() -> None:
    """Import everything that plug-ins register, so that `plugin_problems` names all that cannot be used."""
    commands = (
        Extension("commands", name, plugin.provider, command.reference)
        for plugin in _discover().values()
        for name, command in plugin.spec.commands.items()
    )
    for extension in chain(commands, *map(_registered, EXTENSION_POINTS)):
        load_extension(extension, lambda value: value)


def explain_missing(point: str, name: str) -> str | None:
    """Return which plug-in provides a name that is unknown here, why it is unavailable, and how to install it.

    Args:
        point: "commands" or one of `EXTENSION_POINTS`.
        name: Name that a recipe or a command line contains.

    Returns:
        Phrase such as "the plug-in diffusion, which provides 'x' and is not installed; pip install ...", or None if no
        plug-in of the catalogue provides the name and no problem was recorded for it.
    """
    plugins = _discover()
    catalogue = json.loads(CATALOGUE.read_text(encoding="utf-8"))
    plugin = catalogue.get(point, {}).get(name)
    for problem in _problems.values():
        if (problem.point, problem.name) in ((point, name), ("plugins", plugin)):
            return f"{problem.provider}, which provides {name!r} and cannot be used: {problem.reason}"
    if plugin is None or plugin in plugins:
        return None
    install = catalogue["plugins"][plugin]["install"]
    return f"the plug-in {plugin}, which provides {name!r} and is not installed; {install}"


def read_specs() -> dict[str, PluginSpec]:
    """Return the specs of this folder that can be imported, usable or not, by name."""
    return {name: spec for name, _, spec in _own_specs() if isinstance(spec, PluginSpec)}


@cache
def _discover() -> Mapping[str, _Discovered]:
    candidates: dict[str, _Discovered] = {}
    others = ((entry.name, package, _spec_of(entry)) for package, _, entry in _entry_points(_ENTRY_POINTS))
    for name, provider, value in (*_own_specs(), *others):
        reason = None
        if isinstance(value, Exception):
            reason = f"it cannot be imported: {type(value).__name__}: {value}"
        elif not isinstance(value, PluginSpec):
            reason = f"its SPEC is a {type(value).__name__}; expected a PluginSpec"
        elif value.api_version != API_VERSION:
            reason = f"it is written for version {value.api_version} of the plug-in interface; expected {API_VERSION}"
        elif value.name in candidates:
            reason = f"{candidates[value.name].provider} has a plug-in of this name; uninstall one of the two"
        if reason is not None:
            _record("plugins", name, provider, reason)
        else:
            candidates[value.name] = _Discovered(value, provider)
    # A plug-in that is disabled here may be required by another one, so this repeats until nothing changes.
    while disabled := {
        name: missing
        for name, plugin in candidates.items()
        if (missing := [other for other in plugin.spec.requires if other not in candidates])
    }:
        for name, missing in disabled.items():
            reason = f"it requires the plug-in {missing[0]}, which is missing or cannot be used"
            _record("plugins", name, candidates.pop(name).provider, reason)
    return candidates


def _own_specs() -> Iterator[tuple[str, str, Any]]:
    for module in iter_modules([str(Path(__file__).parent)]):
        if module.ispkg:
            entry = EntryPoint(module.name, f"{__name__}.{module.name}:SPEC", _ENTRY_POINTS)
            yield module.name, f"the plug-in {module.name}", _spec_of(entry)


def _spec_of(entry: EntryPoint) -> Any:
    """Return the imported object, or the error of its import."""
    try:
        return entry.load()
    except Exception as error:  # noqa: BLE001  # the module of another author may raise anything while it is imported
        return error


def _registered(point: str) -> Iterator[Extension]:
    for plugin in _discover().values():
        for name, reference in getattr(plugin.spec, point).items():
            yield Extension(point, name, plugin.provider, reference)
    for package, name, entry in _entry_points(f"compress.{point}"):
        yield Extension(point, name, package, entry.value)


def _entry_points(group: str) -> list[tuple[str, str, EntryPoint]]:
    """Return the entry points of a group, each after its package and name, by which they are sorted."""
    entries = []
    for entry in entry_points(group=group):
        package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.module.partition(".")[0]
        entries.append((f"the package {package}", entry.name, entry))
    return sorted(entries)


def _is_free(extension: Extension, name: str, reserved: set[str], extensions: Mapping[str, Extension]) -> bool:
    if name in reserved:
        reason = "compress has one of this name built in; choose another name"
    elif name in extensions:
        reason = f"{extensions[name].provider} registers the same name; uninstall one of the two"
    else:
        return True
    _record(extension.point, name, extension.provider, reason)
    return False


def _record(point: str, name: str, provider: str, reason: str) -> None:
    _problems[point, provider, name] = PluginProblem(point, name, provider, reason)
