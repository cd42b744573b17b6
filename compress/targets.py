"""Targets as data: where an artifact is meant to run, and through which runtime it is judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from compress.errors import InputError


@dataclass(frozen=True)
class Target:
    """One place to run. ``provider`` is the runtime's own name for the device, ``format`` what it opens."""

    name: str
    runtime: str
    provider: str
    description: str
    format: Literal["onnx", "gguf", "ort", "openvino"] = "onnx"


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("cpu", "onnxruntime", "CPUExecutionProvider", "ONNX Runtime on this machine's processor"),
        Target("gpu", "onnxruntime", "CUDAExecutionProvider", "ONNX Runtime on an NVIDIA GPU"),
        Target("ort", "onnxruntime", "CPUExecutionProvider", "ONNX Runtime's format for phones, run here", "ort"),
        Target("openvino", "openvino", "CPU", "OpenVINO on this machine's processor", "openvino"),
        Target("llama-cpp", "llama-cpp", "cpu", "llama.cpp on this machine's processor", "gguf"),
    )
}


@dataclass(frozen=True)
class Processor:
    """A kind of processor, as far as it bears on what 8-bit products give.

    ``sums_in_32_bits``: no product of bytes is added to another in 16 bits, where it could saturate.
    """

    name: str
    sums_in_32_bits: bool
    description: str


LINUX_ARM = "linux-arm64"
PROCESSORS: dict[str, Processor] = {
    processor.name: processor
    for processor in (
        Processor("x86-avx2", False, "x86-64 without VNNI: Intel before Ice Lake and Cascade Lake, AMD before Zen 4"),
        Processor("x86-vnni", True, "x86-64 with AVX512-VNNI, AVX-VNNI or AMX"),
        Processor("arm64", True, "64-bit ARM, with dot products or without"),
        Processor(LINUX_ARM, True, "the same under Linux: where qemu-aarch64 is, its answers are compared with ours"),
    )
}


def find_processor(name: str) -> Processor:
    """That kind of processor, or for `cpu` this machine's. Raises `InputError` with the known names."""
    if name in PROCESSORS:
        return PROCESSORS[name]
    if name != "cpu":
        raise InputError(f"There is no processor {name!r}.", expected=f"one of cpu, {', '.join(PROCESSORS)}")
    from compress.environment import features, has_int8_dot_product

    x86 = "avx2" in features()
    return Processor("cpu", has_int8_dot_product() or not x86, "this machine's")
