"""Targets of a recipe, with the lines of problems in the recipe and in files that describe custom targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from compress.formats.registry import DEFAULT, FORMATS, Format
from compress.formats.target_profile import Target, TargetProfile
from compress.formats.targets import PROFILES, in_format
from compress.recipe.document import Document, FieldPath, FileKind, describe, read_document
from compress.recipe.validation_errors import expected_names, validate, validate_partly
from compress.stages.base import AnyStage
from compress.stages.registry import STAGES
from compress.utils.errors import RecipeError, nearest_name
from compress.utils.pydantic_models import Frozen

ProcessorClass = Literal["x86-avx2", "x86-vnni", "arm64-dotprod", "arm64"]
"""Kinds of processors, as `processor_class` distinguishes them."""


class TargetFields(Frozen):
    """Fields of a target that a recipe, or a file of its own, may set."""

    description: str | None = Field(None, description="the machine in one line, for a custom target")
    format: Format | None = Field(
        None, description="format of the files: one that the target allows; default: the first one"
    )
    runtime: str | None = Field(
        None,
        description="for a custom target: the runtime that evaluates its files here, as `compress targets` lists them",
    )
    threads: int | None = Field(
        None, ge=1, description="threads of the runtime; default: the target's, or `benchmark.threads`"
    )
    max_bytes: int | None = Field(
        None, ge=1, description="size limit of model and runtime together, compressed if the target is downloaded"
    )
    max_memory_bytes: int | None = Field(None, ge=1, description="limit on the measured peak memory at batch 1")
    device: str | None = Field(
        None, description="for a custom target: the device in devices.yaml that measures latency over SSH"
    )
    processor: ProcessorClass | None = Field(
        None,
        description="oldest processor class that must compute correct results, besides that of this machine: 8-bit "
        "products may saturate on x86-avx2, which `reduce_range: auto` of the INT8 stages avoids",
    )


class ChosenTarget(TargetFields):
    """Target with changed fields; ``options`` are fields of the stage that writes its format."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the target")
    options: dict[str, Any] = Field({}, description="fields of the stage that writes the format")

    @model_validator(mode="after")
    def _known(self) -> ChosenTarget:
        unsafe_member_reason = target_problem(self.name, self)
        if unsafe_member_reason is not None:
            field, _, expected = unsafe_member_reason
            raise ValueError(f"{field or 'name'}: {expected}")
        if self.options and FORMATS[format_of(self.name, self)].written_by is None:
            raise ValueError(f"{next(iter(self.options))}: no such field; no stage writes the format")
        try:
            writer(format_of(self.name, self), self.options)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        return self

    def profile(self) -> TargetProfile:
        """Return the target's profile with these changes, or the profile of a custom target."""
        format_name = format_of(self.name, self)
        if self.runtime is None:
            profile = in_format(PROFILES[self.name], format_name)
        else:
            description = self.description or f"{self.runtime} as the recipe describes it"
            target = Target(
                self.name, self.runtime, FORMATS[format_name].runtimes[self.runtime].provider, description, format_name
            )
            profile = TargetProfile(target, instead_of=self.name)
        fields = ("threads", "max_bytes", "max_memory_bytes", "processor")
        changes = {name: getattr(self, name) for name in fields if getattr(self, name) is not None}
        return replace(profile, **changes, device=self.device, options=self.options)

    def as_entry(self) -> dict[str, dict[str, Any]]:
        """Return the entry as a recipe contains it."""
        fields = self.model_dump(exclude={"name", "options"}, exclude_none=True)
        return {self.name: {**fields, **self.options}}


TARGET_FIELDS = tuple(TargetFields.model_fields)
CUSTOM_TARGET_FIELDS = ("description", "runtime", "device")
"""Fields that only a custom target may have."""


def from_entry(entry: object) -> object:
    """Return `{NAME: {...}}` as fields of a `ChosenTarget`, and any other value unchanged."""
    if not isinstance(entry, dict) or len(entry) != 1:
        return entry
    ((name, fields),) = entry.items()
    if not isinstance(fields, dict):
        return entry
    target_fields = {field: value for field, value in fields.items() if field in TARGET_FIELDS}
    return {
        "name": name,
        **target_fields,
        "options": {key: value for key, value in fields.items() if key not in target_fields},
    }


