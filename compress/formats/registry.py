"""Registry of formats: every package in this folder that has a `FORMAT`, and those of other packages.

Other packages register a `FormatSpec` by the entry point `compress.formats`. Importing this module imports no
runtime and no model.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Literal

from compress.formats.spec import FormatSpec, Reference, RuntimeSpec, load
from compress.formats.target_profile import WEB_VERSION, AppProfile, Target
from compress.plugins import UnusablePluginError, load_extensions
from compress.stages.kinds import CORE_STAGES
from compress.utils.errors import InputError

_CPU = "CPUExecutionProvider"
_WEB = Target("browser", "onnxruntime-web", "wasm", "a web page that runs the model itself, as WebAssembly", "onnx")
_ANDROID = Target("android", "onnxruntime", _CPU, "an Android app", "onnx")
_BOARD = Target("linux-arm64", "onnxruntime", _CPU, "a single-board computer with Python", "onnx")
PLATFORMS = (
    AppProfile(_WEB, threads=1, downloaded=True, version=WEB_VERSION),
    AppProfile(_ANDROID, instead_of="an Android phone", downloaded=True),
    AppProfile(Target("ios", "onnxruntime", _CPU, "an iOS app", "onnx"), instead_of="an iPhone", downloaded=True),
    AppProfile(_BOARD, instead_of="a 64-bit ARM board"),
    AppProfile(Target("desktop", "onnxruntime", _CPU, "a computer with Python", "onnx")),
)
"""Platforms that apps are bundled for, each with its default format.

The spec of a format states which platforms accept it, and which runtime runs it there.
"""


def _built_in() -> dict[str, FormatSpec]:
    folders = [package.name for package in iter_modules([str(Path(__file__).parent)]) if package.ispkg]
    # A format's `__init__` contains its spec only, so importing all of them is fast.
    modules = [import_module(f"compress.formats.{name}") for name in folders]
    return {module.FORMAT.name: module.FORMAT for module in modules if hasattr(module, "FORMAT")}


def _third_party() -> dict[str, FormatSpec]:
    accepted = dict(BUILT_IN)

    def accept(candidate: object) -> FormatSpec:
        spec = _require_usable(candidate, list(accepted.values()))
        # `load_extensions` itself leaves out built-in formats.
        return accepted.setdefault(spec.name, spec)

    return load_extensions("formats", BUILT_IN, accept, lambda spec: spec.name)


def _require_usable(candidate: object, others: Sequence[FormatSpec]) -> FormatSpec:
    """Return a plugin's format if it is complete and does not conflict with ``others``.

    Raises:
        UnusablePluginError: The object is no format, is incomplete, or uses a name that is already in use.
    """
    if not isinstance(candidate, FormatSpec):
        raise UnusablePluginError(f"it is a {type(candidate).__name__}; expected a FormatSpec")
    if candidate.name in BUILT_IN:
        return candidate
    _require_unique_names(candidate, others)
    for profile in candidate.targets:
        if profile.target.format != candidate.name or profile.target.runtime not in candidate.runtimes:
            raise UnusablePluginError(f"its target {profile.name} has another format, or a runtime that it lacks")
    if candidate.written_from not in (None, *BUILT_IN):
        sources = ", ".join(BUILT_IN)
        raise UnusablePluginError(f"it is written from {candidate.written_from!r}; expected one of {sources}")
    if not candidate.runtimes:
        raise UnusablePluginError("it has no runtime; expected one at least, which opens its files")
    if candidate.stage is not None:
        _check_stage(candidate, candidate.stage)
    elif candidate.written_by is not None or candidate.own_bits:
        raise UnusablePluginError("it has no stage; expected one, whose kind is `written_by`")
    return candidate


def _require_unique_names(candidate: FormatSpec, others: Sequence[FormatSpec]) -> None:
    """Raise `UnusablePluginError` if a suffix, stage or target of the format is already in use."""
    targets = {profile.name for spec in others for profile in spec.targets} | {profile.name for profile in PLATFORMS}
    stages = {*CORE_STAGES, *(spec.written_by for spec in others if spec.written_by)}
    for kind, used, names in (
        ("suffix", {spec.suffix for spec in others}, [candidate.suffix]),
        ("stage", stages, [candidate.written_by]),
        ("target", targets, [profile.name for profile in candidate.targets]),
    ):
        if conflicts := used.intersection(names):
            raise UnusablePluginError(f"there is another {kind} {conflicts.pop()}; expected a name of its own")


def _check_stage(spec: FormatSpec, reference: Reference) -> None:
    """Raise `UnusablePluginError` if a format's stage does not fit its spec."""
    from compress.stages.base import Stage

    stage = load(reference)
    if not (isinstance(stage, type) and issubclass(stage, Stage)):
        expected = "a subclass of compress.stages.base.Stage"
        raise UnusablePluginError(f"its stage {reference} is no Stage; expected {expected}")
    if abstract := sorted(stage.__abstractmethods__):
        raise UnusablePluginError(f"its stage {reference} lacks {', '.join(abstract)}")
    if (kind := stage.model_fields["kind"].default) != spec.written_by:
        raise UnusablePluginError(f"its stage is of the kind {kind!r}; expected {spec.written_by!r}, as it says")
    if spec.own_bits and "precision" not in stage.model_fields:
        raise UnusablePluginError("it has bits of its own, and its stage lacks the field precision")
    if (kind := getattr(stage.output_type, "kind", None)) != spec.name:
        raise UnusablePluginError(f"its stage gives a model of the kind {kind!r}; expected {spec.name!r}")


BUILT_IN: Mapping[str, FormatSpec] = _built_in()
PLUGGED: Mapping[str, FormatSpec] = _third_party()
FORMATS: Mapping[str, FormatSpec] = {
    spec.name: spec
    for specs in (BUILT_IN, PLUGGED)
    for spec in sorted(specs.values(), key=lambda spec: (spec.rank, spec.name))
}
"""Formats by name; the first is the default."""
DEFAULT = next(iter(FORMATS))
RUNTIMES: Mapping[str, RuntimeSpec] = ChainMap(*(dict(spec.runtimes) for spec in FORMATS.values()))
"""Runtimes by name; a runtime that opens several formats has the spec of the first."""
if TYPE_CHECKING:
    Format = str
else:
    Format = Literal[tuple(FORMATS)]


def part_of(form: str, name: str) -> Any:
    """Return the object that a format refers to as ``name``, or None if it has no such reference.

    Raises:
        InputError: A plugin refers to an object that it does not have.
        ImportError: A package is not installed.
    """
    reference = getattr(FORMATS[form], name)
    if reference is None:
        return None
    try:
        return load(reference)
    except ImportError as error:
        if form in BUILT_IN:
            raise
        hint = "fix or uninstall the package that registers it, as `compress doctor` names it"
        raise InputError(f"The plugin of the format {form!r} lacks {reference}: {error}", hint=hint) from error
