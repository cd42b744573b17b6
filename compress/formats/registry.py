"""The formats: every package in this folder that has a `FORMAT`, and those of other packages.

Others register a `FormatSpec` by the entry point `compress.formats`. Importing this imports no runtime and no model.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Literal

from compress.errors import InputError
from compress.formats.spec import FormatSpec, RuntimeSpec, load
from compress.plugins import FORMATS as GROUP
from compress.plugins import UnusablePluginError, load_plugins


def _built_in() -> dict[str, FormatSpec]:
    folders = [one.name for one in iter_modules([str(Path(__file__).parent)]) if one.ispkg]
    modules = [import_module(f"compress.formats.{name}") for name in folders]
    return {module.FORMAT.name: module.FORMAT for module in modules if hasattr(module, "FORMAT")}


def _accepted(found: Any) -> FormatSpec:
    """A plugin's format, once its stage is one. Raises `UnusablePluginError`."""
    from compress.stage.stage import Stage

    if not isinstance(found, FormatSpec):
        raise UnusablePluginError(f"it is a {type(found).__name__}; expected a FormatSpec")
    if found.name in BUILT_IN:
        return found  # `load_plugins` records that
    clash = next((other for other in BUILT_IN.values() if _clash(found, other)), None)
    if clash is not None:
        raise UnusablePluginError(
            f"its {_clash(found, clash)} is that of the built-in format {clash.name}; expected another"
        )
    stage = load(found.stage)
    if not (isinstance(stage, type) and issubclass(stage, Stage)):
        raise UnusablePluginError(f"its stage {found.stage} is no Stage; expected a subclass of compress.stage.Stage")
    if lacking := sorted(stage.__abstractmethods__):
        raise UnusablePluginError(f"its stage {found.stage} lacks {', '.join(lacking)}")
    if (kind := stage.model_fields["kind"].default) != found.written_by:
        raise UnusablePluginError(f"its stage is of the kind {kind!r}; expected {found.written_by!r}, as it says")
    if found.own_bits and "precision" not in stage.model_fields:
        raise UnusablePluginError("it has bits of its own, and its stage lacks the field precision")
    if (kind := getattr(stage.gives(), "kind", None)) != found.name:
        raise UnusablePluginError(f"its stage gives a model of the kind {kind!r}; expected {found.name!r}")
    if found.written_from not in (None, *BUILT_IN):
        raise UnusablePluginError(f"it is written from {found.written_from!r}; expected one of {', '.join(BUILT_IN)}")
    if found.bundle is None and any(found.taken_by.values()):
        raise UnusablePluginError("apps run it and it has no bundle; expected a BundledFormat")
    if not found.runtimes:
        raise UnusablePluginError("it has no runtime; expected one at least, which opens its files")
    return found


def _clash(one: FormatSpec, other: FormatSpec) -> str | None:
    """What both have of one name that only one may have."""
    targets = {profile.name for profile in other.targets}
    if one.suffix == other.suffix:
        return f"suffix {one.suffix}"
    if one.written_by == other.written_by:
        return f"stage {one.written_by}"
    return next((f"target {profile.name}" for profile in one.targets if profile.name in targets), None)


BUILT_IN: Mapping[str, FormatSpec] = _built_in()
PLUGGED: Mapping[str, FormatSpec] = load_plugins(GROUP, BUILT_IN, _accepted, lambda spec: spec.name)
FORMATS: Mapping[str, FormatSpec] = {
    spec.name: spec
    for some in (BUILT_IN, PLUGGED)
    for spec in sorted(some.values(), key=lambda one: (one.rank, one.name))
}
"""By name; the first is meant where a recipe or a folder says nothing."""
DEFAULT = next(iter(FORMATS))
RUNTIMES: Mapping[str, RuntimeSpec] = ChainMap(*(dict(spec.runtimes) for spec in FORMATS.values()))
"""By name; what opens several formats as the first of them has it."""
if TYPE_CHECKING:
    Format = str
else:
    Format = Literal[tuple(FORMATS)]


def part_of(form: str, name: str) -> Any:
    """What a format refers to as ``name``, or None where it refers to nothing so.

    Raises `InputError` for what a plugin refers to and doesn't have, `ImportError` where a package is not installed.
    """
    reference = getattr(FORMATS[form], name)
    if reference is None:
        return None
    try:
        return load(reference)
    except ImportError as error:
        if form in BUILT_IN:
            raise
        raise InputError(
            f"The plugin of the format {form!r} lacks {reference}: {error}",
            mend="mend or uninstall the package that registers it, as `compress doctor` names it",
        ) from error