def profile_of(entry: str | ChosenTarget) -> TargetProfile:
    """Return the profile of a target entry."""
    return PROFILES[entry] if isinstance(entry, str) else entry.profile()


def format_of(name: str, fields: TargetFields) -> Format:
    """Return the format of a target's files."""
    return fields.format or (PROFILES[name].target.format if name in PROFILES else DEFAULT)


def writer(form: Format, options: Mapping[str, object]) -> AnyStage | None:
    """Return the stage that writes a format with these fields, or None if none is needed. Raises `ValidationError`."""
    kind = FORMATS[form].written_by
    return None if kind is None else STAGES[kind].model_validate({"kind": kind, **options})


def target_problem(name: str, fields: TargetFields) -> tuple[str | None, str, str] | None:
    """Return the field (None for the name), the value found and the value expected if a target is invalid, or None."""
    if name not in PROFILES and fields.runtime is None:
        expected = f"one of {', '.join(PROFILES)}; or a target of your own, with a format and a runtime"
        return None, repr(name), expected
    if name in PROFILES:
        allowed = PROFILES[name].allowed
        if fields.format not in (None, *allowed):
            return "format", repr(fields.format), f"one of {', '.join(allowed)}, which {name} runs"
        for field in CUSTOM_TARGET_FIELDS:
            if (value := getattr(fields, field)) is not None:
                return field, repr(value), f"nothing: {name} has its own; a target of your own needs another name"
        return None
    format_name = format_of(name, fields)
    runtimes = FORMATS[format_name].runtimes
    if fields.runtime is None or fields.runtime not in runtimes:
        return "runtime", repr(fields.runtime), f"one of {', '.join(runtimes)}, which open {format_name}"
    if fields.device is not None and not runtimes[fields.runtime].on_devices:
        all_runtimes = [(other, *item) for other, spec in FORMATS.items() for item in spec.runtimes.items()]
        timed_runtimes = [
            f"{runtime}, on {other.upper()} files"
            for other, runtime, spec_runtime in all_runtimes
            if spec_runtime.on_devices
        ]
        return "device", repr(fields.device), f"nothing: devices are measured with {' or '.join(timed_runtimes)}"
    return None


SUFFIXES = (".yaml", ".yml")
_TARGET = FileKind(
    "target",
    "The target",
    "a YAML file that describes a target",
    "a mapping with name, format and runtime, such as `name: pi`, `format: onnx`, `runtime: onnxruntime`, `threads: 4`",
)


def read_targets(document: Document, folder: Path, stages: Sequence[str]) -> tuple[str | ChosenTarget, ...]:
    """Return the valid targets of a document, and record the problems of the others.

    ``folder`` is where target files are looked for; ``stages`` are the kinds of the recipe's own stages.
    """
    entries = document.values.get("targets")
    if not isinstance(entries, list):
        document.problem(("targets",), describe(entries), "a list of targets, e.g. `[cpu, browser]`")
        return ()
    targets: dict[str, str | ChosenTarget] = {}
    for index, entry in enumerate(entries):
        path = ("targets", index)
        target = _target(document, path, entry, folder, stages)
        if target is None:
            continue
        name = target if isinstance(target, str) else target.name
        if name in targets:
            document.problem(path, f"a second {name!r}", "each target once")
        targets.setdefault(name, target)
    return tuple(targets.values())


def read_target_file(path: Path) -> TargetProfile:
    """Return the target that a file describes. Raises `InputError` with every problem: file, line, field."""
    document = Document(str(path), _TARGET)
    target = _from_file(document, (), path, ())
    if target is None:
        raise document.error()
    return target.profile()


def _target(
    document: Document, path: FieldPath, entry: object, folder: Path, stages: Sequence[str]
) -> str | ChosenTarget | None:
    """Return one target entry, or None and record its problems.

    Args:
        document: Receives the problems.
        path: Path of the entry.
        entry: Name, mapping or file.
        folder: Folder of target files.
        stages: Kinds of the recipe's own stages.
    """
    if isinstance(entry, dict) and len(entry) == 1:
        ((name, fields),) = entry.items()
        if fields is None or isinstance(fields, dict):
            return _chosen(document, (*path, name), name, fields or {}, stages)
        document.problem((*path, name), describe(fields), f"the fields of {name} as a mapping")
    elif not isinstance(entry, str):
        document.problem(path, describe(entry), "a target's name, `{NAME: {FIELD: VALUE}}` or a file (.yaml)")
    elif entry.endswith(SUFFIXES):
        return _from_file(document, path, folder / entry, stages)
    elif entry in PROFILES:
        return entry
    else:
        document.problem(path, describe(entry), f"one of {', '.join(PROFILES)}", nearest_name(entry, PROFILES))
    return None


