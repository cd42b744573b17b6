"""Registry of model versions: which one is in use, who promoted it and why, and how to roll back."""

from __future__ import annotations

from compress.plugins import Command, PluginSpec

SPEC = PluginSpec(
    name="registry",
    summary="Register versions of models, promote them behind a gate, roll back, verify and pull.",
    verifiers={"registry": "compress.plugins.registry.cli:REGISTRY"},
    commands={
        "registry": Command(
            "compress.plugins.registry.cli:app",
            "Versions of models: register, promote behind a gate, roll back, verify, pull.",
            "compress registry register quickstart --name reviews",
            "Ship",
        ),
    },
)
