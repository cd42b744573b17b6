"""Core ML."""

from __future__ import annotations

from compress.formats.spec import FormatSpec, RuntimeSpec
from compress.formats.target_profile import App, Target, TargetProfile

_CPU = "CPU_ONLY"
FORMAT = FormatSpec(
    name="coreml",
    rank=5,
    suffix=".mlpackage",
    stage="compress.formats.coreml.stage:CoreMl",
    written_by="coreml",
    own_bits=True,
    runtimes={
        "coreml": RuntimeSpec(
            runtime="compress.formats.coreml.runtime:RUNTIME",
            provider=_CPU,
        )
    },
    targets=(
        TargetProfile(
            Target("coreml", "coreml", _CPU, "Core ML on this Mac; elsewhere only its size is measured", "coreml")
        ),
    ),
    taken_by={"ios": App("Core ML", "Core ML: iOS", ())},
    tensors="compress.formats.coreml.model:read_tensors",
    tensors_suffix=".mlmodel",
    library="coreml",
)
