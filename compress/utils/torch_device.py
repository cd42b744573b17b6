"""The device on which torch computes in stages: the processor, or an accelerator that a recipe's `device` names.

Importing this module imports no torch, and neither does resolving a device on a machine without accelerators.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.utils.environment import has_bf16, package_versions
from compress.utils.errors import DeviceError, InputError

if TYPE_CHECKING:
    import torch

PATTERN = r"^(auto|cpu|mps|cuda(:\d+)?)$"
"""Valid values of a recipe's `device`; `auto` is CUDA if torch can use it, else the processor."""
CPU = "cpu"
_DRIVERS = ("dev/nvidiactl", "dev/nvidia0", "dev/dxg", "dev/kfd")
"""Device files of NVIDIA's driver, of the one in WSL, and of AMD's, which torch addresses as CUDA too."""


@dataclass
class DeviceUse:
    """The current device, and whether any code asked for it."""

    device: str
    was_used: bool = False


_CURRENT: ContextVar[DeviceUse | None] = ContextVar("device", default=None)


def current_device() -> str:
    """Return the device on which torch computes now: `cpu`, `mps`, or `cuda` with a number."""
    device_use = _CURRENT.get()
    if device_use is None:
        return CPU
    device_use.was_used = True
    return device_use.device


@contextmanager
def use_device(device: str) -> Iterator[DeviceUse]:
    """Make ``device``, a result of `resolve_device`, the current device."""
    device_use = DeviceUse(device)
    token = _CURRENT.set(device_use)
    try:
        if device.startswith("cuda"):
            import torch

            torch.cuda.set_device(device)
        yield device_use
    finally:
        _CURRENT.reset(token)


def resolve_device(requested: str) -> str:
    """Return the device that a recipe's ``requested`` value means on this machine.

    Raises:
        InputError: If this machine has no such device.
    """
    if requested == CPU:
        return CPU
    # `auto` falls back to the CPU; an explicit device must exist.
    fault = device_fault(requested)
    if requested == "auto":
        return CPU if fault else "cuda:0"
    if fault:
        raise InputError(
            f"This machine has no device {requested!r}: {fault}.",
            where="device",
            expected="auto, cpu, or a device that torch has on this machine",
            hint="set device: auto or device: cpu, or install a torch that is built for the device and its driver",
        )
    return "cuda:0" if requested == "cuda" else requested


def describe_device(device: str) -> str:
    """Return a device's name for a report."""
    if not device.startswith("cuda"):
        return device
    import torch

    properties = torch.cuda.get_device_properties(device)
    return f"{device} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)"


def device_fault(requested: str, root: Path = Path("/")) -> str | None:
    """Return the reason why a device cannot be used, or ``None``; torch is imported only if a driver is present."""
    torch_build = package_versions(("torch",))["torch"]
    if requested == "mps":
        if (platform.system(), platform.machine()) != ("Darwin", "arm64"):
            return "mps is the GPU of Apple processors"
        import torch

        return None if torch.backends.mps.is_available() else f"torch {torch_build} cannot use it"
    # Check the build and the driver first: importing torch takes seconds.
    if torch_build.endswith("+cpu"):
        return f"torch {torch_build} is built for CPUs only"
    if platform.system() == "Linux" and not any((root / driver).exists() for driver in _DRIVERS):
        return "no driver of a GPU is loaded"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch_build} finds no usable GPU"
    # `cuda` without a number is the first GPU.
    count, index = torch.cuda.device_count(), int(requested.partition(":")[2] or 0)
    return None if index < count else f"torch finds {count} GPUs, numbered from cuda:0"


_BF16_GAIN, _PRODUCT, _ROUNDS = 1.5, 512, 7
"""Minimum speed-up of bfloat16 over float32, width of the multiplied matrices, and number of rounds (best counts)."""


@cache
def has_fast_bf16() -> bool:
    """Return True if this processor multiplies bfloat16 matrices faster than float32 ones, measured once per process.

    Instruction sets do not decide this. With dot products only (AVX512-BF16), PyTorch is half as fast in bfloat16 on a
    Xeon, and four times as fast on an EPYC of Zen 5.
    """
    # Emulated bfloat16 is never faster.
    if not has_bf16():
        return False
    import torch

    def seconds(dtype: torch.dtype) -> float:
        values = torch.full((_PRODUCT, _PRODUCT), 0.5, dtype=dtype)
        values @ values  # which sets the library up
        rounds = []
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            values @ values
            rounds.append(time.perf_counter() - start)
        return min(rounds)

    threads = torch.get_num_threads()
    # Several threads would wait for each other while another process computes.
    torch.set_num_threads(1)  # several wait for each other where something else computes
    try:
        return seconds(torch.float32) > _BF16_GAIN * seconds(torch.bfloat16)
    finally:
        torch.set_num_threads(threads)


def uses_bf16(precision: str) -> bool:
    """Return True if matrix products run in bfloat16.

    ``precision`` is `fp32`, `bf16`, `auto` (if the processor supports it) or `fastest` (if it is faster).
    """
    if precision == "auto":
        return has_bf16()
    return precision == "bf16" or (precision == "fastest" and has_fast_bf16())


def device_uses_bf16(precision: str, device: str | None = None) -> bool:
    """Return True if matrix products run in bfloat16 on ``device`` (default: the current one).

    GPUs with bfloat16 multiply it much faster than float32, so that `auto` and `fastest` need no measurement there.
    """
    kind = (device or current_device()).partition(":")[0]
    # An explicit precision applies to every device.
    if kind == CPU or precision not in ("auto", "fastest"):
        return uses_bf16(precision)
    import torch

    return kind == "cuda" and torch.cuda.is_bf16_supported()


def autocast(enabled: bool, device: str | None = None) -> torch.autocast:
    """Return a context for matrix products in bfloat16 on ``device`` (default: the current one).

    With ``enabled`` false, an enclosing autocast is switched off.
    """
    import torch

    kind = (device or current_device()).partition(":")[0]
    return torch.autocast(kind, torch.bfloat16, enabled=enabled)


@contextmanager
def device_memory_errors(what: str, lower: str) -> Iterator[None]:
    """Turn a lack of accelerator memory during ``what`` into a `DeviceError` that names the fields ``lower``."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        device = current_device()
        free: Any = torch.cuda.mem_get_info(device) if device.startswith("cuda") else None
        available = f": {free[0] / 2**30:.1f} of {free[1] / 2**30:.1f} GiB are free" if free else ""
        raise DeviceError(
            f"{what} needs more memory than {device} has available{available}.",
            hint=f"lower {lower}, or set device: cpu; finished work is cached, and the next run resumes there",
        ) from error
