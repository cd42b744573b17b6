"""Bundles: an artifact with everything an app needs beside it, such as a manifest, examples and a self-test."""

from __future__ import annotations

from compress.plugins import Command, PluginSpec

_FORMATS = "compress.plugins.apps.formats"

SPEC = PluginSpec(
    name="apps",
    summary="Bundle a model with what an app needs: manifest, self-test, examples, and a page for browsers.",
    bundled_formats={
        **{name: f"{_FORMATS}.{name}.bundle:BUNDLE" for name in ("onnx", "coreml", "executorch", "litert")},
        "ort": f"{_FORMATS}.onnx.bundle:ORT_BUNDLE",
    },
    requires=("provenance",),
    verifiers={"bundle": "compress.plugins.apps.cli:BUNDLE"},
    commands={
        "bundle": Command(
            "compress.plugins.apps.cli:bundle",
            "Bundle a model with all that an app needs: manifest, self-test, card, examples; for browsers a page.",
            "compress bundle quickstart --target android --output app",
            "Ship",
        ),
    },
)
