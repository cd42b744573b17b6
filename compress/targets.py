"""Targets as data: where an artifact is meant to run, what judges it there, and what an app needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

from compress.environment import processor_class
from compress.errors import InputError

if TYPE_CHECKING:
    from compress.formats.model_file import Format

WEB_VERSION = "1.30.0"
Language = Literal["python", "node", "kotlin", "swift"]


@dataclass(frozen=True)
class Target:
    """What a session is told. ``provider`` is the runtime's own name for the device, ``format`` what it opens."""

    name: str
    runtime: str
    provider: str
    description: str
    format: Format = "onnx"


@dataclass(frozen=True)
class Profile:
    """A row of the table: a target, what may be chosen of it, and its limits.

    ``formats`` are those that may be asked for in place of the target's own, which comes first. ``threads`` and the
    limits are None where the recipe alone says them. ``instead_of`` names the machine that this one is measured in the
    place of: answers are those of the same runtime, times and memory are not that machine's. What is
    ``downloaded`` counts compressed in ``max_bytes``. A recipe adds a ``device`` of the inventory to be
    timed on, the kind of ``processor`` that answers have to be right on beside this machine's, and ``options``: fields
    of the stage that writes the format.
    """

    target: Target
    formats: tuple[Format, ...] = ()
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
        """The target's name."""
        return self.target.name

    @property
    def allowed(self) -> tuple[Format, ...]:
        """The formats that may be asked for; the first is the default."""
        return tuple(dict.fromkeys((self.target.format, *self.formats)))

    def in_format(self, form: Format) -> Profile:
        """The same with files of that format, through the runtime that opens them."""
        if form == self.target.format:
            return self
        runtime, provider = next(iter(OPENED_BY[form].items()))
        if self.target.runtime in OPENED_BY[form]:
            runtime, provider = self.target.runtime, self.target.provider
        return replace(self, target=replace(self.target, format=form, runtime=runtime, provider=provider))


@dataclass(frozen=True)
class App:
    """What runs a format in an app: ``runtime`` and its ``package`` are the platform's own names."""

    runtime: str
    package: str
    languages: tuple[Language, ...]
    """Of the examples that a bundle has."""


@dataclass(frozen=True, kw_only=True)
class AppProfile(Profile):
    """A row that `compress bundle` takes, with what runs each format that a bundle for it may have.

    ``version`` is that of the runtime that lies in the bundle; None where the app brings its own.
    """

    apps: Mapping[Format, App]
    version: str | None = None


def _app(runtime: str, package: str, *languages: Language) -> App:
    """With an example in Python too, which any computer runs."""
    return App(runtime, package, (*languages, "python"))


def _onnx(app: App) -> Mapping[Format, App]:
    return {"onnx": app, "ort": app}


_CPU = "CPUExecutionProvider"
OPENED_BY: Mapping[Format, Mapping[str, str]] = {
    "onnx": {
        "onnxruntime": _CPU,
        "onnxruntime-web": "wasm",
        "onnxruntime-web-node": "wasm",
        "onnxruntime-genai": "cpu",
    },
    "ort": {"onnxruntime": _CPU, "onnxruntime-web": "wasm", "onnxruntime-web-node": "wasm"},
    "openvino": {"openvino": "CPU"},
    "executorch": {"executorch": "XnnpackBackend"},
    "litert": {"litert": "CPU"},
    "coreml": {"coreml": "CPU_ONLY"},
    "gguf": {"llama-cpp": "cpu"},
}
"""The runtimes that open a format, each with its own name for the processor; the first where nothing else is said."""

