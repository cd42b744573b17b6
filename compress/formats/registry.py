"""The formats: every package in this folder that has a `FORMAT`, and those of other packages.

Others register a `FormatSpec` by the entry point `compress.formats`. Importing this imports no runtime and no model.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Literal

from compress.formats.spec import FormatSpec, Reference, RuntimeSpec, load
from compress.formats.target_profile import WEB_VERSION, AppProfile, Target, TargetProfile
from compress.plugins import UnusablePluginError, load_extensions
from compress.utils.errors import InputError

_CPU = "CPUExecutionProvider"
PLATFORMS = (
    AppProfile(
        Target("browser", "onnxruntime-web", "wasm", "a web page that answers by itself, as WebAssembly", "onnx"),
        threads=1,
        downloaded=True,
        version=WEB_VERSION,
    ),
    AppProfile(
        Target("android", "onnxruntime", _CPU, "an Android app", "onnx"),
        instead_of="an Android phone",
        downloaded=True,
    ),
    AppProfile(Target("ios", "onnxruntime", _CPU, "an iOS app", "onnx"), instead_of="an iPhone", downloaded=True),
    AppProfile(
        Target("linux-arm64", "onnxruntime", _CPU, "a small board with Python", "onnx"),
        instead_of="a 64-bit ARM board",
    ),
    AppProfile(Target("desktop", "onnxruntime", _CPU, "a computer with Python", "onnx")),
)
"""The platforms that apps are bundled for, each with the format that it takes where nothing else is said.

A format's own spec says which platforms take it too, and what runs it there.
"""


def _built_in() -> dict[str, FormatSpec]:
    folders = [one.name for one in iter_modules([str(Path(__file__).parent)]) if one.ispkg]
    modules = [import_module(f"compress.formats.{name}") for name in folders]
    return {module.FORMAT.name: module.FORMAT for module in modules if hasattr(module, "FORMAT")}


def _plugged() -> dict[str, FormatSpec]:
    known = list(BUILT_IN.values())

    def accept(found: Any) -> FormatSpec:
        spec = _checked(found, known)
        if spec.name not in BUILT_IN:  # which `load_extensions` leaves out
            known.append(spec)
        return spec

    return load_extensions("formats", BUILT_IN, accept, lambda spec: spec.name)


def _checked(found: Any, known: Sequence[FormatSpec]) -> FormatSpec:
    """Return a plugin's format if it does not conflict with the ``known`` formats.

    Raises:
        UnusablePluginError: The object is no format, or a name that it uses is already in use.
    """
    if not isinstance(found, FormatSpec):
        raise UnusablePluginError(f"it is a {type(found).__name__}; expected a FormatSpec")
    if found.name in BUILT_IN:
        return found
    for what, taken, own in (
        ("suffix", {one.suffix for one in known}, [found.suffix]),
        ("stage", {*CORE_STAGES, *(one.written_by for one in known if one.written_by)}, [found.written_by]),
        ("target", {one.name for one in (*PLATFORMS, *_targets(known))}, [one.name for one in found.targets]),
    ):
        if twice := taken.intersection(own):
            raise UnusablePluginError(f"there is another {what} {twice.pop()}; expected a name of its own")
    for profile in found.targets:
        if profile.target.format != found.name or profile.target.runtime not in found.runtimes:
            raise UnusablePluginError(f"its target {profile.name} has another format, or a runtime that it lacks")
    if found.written_from not in (None, *BUILT_IN):
        raise UnusablePluginError(f"it is written from {found.written_from!r}; expected one of {', '.join(BUILT_IN)}")
    if not found.runtimes:
        raise UnusablePluginError("it has no runtime; expected one at least, which opens its files")
    if found.stage is not None:
        _check_stage(found, found.stage)
    elif found.written_by is not None or found.own_bits:
        raise UnusablePluginError("it has no stage; expected one, whose kind is `written_by`")
    return found


def _targets(known: Sequence[FormatSpec]) -> list[TargetProfile]:
    return [profile for spec in known for profile in spec.targets]


def _check_stage(found: FormatSpec, reference: Reference) -> None:
    from compress.stages.base import Stage

    stage = load(reference)
    if not (isinstance(stage, type) and issubclass(stage, Stage)):
        raise UnusablePluginError(
            f"its stage {reference} is no Stage; expected a subclass of compress.stages.base.Stage"
        )
    if lacking := sorted(stage.__abstractmethods__):
        raise UnusablePluginError(f"its stage {reference} lacks {', '.join(lacking)}")
    if (kind := stage.model_fields["kind"].default) != found.written_by:
        raise UnusablePluginError(f"its stage is of the kind {kind!r}; expected {found.written_by!r}, as it says")
    if found.own_bits and "precision" not in stage.model_fields:
        raise UnusablePluginError("it has bits of its own, and its stage lacks the field precision")
    if (kind := getattr(stage.output_type(), "kind", None)) != found.name:
        raise UnusablePluginError(f"its stage gives a model of the kind {kind!r}; expected {found.name!r}")


CORE_STAGES = frozenset(
    {
        *("attach_lora", "block_qat", "cast", "compressed_tensors", "distill", "distill_language_model", "equalize"),
        *(
            "finetune",
            "gptq",
            "imatrix",
            "lora_recovery",
            "merge_lora",
            "nncf_weights",
            "onnx_int8",
            "onnx_weight_only",
        ),
        *("prune", "prune_decoder", "qat", "reduce_dimensions", "sparsify", "sparsify_decoder", "sparsify_gradually"),
        *("trim_vocabulary", "tune_scales"),
    }
)
"""Kinds of stages that belong to no format, which a format's stage must not have. Stages cannot be imported here."""
BUILT_IN: Mapping[str, FormatSpec] = _built_in()
PLUGGED: Mapping[str, FormatSpec] = _plugged()
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
        raise InputError(
            f"The plugin of the format {form!r} lacks {reference}: {error}",
            hint="fix or uninstall the package that registers it, as `compress doctor` names it",
        ) from error
