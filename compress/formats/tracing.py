"""Tracing by torch and its ONNX exporter without work that nobody has anything of."""

from __future__ import annotations

import functools
import gc
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

_OBJECTS = 100_000
"""New ones after which Python looks for garbage: tracing makes millions that it keeps."""


@contextmanager
def lean_tracing() -> Iterator[None]:
    """Leave out stack traces of nodes, list torch's and the exporter's operators once only, look for garbage seldom.

    And what tells types, for the exporter to convert where they differ, computes no shapes anew. That is a third of
    the work of an export. Graphs have none of it, and errors name modules.
    """
    from torch._export import utils
    from torch.fx import config
    from torch.onnx._internal.exporter import _registration, _schemas
    from torch.onnx._internal.fx.passes import type_promotion

    types: Any = type_promotion
    exporter: Any = vars(_registration)["onnxscript_apis"]
    # It is called for each namespace of operators, and lists those of all.
    materialized = functools.cache(vars(utils)["_materialize_cpp_cia_ops"])
    traces, threshold = config.do_not_emit_stack_traces, gc.get_threshold()
    config.do_not_emit_stack_traces = True
    gc.set_threshold(_OBJECTS, *threshold[1:])
    try:
        with (
            patch.object(exporter, "get_torchlib_ops", functools.partial(_once, exporter.get_torchlib_ops)),
            patch.object(
                _schemas, "op_signature_from_function", functools.partial(_once, _schemas.op_signature_from_function)
            ),
            patch.object(utils, "_materialize_cpp_cia_ops", materialized),
            patch.object(types._TypePromotionInterpreter, "run_node", _with_types(types)),
        ):
            yield
    finally:
        config.do_not_emit_stack_traces = traces
        gc.set_threshold(*threshold)


def _with_types(types: Any) -> Callable[[Any, Any], Any]:
    """`run_node` of torch's pass, but that a node keeps the value that it was traced with.

    What the pass changes it has run anew by then; nobody reads another result than its type and shape.
    """
    from torch.fx import Interpreter

    def run_node(self: Any, node: Any) -> Any:
        with self._set_current_node(node):
            if rule := types.get_type_promotion_rule(node, self.type_promotion_table):
                self._maybe_promote_node(node, rule)
        traced = node.op == "call_function" and "val" in node.meta
        return node.meta["val"] if traced else Interpreter.run_node(self, node)

    return run_node


class _Sorted(set[Any]):
    """A set that is gone over in the same order whatever Python hashes strings to."""

    def __iter__(self) -> Iterator[Any]:
        return iter(sorted(super().__iter__(), key=repr))


def _length(value: Any) -> Any:
    """`len`, which of a tensor stays symbolic."""
    import torch

    return value.shape[0] if isinstance(value, torch.Tensor) else len(value)


@contextmanager
def with_traceable_builtins(module: Any) -> Iterator[None]:
    """Two functions of Python otherwise, in the files of transformers that a model's parts are from.

    `len` of a tensor is not made a number, which would make a graph for one batch alone (RT-DETR, D-FINE); and a `set`
    of kinds of layers has one order, so that the same model gives the same bytes (ModernBERT, Gemma 3).
    """
    files = {type(part).__module__ for part in module.modules()}
    with ExitStack() as stack:
        for file in sorted(file for file in files if file.startswith("transformers.models.")):
            stack.enter_context(patch.multiple(sys.modules[file], len=_length, set=_Sorted, create=True))
        yield


@contextmanager
def without_padding_masks(module: Any) -> Iterator[None]:
    """Without the masks of padding that a detector makes itself: pictures of one size have none.

    As DETR computes them they take operators that not every format has.
    """
    parts = [part for name, part in module.named_modules() if name.rpartition(".")[2] in ("encoder", "decoder")]
    makes_masks = "pixel_mask" in inspect.signature(module.forward).parameters
    hooks = [part.register_forward_pre_hook(_without_masks, with_kwargs=True) for part in parts if makes_masks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _without_masks(part: Any, given: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return given, named | {name: None for name in ("attention_mask", "encoder_attention_mask") if name in named}


@functools.cache
def _once(function: Callable[..., Any], *given: Any, **named: Any) -> Any:
    return function(*given, **named)
