"""The platforms that apps are bundled for, each with the format that it takes where nothing else is said."""

from __future__ import annotations

from compress.targets import WEB_VERSION, AppProfile, Target

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
"""A format's own spec says which platforms take it too, and what runs it there."""