def _from_file(document: Document, path: FieldPath, file: Path, stages: Sequence[str]) -> ChosenTarget | None:
    """Return the target of a file named at ``path``. Its problems keep their own file and line.

    Args:
        document: Receives the problems.
        path: Path of the entry that names the file.
        file: The file.
        stages: Kinds of the recipe's own stages.
    """
    try:
        target_document = read_document(file, _TARGET)
    except RecipeError as error:
        document.problems += error.problems
        document.broken.add(path)
        return None
    fields = dict(target_document.values)
    name = fields.pop("name", None)
    target = None
    if not isinstance(name, str) or name in PROFILES:
        target_document.problem(("name",), describe(name), f"a name that is none of {', '.join(PROFILES)}")
    elif "format" not in fields:
        target_document.problem(("format",), "nothing", f"one of {', '.join(FORMATS)}")
    else:
        format_name = fields["format"]
        runtime = (
            next(iter(FORMATS[format_name].runtimes))
            if isinstance(format_name, str) and format_name in FORMATS
            else None
        )
        target = _chosen(target_document, (), name, {"runtime": runtime, **fields}, stages)
    document.problems += target_document.problems
    document.broken |= {path} if target_document.problems else set()
    return target


def _chosen(
    document: Document, path: FieldPath, name: str, fields: dict[str, Any], stages: Sequence[str]
) -> ChosenTarget | None:
    """Return a target with changed fields, or a custom target.

    Args:
        document: Receives the problems.
        path: Path of the fields.
        name: Name of the target.
        fields: The fields.
        stages: Kinds of the recipe's own stages.
    """
    num_problems = len(document.problems)
    target_fields = {field: value for field, value in fields.items() if field in TARGET_FIELDS}
    options = {field: value for field, value in fields.items() if field not in TARGET_FIELDS}
    validated = (
        validate(TargetFields, target_fields, document, path)
        or validate_partly(TargetFields, target_fields)
        or TargetFields()
    )
    problem = target_problem(name, validated)
    if problem is not None:
        field, description, expected = problem
        suggestion = nearest_name(name, PROFILES) if field is None else None
        document.problem(path if field is None else (*path, field), description, expected, suggestion)
        return None
    kind = FORMATS[format_of(name, validated)].written_by
    _check_options(document, path, kind, options, stages)
    if len(document.problems) > num_problems:
        return None
    return validate(ChosenTarget, {"name": name, **target_fields, "options": options}, document, path)


def _check_options(
    document: Document, path: FieldPath, kind: str | None, options: dict[str, Any], stages: Sequence[str]
) -> None:
    """Check fields of the stage that writes the target's format, unless the recipe has that stage itself.

    Args:
        document: Receives the problems.
        path: Path of the fields.
        kind: The stage that writes the format.
        options: Its fields.
        stages: Kinds of the recipe's own stages.
    """
    names = [name for name in STAGES[kind].model_fields if name != "kind"] if kind else []
    of_stage = f", or of the stage {kind}: {', '.join(names) or 'none'}" if kind else ""
    for field in [field for field in options if field not in names]:
        suggestion = nearest_name(field, (*TARGET_FIELDS, *names))
        expected = f"{expected_names(None, TARGET_FIELDS, 'field')}{of_stage}"
        document.problem((*path, field), "an unknown field", expected, suggestion)
    if kind is None:
        return
    stage_fields = {field: value for field, value in options.items() if field in names}
    if stage_fields and kind in stages:
        stage_path = f"stages.{list(stages).index(kind)}.{kind}"
        document.problem(
            (*path, next(iter(stage_fields))), f"a field of {kind}, a stage of this recipe", f"it at {stage_path}"
        )
    elif stage_fields:
        validate(STAGES[kind], {**stage_fields, "kind": kind}, document, path)
