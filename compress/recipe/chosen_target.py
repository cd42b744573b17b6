"""Target entries of a recipe that are more than a name: a known target with changes, or a custom one.

In YAML such an entry is `{NAME: {FIELD: VALUE}}`. Fields that the target does not have go to the stage that writes
its format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from compress.formats.registry import DEFAULT, FORMATS, Format
from compress.formats.target_profile import Target, TargetProfile
from compress.formats.targets import PROFILES, in_format
from compress.stages.base import Stage
from compress.stages.registry import STAGES
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
        description="the oldest kind of processor that must compute correct results, beside this machine's: 8-bit "
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


def from_entry(entry: Any) -> Any:
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


def writer(form: Format, options: Mapping[str, Any]) -> Stage[Any, Any] | None:
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