_PYTHON: Mapping[Format, App] = {
    **_onnx(_app("onnxruntime", "PyPI: onnxruntime")),
    "litert": _app("ai-edge-litert", "PyPI: ai-edge-litert"),
    "executorch": _app("executorch", "PyPI: executorch"),
}
PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(Target("cpu", "onnxruntime", _CPU, "ONNX Runtime on this machine's processor")),
        Profile(Target("gpu", "onnxruntime", "CUDAExecutionProvider", "ONNX Runtime on an NVIDIA GPU")),
        Profile(Target("ort", "onnxruntime", _CPU, "ONNX Runtime's format for phones, run here", "ort")),
        Profile(Target("genai", "onnxruntime-genai", "cpu", "onnxruntime-genai on this machine's processor")),
        Profile(Target("openvino", "openvino", "CPU", "OpenVINO on this machine's processor", "openvino")),
        Profile(
            Target("node", "onnxruntime-web-node", "wasm", "the browser's WebAssembly in Node"), ("ort",), threads=1
        ),
        Profile(Target("browser-webgpu", "onnxruntime-web", "webgpu", "the page on a graphics card"), threads=1),
        Profile(
            Target("executorch", "executorch", "XnnpackBackend", "ExecuTorch on this machine's processor", "executorch")
        ),
        Profile(Target("litert", "litert", "CPU", "LiteRT on this machine's processor, through XNNPACK", "litert")),
        Profile(
            Target("coreml", "coreml", "CPU_ONLY", "Core ML on this Mac; elsewhere its package is weighed", "coreml")
        ),
        Profile(Target("llama-cpp", "llama-cpp", "cpu", "llama.cpp on this machine's processor", "gguf")),
        AppProfile(
            Target("browser", "onnxruntime-web", "wasm", "a web page that answers by itself, as WebAssembly"),
            formats=("ort",),
            threads=1,
            downloaded=True,
            apps={"onnx": App("onnxruntime-web", "npm: onnxruntime-web", ("node",))},
            version=WEB_VERSION,
        ),
        AppProfile(
            Target("android", "onnxruntime", _CPU, "an Android app"),
            formats=("ort", "litert", "executorch"),
            instead_of="an Android phone",
            downloaded=True,
            apps={
                **_onnx(_app("onnxruntime-android", "Maven: com.microsoft.onnxruntime:onnxruntime-android", "kotlin")),
                "litert": _app("litert", "Maven: com.google.ai.edge.litert:litert", "kotlin"),
                "executorch": _app("executorch-android", "Maven: org.pytorch:executorch-android", "kotlin"),
            },
        ),
        AppProfile(
            Target("ios", "onnxruntime", _CPU, "an iOS app"),
            formats=("ort", "executorch", "coreml"),
            instead_of="an iPhone",
            downloaded=True,
            apps={
                **_onnx(
                    _app(
                        "onnxruntime-swift-package-manager",
                        "Swift: microsoft/onnxruntime-swift-package-manager",
                        "swift",
                    )
                ),
                "executorch": _app("executorch", "Swift: pytorch/executorch", "swift"),
                "coreml": App("Core ML", "Core ML: iOS", ("swift",)),
            },
        ),
        AppProfile(
            Target("linux-arm64", "onnxruntime", _CPU, "a small board with Python"),
            formats=("ort", "litert", "executorch"),
            instead_of="a 64-bit ARM board",
            apps=_PYTHON,
        ),
        AppProfile(
            Target("desktop", "onnxruntime", _CPU, "a computer with Python"),
            formats=("ort", "openvino", "litert", "executorch", "gguf"),
            apps=_PYTHON,
        ),
    )
}
"""Every target. To add one, or a format to one, is to add it here; a runtime is one of those
in `compress.formats.runtimes`."""
TARGETS: dict[str, Target] = {name: profile.target for name, profile in PROFILES.items()}


def limit_words(profile: Profile) -> list[str]:
    """Its limits, as a person reads them."""
    limits = ((profile.max_bytes, "shipped"), (profile.max_memory_bytes, "of memory"))
    return [f"at most {most / 1e6:.6g} MB {what}" for most, what in limits if most is not None]


def find_profile(name: str) -> Profile:
    """The row of that name. Raises `InputError` with the known names and the nearest."""
    if name not in PROFILES:
        near = get_close_matches(name, PROFILES, 1)
        hint = f"did you mean {near[0]!r}?" if near else None
        raise InputError(f"There is no target {name!r}.", expected=f"one of {', '.join(PROFILES)}", mend=hint)
    return PROFILES[name]


def find_target(name: str) -> Target:
    """The target of that name. Raises what `find_profile` raises."""
    return find_profile(name).target


def find_app_profile(name: str) -> AppProfile:
    """The row of that name. Raises `InputError` where there is none, or one that no app is bundled for."""
    profile = find_profile(name)
    if not isinstance(profile, AppProfile):
        bundled = [other.name for other in PROFILES.values() if isinstance(other, AppProfile)]
        raise InputError(f"There are no bundles for the target {name!r}.", expected=f"one of {', '.join(bundled)}")
    return profile


@dataclass(frozen=True)
class Processor:
    """A kind of processor, as far as it bears on what 8-bit products give.

    ``sums_in_32_bits``: no product of bytes is added to another in 16 bits, where it could saturate.
    """

    name: str
    sums_in_32_bits: bool
    description: str


LINUX_ARM = "linux-arm64"
"""As a target it is a board with that processor; as a processor, what `compress doctor --target` asks about."""
PROCESSORS: dict[str, Processor] = {
    processor.name: processor
    for processor in (
        Processor("x86-avx2", False, "x86-64 without VNNI: Intel before Ice Lake and Cascade Lake, AMD before Zen 4"),
        Processor("x86-vnni", True, "x86-64 with AVX512-VNNI, AVX-VNNI or AMX"),
        Processor("arm64-dotprod", True, "64-bit ARM with dot products of bytes: most since 2018"),
        Processor("arm64", True, "64-bit ARM without them"),
        Processor(LINUX_ARM, True, "the same under Linux: where qemu-aarch64 is, its answers are compared with ours"),
    )
}


def find_processor(name: str) -> Processor:
    """That kind of processor, or for `cpu` this machine's. Raises `InputError` with the known names."""
    if name in PROCESSORS:
        return PROCESSORS[name]
    if name != "cpu":
        raise InputError(f"There is no processor {name!r}.", expected=f"one of cpu, {', '.join(PROCESSORS)}")
    here = processor_class()
    known = PROCESSORS.get(here)
    return Processor("cpu", known is None or known.sums_in_32_bits, f"this machine's: {here}")


def sum_in_32_bits(profiles: Iterable[Profile]) -> bool:
    """Whether pairs of 8-bit products saturate neither here, where answers are judged, nor on a target's processor."""
    named = {profile.processor for profile in profiles if profile.processor is not None}
    return all(find_processor(name).sums_in_32_bits for name in ("cpu", *named))
