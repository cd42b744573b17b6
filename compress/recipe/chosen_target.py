"""An entry of a recipe's targets that is more than a name: one of the table with changes, or one of the user's own.

In YAML it is `{NAME: {FIELD: VALUE}}`. Fields that are none of the target's go to the stage that writes its format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from compress.formats.registry import DEFAULT, FORMATS, Format
from compress.formats.target_profile import Profile, Target
from compress.formats.targets import PROFILES, in_format
from compress.stages.base import Stage
from compress.stages.registry import STAGES
from compress.utils.pydantic_models import Frozen

ProcessorClass = Literal["x86-avx2", "x86-vnni", "arm64-dotprod", "arm64"]
"""As `compress.utils.environment.processor_class` tells them apart."""


class TargetFields(Frozen):
    """What a recipe, or a file of its own, may say of a target."""

    description: str | None = Field(None, description="one line on the machine, for a target of one's own")
    format: Format | None = Field(None, description="of the files: one that the target allows; default: its first")
    runtime: str | None = Field(
        None, description="of a target of one's own: what judges it here, as `compress targets` names runtimes"
    )
    threads: int | None = Field(None, ge=1, description="of the runtime; default: the target's, or `benchmark.threads`")
    max_bytes: int | None = Field(
        None, ge=1, description="size budget: model and runtime together, compressed where the target is downloaded"
    )
    max_memory_bytes: int | None = Field(None, ge=1, description="limit on the measured peak memory at batch 1")
    device: str | None = Field(
        None, description="of a target of one's own: the device in devices.yaml whose latency is measured, over SSH"
    )
    processor: ProcessorClass | None = Field(
        None,
        description="the oldest kind of processor that answers have to be right on, beside this machine's: 8-bit "
        "products of x86-avx2 may saturate, which `reduce_range: auto` of the stages `quantize` and `qat` avoids",
    )


class ChosenTarget(TargetFields):
    """`TargetFields` of the target ``name``; ``options`` are fields of the stage that writes its format."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="of the target")
    options: dict[str, Any] = Field({}, description="fields of the stage that writes the format")

    @model_validator(mode="after")
    def _known(self) -> ChosenTarget:
        unsafe_member_reason = objection_to(self.name, self)
        if unsafe_member_reason is not None:
            field, _, expected = unsafe_member_reason
            raise ValueError(f"{field or 'name'}: {expected}")
        if self.options and FORMATS[form_of(self.name, self)].written_by is None:
            raise ValueError(f"{next(iter(self.options))}: no such field; no stage writes the format")
        try:
            writer(form_of(self.name, self), self.options)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        return self

    def profile(self) -> Profile:
        """The row of the table with these changes, or a row of the user's own."""
        form = form_of(self.name, self)
        if self.runtime is None:
            profile = in_format(PROFILES[self.name], form)
        else:
            about = self.description or f"{self.runtime} as the recipe describes it"
            target = Target(self.name, self.runtime, FORMATS[form].runtimes[self.runtime].provider, about, form)
            profile = Profile(target, instead_of=self.name)
        given = ("threads", "max_bytes", "max_memory_bytes", "processor")
        changes = {name: getattr(self, name) for name in given if getattr(self, name) is not None}
        return replace(profile, **changes, device=self.device, options=self.options)

    def as_entry(self) -> dict[str, dict[str, Any]]:
        """As a recipe writes it."""
        fields = self.model_dump(exclude={"name", "options"}, exclude_none=True)
        return {self.name: {**fields, **self.options}}


OWN_FIELDS = tuple(TargetFields.model_fields)
DESCRIBING = ("description", "runtime", "device")
"""Fields of a target of one's own alone."""


def from_entry(entry: Any) -> Any:
    """`{NAME: {...}}` as the fields of a `ChosenTarget`; anything else as it is."""
    if not isinstance(entry, dict) or len(entry) != 1:
        return entry
    ((name, fields),) = entry.items()
    if not isinstance(fields, dict):
        return entry
    own = {field: value for field, value in fields.items() if field in OWN_FIELDS}
    return {"name": name, **own, "options": {key: value for key, value in fields.items() if key not in own}}


def profile_of(entry: str | ChosenTarget) -> Profile:
    """The row that an entry of a recipe's targets stands for."""
    return PROFILES[entry] if isinstance(entry, str) else entry.profile()


def form_of(name: str, fields: TargetFields) -> Format:
    """The format of a target's files."""
    return fields.format or (PROFILES[name].target.format if name in PROFILES else DEFAULT)


def writer(form: Format, options: Mapping[str, Any]) -> Stage[Any, Any] | None:
    """The stage that writes a format, with these of its fields; None where none has to. Raises `ValidationError`."""
    kind = FORMATS[form].written_by
    return None if kind is None else STAGES[kind].model_validate({"kind": kind, **options})


def objection_to(name: str, fields: TargetFields) -> tuple[str | None, str, str] | None:
    """What can't be said of a target: the field, or None for its name; what was found; what was expected."""
    if name not in PROFILES and fields.runtime is None:
        expected = f"one of {', '.join(PROFILES)}; or a target of your own, with a format and a runtime"
        return None, repr(name), expected
    if name in PROFILES:
        allowed = PROFILES[name].allowed
        if fields.format not in (None, *allowed):
            return "format", repr(fields.format), f"one of {', '.join(allowed)}, which {name} runs"
        for field in DESCRIBING:
            if (value := getattr(fields, field)) is not None:
                return field, repr(value), f"nothing: {name} has its own; a target of your own needs another name"
        return None
    form = form_of(name, fields)
    runtimes = FORMATS[form].runtimes
    if fields.runtime is None or fields.runtime not in runtimes:
        return "runtime", repr(fields.runtime), f"one of {', '.join(runtimes)}, which open {form}"
    if fields.device is not None and not runtimes[fields.runtime].on_devices:
        every = [(other, *named) for other, spec in FORMATS.items() for named in spec.runtimes.items()]
        timed = [f"{runtime}, on {other.upper()} files" for other, runtime, one in every if one.on_devices]
        return "device", repr(fields.device), f"nothing: devices are measured with {' or '.join(timed)}"
    return None
