"""Hooks that capture the inputs and outputs of parts of a torch model while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Key = TypeVar("Key")
TensorCallback = Callable[[Key, torch.Tensor], None]


class StopForward(Exception):  # noqa: N818 - it ends a forward pass early and is no error
    """Signal that ends a forward pass after everything of interest was captured."""


@contextmanager
def removed_on_exit(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks when the context ends, also after an exception."""
    registered = list(handles)
    try:
        yield
    finally:
        for handle in registered:
            handle.remove()


@contextmanager
def capture_inputs(modules: Mapping[Key, nn.Module], callback: TensorCallback[Key]) -> Iterator[None]:
    """Call ``callback`` with a module's key and its first argument before each call of one of ``modules``."""

    def hook(key: Key) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, arguments: callback(key, arguments[0])

    with removed_on_exit(module.register_forward_pre_hook(hook(key)) for key, module in modules.items()):
        yield


@contextmanager
def capture_outputs(modules: Mapping[Key, nn.Module], callback: TensorCallback[Key]) -> Iterator[None]:
    """Call ``callback`` with a module's key and its output tensor after each call of one of ``modules``."""

    def hook(key: Key) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def tell(module: nn.Module, arguments: tuple[object, ...], output: object) -> None:
            if isinstance(output, torch.Tensor):
                callback(key, output)

        return tell

    with removed_on_exit(module.register_forward_hook(hook(key)) for key, module in modules.items()):
        yield
