"""Targets as data: the runtime and device of an artifact, its limits, and the needs of an app."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from compress.utils.environment import processor_class
from compress.utils.errors import InputError

WEB_VERSION = "1.30.0"
Language = Literal["python", "node"]


@dataclass(frozen=True)
class Target:
    """Runtime and device of a session.

    Attributes:
        name: Name in recipes.
        runtime: Name of the runtime.
        provider: The runtime's own name for the device.
        description: Text for lists of targets.
        format: Format that the runtime opens.
    """

    name: str
    runtime: str
    provider: str
    description: str
    format: str


@dataclass(frozen=True)
class TargetProfile:
    """Target with its choices and limits.

    Attributes:
        target: The target itself.
        formats: Formats that may be requested in place of the target's own format.
        threads: Number of threads; None if only the recipe sets it.
        max_bytes: Largest size of the shipped files; None if only the recipe sets it.
        max_memory_bytes: Largest memory; None if only the recipe sets it.
        instead_of: Machine that this one stands in for. Answers come from the same runtime, but times and memory are
            not that machine's.
        downloaded: Whether ``max_bytes`` counts compressed bytes.
        device: Device of the inventory that is timed; set by a recipe.
        processor: Kind of processor on which answers must be right, beside this machine's; set by a recipe.
        options: Fields of the stage that writes the format; set by a recipe.
    """

    target: Target
    formats: tuple[str, ...] = ()
    threads: int | None = None
    max_bytes: int | None = None
    max_memory_bytes: int | None = None
    instead_of: str | None = None
    downloaded: bool = False
    device: str | None = None
    processor: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the target."""
        return self.target.name

    @property
    def allowed(self) -> tuple[str, ...]:
        """Formats that may be requested for the target, the default first."""
        return tuple(dict.fromkeys((self.target.format, *self.formats)))


@dataclass(frozen=True)
class App:
    """Runtime of a format in an app: ``runtime`` and its ``package`` are the platform's own names."""

    runtime: str
    package: str
    languages: tuple[Language, ...] = ("python",)
    """Languages of the examples in a bundle."""


@dataclass(frozen=True, kw_only=True)
class AppProfile(TargetProfile):
    """Target that `compress bundle` accepts, with the runtime of each format that a bundle may contain.

    ``version`` is the version of the bundled runtime; None if the app has its own runtime.
    """

    apps: Mapping[str, App] = field(default_factory=dict)
    version: str | None = None


def describe_limits(profile: TargetProfile) -> list[str]:
    """Return the limits of a profile as text for people."""
    limits = ((profile.max_bytes, "shipped"), (profile.max_memory_bytes, "of memory"))
    return [f"at most {most / 1e6:.6g} MB {what}" for most, what in limits if most is not None]


@dataclass(frozen=True)
class Processor:
    """Kind of processor, as far as it affects 8-bit products.

    ``sums_in_32_bits``: no product of bytes is added to another in 16 bits, where the sum could saturate.
    """

    name: str
    sums_in_32_bits: bool
    description: str


_KINDS = (
    Processor("x86-avx2", False, "x86-64 without VNNI: Intel before Ice Lake and Cascade Lake, AMD before Zen 4"),
    Processor("x86-vnni", True, "x86-64 with AVX512-VNNI, AVX-VNNI or AMX"),
    Processor("arm64-dotprod", True, "64-bit ARM with dot products of bytes: most since 2018"),
    Processor("arm64", True, "64-bit ARM without them"),
    Processor("linux-arm64", True, "the same, under the name that it has as a target"),
)
PROCESSORS: dict[str, Processor] = {processor.name: processor for processor in _KINDS}


def find_processor(name: str) -> Processor:
    """Return the processor kind of that name, or this machine's for `cpu`.

    Raises:
        InputError: The name is unknown; the message lists the known names.
    """
    if name in PROCESSORS:
        return PROCESSORS[name]
    if name != "cpu":
        raise InputError(f"There is no processor {name!r}.", expected=f"one of cpu, {', '.join(PROCESSORS)}")
    local_class = processor_class()
    processor = PROCESSORS.get(local_class)
    return Processor("cpu", processor is None or processor.sums_in_32_bits, f"this machine's: {local_class}")
