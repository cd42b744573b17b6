"""Where a bundle is meant to run: which runtime the app uses there, and which examples go along."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from compress.errors import InputError
from compress.models.model_file import Format

WEB_VERSION = "1.30.0"
Example = Literal["run.py", "run.mjs", "Classifier.kt", "Classifier.swift"]


@dataclass(frozen=True)
class Profile:
    """``package`` is what the platform's own package manager calls the runtime, ``formats`` what it is tried with.

    ``version`` is that of the runtime that lies in the bundle; None where the app brings its own.
    """

    name: str
    runtime: str
    package: str
    provider: str
    examples: tuple[Example, ...]
    description: str
    version: str | None = None
    formats: tuple[Format, ...] = ("onnx", "ort")


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            *("browser", "onnxruntime-web", "npm: onnxruntime-web", "wasm", ("run.mjs",)),
            "a web page that answers by itself, its runtime (WebAssembly) included",
            WEB_VERSION,
            ("onnx",),
        ),
        Profile(
            *("android", "onnxruntime-android", "Maven: com.microsoft.onnxruntime:onnxruntime-android"),
            *("CPUExecutionProvider", ("Classifier.kt", "run.py")),
            "ONNX Runtime in an Android app",
        ),
        Profile(
            *("ios", "onnxruntime-swift-package-manager", "Swift: microsoft/onnxruntime-swift-package-manager"),
            *("CPUExecutionProvider", ("Classifier.swift", "run.py")),
            "ONNX Runtime in an iOS app",
        ),
        Profile(
            *("linux-arm64", "onnxruntime", "PyPI: onnxruntime", "CPUExecutionProvider", ("run.py",)),
            "a small board with Python",
        ),
        Profile(
            *("desktop", "onnxruntime", "PyPI: onnxruntime", "CPUExecutionProvider", ("run.py",)),
            "a computer with Python",
        ),
    )
}


def find_profile(name: str) -> Profile:
    """The profile of that name. Raises `InputError` with the known names."""
    if name not in PROFILES:
        from difflib import get_close_matches

        near = get_close_matches(name, PROFILES, 1)
        hint = f"did you mean {near[0]!r}?" if near else None
        raise InputError(
            f"There is no target {name!r} to bundle for.", expected=f"one of {', '.join(PROFILES)}", mend=hint
        )
    return PROFILES[name]
