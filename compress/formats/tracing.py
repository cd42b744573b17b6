"""Tracing by torch and its ONNX exporter without work that nobody has anything of."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_OBJECTS = 100_000
"""New ones after which Python looks for garbage: tracing makes millions that it keeps."""


@contextmanager
def lean_tracing() -> Iterator[None]:
    """Leave out the stack trace of each node, parse the exporter's library of operators once, look for garbage seldom.

    That is a third of the work of an export. Graphs have none of it, and errors name modules.
    """
    from torch.fx import config
    from torch.onnx._internal.exporter import _registration

    apis: Any = vars(_registration)["onnxscript_apis"]
    traces, library, threshold = config.do_not_emit_stack_traces, apis.get_torchlib_ops, gc.get_threshold()
    gc.set_threshold(_OBJECTS, *threshold[1:])
    config.do_not_emit_stack_traces = True
    apis.get_torchlib_ops = functools.partial(_parsed, library)
    try:
        yield
    finally:
        config.do_not_emit_stack_traces, apis.get_torchlib_ops = traces, library
        gc.set_threshold(*threshold)


@functools.cache
def _parsed(library: Callable[[], list[Any]]) -> list[Any]:
    return library()
