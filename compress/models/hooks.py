"""Watching what the parts of a torch model are given and what they make, while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Key = TypeVar("Key")
Told = Callable[[Key, torch.Tensor], None]


class Seen(Exception):  # noqa: N818 - it ends a forward pass early and is no error
    """What was to be seen of a forward pass has been seen."""


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Take hooks off again, whatever happens meanwhile."""
    held = list(handles)
    try:
        yield
    finally:
        for handle in held:
            handle.remove()


@contextmanager
def given(modules: Mapping[Key, nn.Module], told: Told[Key]) -> Iterator[None]:
    """Call ``told`` with a module's key and its first argument whenever one of ``modules`` is about to be applied."""

    def hook(key: Key) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, arguments: told(key, arguments[0])

    with hooked(module.register_forward_pre_hook(hook(key)) for key, module in modules.items()):
        yield


@contextmanager
def made(modules: Mapping[Key, nn.Module], told: Told[Key]) -> Iterator[None]:
    """Call ``told`` with a module's key and the tensor that it gave whenever one of ``modules`` was applied."""

    def hook(key: Key) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def tell(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, torch.Tensor):
                told(key, output)

        return tell

    with hooked(module.register_forward_hook(hook(key)) for key, module in modules.items()):
        yield
