"""LiteRT."""

from __future__ import annotations

from compress.formats.spec import FormatSpec, RuntimeSpec
from compress.formats.target_profile import App, Target, TargetProfile

_PYTHON = App("ai-edge-litert", "PyPI: ai-edge-litert")
FORMAT = FormatSpec(
    name="litert",
    rank=3,
    suffix=".tflite",
    stage="compress.formats.litert.stage:LiteRt",
    written_by="litert",
    own_bits=True,
    runtimes={
        "litert": RuntimeSpec(
            runtime="compress.formats.litert.runtime:RUNTIME",
            provider="CPU",
            package="ai-edge-litert",
        )
    },
    targets=(
        TargetProfile(
            Target("litert", "litert", "CPU", "LiteRT on this machine's processor, through XNNPACK", "litert")
        ),
    ),
    taken_by={
        "android": App("litert", "Maven: com.google.ai.edge.litert:litert"),
        "linux-arm64": _PYTHON,
        "desktop": _PYTHON,
    },
    tensors="compress.formats.litert.model:read_tensors",
    library="litert",
)
