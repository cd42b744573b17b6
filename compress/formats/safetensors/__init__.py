"""Checkpoints in safetensors as transformers runs them: what every other format is made of, and compared with."""

from __future__ import annotations

from compress.formats.spec import FormatSpec, RuntimeSpec
from compress.formats.target_profile import Target, TargetProfile

_FOLDER = "compress.formats.safetensors"
_ABOUT = "transformers on this machine's processor; runs any checkpoint unchanged, in float32"
FORMAT = FormatSpec(
    name="safetensors",
    rank=99,
    suffix=".safetensors",
    library="transformers",
    runtimes={"torch": RuntimeSpec(runtime=f"{_FOLDER}.runtime:RUNTIME", provider="cpu", package="torch")},
    targets=(TargetProfile(Target("torch", "torch", "cpu", _ABOUT, "safetensors")),),
    find_all=f"{_FOLDER}.folder:find_weights",
    tensors="compress.models.checkpoint:read_tensors",
    has_graph=False,
)
