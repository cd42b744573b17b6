"""ExecuTorch."""

from __future__ import annotations

from compress.formats.spec import FormatSpec, RuntimeSpec
from compress.formats.target_profile import App, Target, TargetProfile

_XNNPACK = "XnnpackBackend"
_PYTHON = App("executorch", "PyPI: executorch")
FORMAT = FormatSpec(
    name="executorch",
    rank=4,
    suffix=".pte",
    stage="compress.formats.executorch.stage:ExecuTorch",
    written_by="executorch",
    own_bits=True,
    runtimes={
        "executorch": RuntimeSpec(
            runtime="compress.formats.executorch.runtime:RUNTIME",
            provider=_XNNPACK,
            package="executorch",
        )
    },
    targets=(
        TargetProfile(
            Target("executorch", "executorch", _XNNPACK, "ExecuTorch on this machine's processor", "executorch")
        ),
    ),
    taken_by={
        "android": App("executorch-android", "Maven: org.pytorch:executorch-android"),
        "ios": App("executorch", "Swift: pytorch/executorch"),
        "linux-arm64": _PYTHON,
        "desktop": _PYTHON,
    },
    tensors="compress.formats.executorch.model:read_tensors",
    library="executorch",
)
