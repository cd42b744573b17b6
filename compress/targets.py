"""Targets as data: where an artifact is meant to run, and through which runtime it is judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Target:
    """One place to run. ``provider`` is the runtime's own name for the device, ``format`` what it opens."""

    name: str
    runtime: str
    provider: str
    description: str
    format: Literal["onnx", "gguf"] = "onnx"


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("cpu", "onnxruntime", "CPUExecutionProvider", "ONNX Runtime on this machine's processor"),
        Target("gpu", "onnxruntime", "CUDAExecutionProvider", "ONNX Runtime on an NVIDIA GPU"),
        Target("llama-cpp", "llama-cpp", "cpu", "llama.cpp on this machine's processor", format="gguf"),
    )
}
