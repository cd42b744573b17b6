"""A fake GPU: tensors on the device `gpu:0` that lie in CPU memory and cannot be combined with CPU tensors.

Each operation on such tensors runs on the CPU, after a check that no operand is a CPU tensor. Exceptions are those that
a real GPU accepts: scalars, indices, and the source of a copy.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from compress.utils.torch_device import use_device

DEVICE = "gpu:0"
_FROM_ANYWHERE = (
    "aten::copy_",
    "aten::_to_copy",
    "aten::index.",
    "aten::index_put",
    "aten::_index_put_impl_",
    "aten::set_",
)


def is_there(device: Any) -> bool:
    return torch.device(device).type == DEVICE.split(":")[0]


class OnDevice(torch.Tensor):
    """A tensor that reports the fake GPU as its device."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        wrapper: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            held.stride(),
            held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(DEVICE),
            requires_grad=held.requires_grad,
        )
        wrapper.held = held
        return wrapper

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class FakeGpu(TorchDispatchMode):
    """Dispatch mode in which factories and copies to the GPU return `OnDevice` tensors.

    ``ran`` holds the names of the operations that ran on the fake GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ran: set[str] = set()
        self.room: int | None = None
        """Bytes that one tensor may have at most."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = _run(func, args, kwargs or {})
        outputs = [tensor for tensor in tree_flatten(result)[0] if isinstance(tensor, OnDevice)]
        if outputs or any(isinstance(tensor, OnDevice) for tensor in tree_flatten(args)[0]):
            self.ran.add(func.name())
        if self.room is not None and any(tensor.nbytes > self.room for tensor in outputs):
            raise torch.OutOfMemoryError("Out of memory. Tried to allocate too much.")
        return result


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, given = func.name(), tree_flatten((args, kwargs))[0]
    tensors = [tensor for tensor in given if isinstance(tensor, torch.Tensor)]
    device_tensors = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    target_device = kwargs.get("device")
    if not device_tensors and (target_device is None or not is_there(target_device)):
        return func(*args, **kwargs)
    host_tensors = [
        tensor for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.ndim and not tensor.is_meta
    ]
    if device_tensors and host_tensors and not name.startswith(_FROM_ANYWHERE):
        raise RuntimeError(
            f"{name}: {[tuple(tensor.shape) for tensor in host_tensors]} on the processor, others on {DEVICE}"
        )
    generator = next((argument for argument in given if isinstance(argument, torch._C.Generator)), None)
    if generator is not None and generator._cdata not in Generator.there:
        raise RuntimeError(f"{name}: a generator of the processor for {DEVICE}")
    leaves = target_device is not None and not is_there(target_device)
    plain = {
        key: torch.device("cpu") if key == "device" and value is not None else value for key, value in kwargs.items()
    }
    args_here, kwargs_here = tree_map(lambda one: one.held if isinstance(one, OnDevice) else one, (args, plain))
    result = func(*args_here, **kwargs_here)
    if leaves:
        if "_to_copy" in name and device_tensors and result is device_tensors[0].held:
            result = result.clone()
        return result
    if not device_tensors:
        return tree_map(lambda one: OnDevice(one) if isinstance(one, torch.Tensor) else one, result)
    if isinstance(args[0], torch.Tensor) and not isinstance(args[0], OnDevice) and func._schema.is_mutable:
        return args[0]  # copied into a CPU tensor
    wrapped = tree_map(lambda one: OnDevice(one) if isinstance(one, torch.Tensor) else one, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


class Generator(torch.Generator):
    """A CPU generator that counts as one of the GPU if it was created for that device."""

    there: ClassVar[set[int]] = set()

    def __new__(cls, device: Any = "cpu") -> Any:
        generator = super().__new__(cls)
        (cls.there.add if is_there(device) else cls.there.discard)(generator._cdata)
        return generator


class _Module(_DummyBackendModule):
    """The module `torch.gpu`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def _without_gradients(mode: bool = True) -> Any:
    """Replace the inference mode, which does not support tensor subclasses."""
    return torch.no_grad()


@functools.cache
def _register() -> None:
    """Register the device for the rest of the process, because torch supports only one custom backend name."""
    _setup_privateuseone_for_python_backend(DEVICE.split(":")[0], backend_module=_Module())


@contextmanager
def fake_gpu(patch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """Register the fake GPU in torch and make it the current device."""
    _register()
    patch.setattr(torch, "Generator", Generator)
    patch.setattr(torch._C, "_InferenceMode", _without_gradients)
    lifted_before = torch._C._only_lift_cpu_tensors()
    # Lists first become CPU tensors, whose copies to the GPU then pass through the dispatch mode.
    torch._C._set_only_lift_cpu_tensors(True)
    # With multithreading, autograd would require a thread for the device.
    with FakeGpu() as mode, use_device(DEVICE), torch.autograd.set_multithreading_enabled(False):
        try:
            yield mode
        finally:
            torch._C._set_only_lift_cpu_tensors(lifted_before)
