"""GGUF, for llama.cpp."""

from __future__ import annotations

from compress.formats.spec import FormatSpec, RuntimeSpec
from compress.formats.target_profile import Target, TargetProfile

FORMAT = FormatSpec(
    name="gguf",
    rank=6,
    suffix=".gguf",
    stage="compress.formats.gguf.stage:Gguf",
    written_by="gguf",
    searched=({"imatrix": {}}, {"gguf": {"type": "Q4_K_M"}}),
    runtimes={
        "llama-cpp": RuntimeSpec(runtime="compress.formats.gguf.runtime:RUNTIME", provider="cpu", package="xllamacpp")
    },
    targets=(TargetProfile(Target("llama-cpp", "llama-cpp", "cpu", "llama.cpp on this machine's processor", "gguf")),),
    taken_by={"desktop": None},
    inspector="compress.formats.gguf.runtime:INSPECTOR",
    tensors="compress.formats.gguf.model:read_tensors",
    has_graph=False,
    check_writable="compress.formats.gguf.architecture:check_writable",
)
