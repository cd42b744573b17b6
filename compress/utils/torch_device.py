"""The processor that torch computes on in stages: this one, or an accelerator that a recipe's `device` names.

Importing this imports no torch, and neither does asking for a device on a machine that has none.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.utils.environment import has_bf16
from compress.utils.errors import DeviceError, InputError

if TYPE_CHECKING:
    import torch

PATTERN = r"^(auto|cpu|mps|cuda(:\d+)?)$"
"""What a recipe may say; `auto` is CUDA where torch has it, and else the processor."""
CPU = "cpu"
_DRIVERS = ("dev/nvidiactl", "dev/nvidia0", "dev/dxg", "dev/kfd")
"""Of NVIDIA's, of it in WSL, and of AMD's, whose torch says CUDA too."""


@dataclass
class Use:
    """A device, and whether anybody asked for it."""

    device: str
    asked: bool = False


_CURRENT: ContextVar[Use | None] = ContextVar("device", default=None)


def current_device() -> str:
    """What torch is to compute on now: `cpu`, `mps`, or `cuda` with a number."""
    use = _CURRENT.get()
    if use is None:
        return CPU
    use.asked = True
    return use.device


@contextmanager
def computing_on(device: str) -> Iterator[Use]:
    """Let ``device``, one that `find_device` gave, be the current one."""
    use = Use(device)
    token = _CURRENT.set(use)
    try:
        if device.startswith("cuda"):
            import torch

            torch.cuda.set_device(device)
        yield use
    finally:
        _CURRENT.reset(token)


def find_device(wanted: str) -> str:
    """The device that a recipe's ``wanted`` means on this machine. Raises `InputError` where it isn't there."""
    if wanted == CPU:
        return CPU
    fault = device_fault(wanted)
    if wanted == "auto":
        return CPU if fault else "cuda:0"
    if fault:
        raise InputError(
            f"There is no device {wanted!r} here: {fault}.",
            where="device",
            expected="auto, cpu, or a device that torch has on this machine",
            hint="set device: auto or device: cpu, or install a torch that is built for the device and its driver",
        )
    return "cuda:0" if wanted == "cuda" else wanted


def describe_device(device: str) -> str:
    """Its name for a report."""
    if not device.startswith("cuda"):
        return device
    import torch

    about = torch.cuda.get_device_properties(device)
    return f"{device} ({about.name}, {about.total_memory / 2**30:.0f} GiB)"


def device_fault(wanted: str, root: Path = Path("/")) -> str | None:
    """Why it can't be used, or None; torch is asked only where there may be one."""
    build = _torch_build()
    if wanted == "mps":
        if (platform.system(), platform.machine()) != ("Darwin", "arm64"):
            return "it is of Apple's own processors"
        import torch

        return None if torch.backends.mps.is_available() else f"torch {build} cannot use it"
    if build.endswith("+cpu"):
        return f"torch {build} is built for processors alone"
    if platform.system() == "Linux" and not any((root / driver).exists() for driver in _DRIVERS):
        return "no driver of a GPU is loaded"
    import torch

    if not torch.cuda.is_available():
        return f"torch {build} finds no GPU that it can use"
    count, number = torch.cuda.device_count(), int(wanted.partition(":")[2] or 0)
    return None if number < count else f"torch finds {count}, from cuda:0 on"


def _torch_build() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return "missing"


_BF16_GAIN, _PRODUCT, _ROUNDS = 1.5, 512, 7
"""How many times as fast products of bfloat16 have to be, and of what they are measured: the best of some."""


@cache
def has_fast_bf16() -> bool:
    """Whether this processor multiplies matrices of bfloat16 faster than those of float32, measured once a process.

    Its instructions don't say: where there are dot products alone (AVX512-BF16), PyTorch is half as fast with them on a
    Xeon, and four times as fast on an EPYC of Zen 5.
    """
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
    torch.set_num_threads(1)  # several wait for each other where something else computes
    try:
        return seconds(torch.float32) > _BF16_GAIN * seconds(torch.bfloat16)
    finally:
        torch.set_num_threads(threads)


def uses_bf16(precision: str) -> bool:
    """Whether matrix products run in bfloat16: asked for, where the processor has it (`auto`), or has it fast."""
    if precision == "auto":
        return has_bf16()
    return precision == "bf16" or (precision == "fastest" and has_fast_bf16())


def in_bf16(precision: str, device: str | None = None) -> bool:
    """`uses_bf16` for a device, the current one if None; GPUs that have it multiply it much faster than float32."""
    kind = (device or current_device()).partition(":")[0]
    if kind == CPU or precision not in ("auto", "fastest"):
        return uses_bf16(precision)
    import torch

    return kind == "cuda" and torch.cuda.is_bf16_supported()


def autocast(enabled: bool, device: str | None = None) -> torch.autocast:
    """Matrix products in bfloat16 on a device, the current one if None; with ``enabled`` false, not even within one."""
    import torch

    kind = (device or current_device()).partition(":")[0]
    return torch.autocast(kind, torch.bfloat16, enabled=enabled)


@contextmanager
def within_memory(what: str, lower: str) -> Iterator[None]:
    """Raise `DeviceError` where ``what`` needs more memory than the accelerator has; ``lower``: fields that help."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        device = current_device()
        free: Any = torch.cuda.mem_get_info(device) if device.startswith("cuda") else None
        room = f", of whose {free[1] / 2**30:.1f} GiB {free[0] / 2**30:.1f} are free" if free else ""
        raise DeviceError(
            f"{what} needs more memory than {device} has left{room}.",
            hint=f"lower {lower}, or set device: cpu; what is finished is kept, and the next run goes on there",
        ) from error
