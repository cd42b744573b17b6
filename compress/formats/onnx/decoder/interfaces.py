"""Where a `Plug` gets in: transformers' registries of attention and masks, and the classes that hold weights."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from compress.checkpoints.experts import SeparateExperts
from compress.formats.onnx.decoder.plug import Plug
from compress.formats.onnx.decoder.recurrence import DELTA_RULES, SELECTIVE_SCANS, delta_rule, selective_scan

REHEARSED, TRACED = "compress_rehearsal", "compress_trace"
ACTIVE: ContextVar[Plug] = ContextVar("plug")


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    sinks = sinks if s_aux is None else s_aux
    plug = ACTIVE.get()
    return plug.attend(module, query, key, value, attention_mask, scaling, softcap, sinks, others), None


def _mask(*arguments: Any, **named: Any) -> torch.Tensor:
    names = ("batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask")
    return ACTIVE.get().mask(**dict(zip(names, arguments, strict=False)), **named)


def register() -> None:
    """Put our functions into transformers' registries."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(REHEARSED, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(REHEARSED, _mask)
    # Without a mask function of that name models make no mask at all, since the operator has its own.
    ALL_ATTENTION_FUNCTIONS.register(TRACED, _attend)


def prepare(model: nn.Module) -> None:
    """Name every module, and let each parameter be asked of the plug in place of being kept, in place."""
    for name, module in model.named_modules():
        module.compress_name = name
        leaves = {leaf: parameter for leaf, parameter in module._parameters.items() if parameter is not None}
        module.compress_shapes = {leaf: tuple(parameter.shape) for leaf, parameter in leaves.items()}
        if not leaves:
            continue
        for leaf in leaves:
            del module._parameters[leaf]
        kind = type(module)
        module.__class__ = type(
            kind.__name__,
            (kind,),
            {leaf: _property(f"{name}.{leaf}" if name else leaf, value.shape) for leaf, value in leaves.items()}
            | {"__module__": kind.__module__},
        )


def _property(name: str, shape: torch.Size) -> property:
    return property(lambda self: ACTIVE.get().parameter(name, shape))


def set_attention(model: nn.Module, name: str) -> None:
    """The attention that every part of the model looks up."""
    seen: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        while config is not None and id(config) not in seen:
            seen.add(id(config))
            config._attn_implementation_internal = name
            config = getattr(config, "text_config", None)


@contextmanager
def plugged(model: nn.Module, plug: Plug) -> Iterator[None]:
    """Run ``model``, prepared by `prepare`, with ``plug`` behind its attention, layers, tables, norms and experts."""
    token = ACTIVE.set(plug)
    with ExitStack() as stack:
        stack.callback(ACTIVE.reset, token)
        for kind, forward in (
            (nn.Linear, lambda self, input: plug.product(self, input)),
            (nn.Embedding, lambda self, input: plug.rows(self, input)),
            (SeparateExperts, lambda self, *given: plug.mix(self, *given)),
        ):
            stack.enter_context(patch.object(kind, "forward", forward))
        if plug.tracing:
            stack.enter_context(patch.object(torch, "erfinv", inverse_error_function))
        for module in {sys.modules[type(part).__module__] for part in model.modules()}:
            for name, function in list(vars(module).items()):
                if name.startswith("apply_rotary") and callable(function):
                    stack.enter_context(patch.object(module, name, _rotating(plug, function)))
                elif name == DELTA_RULES and plug.tracing:
                    stack.enter_context(patch.object(module, name, delta_rule))
                elif name == SELECTIVE_SCANS and plug.tracing:
                    stack.enter_context(patch.object(module, name, _scanning(plug)))
        for part in model.modules():
            if any(name.endswith("inv_freq") for name, _ in part.named_buffers(recurse=False)):
                stack.enter_context(patch.object(part, "forward", _tables(plug, part)))
            elif plug.tracing and part.compress_name in plug.norms:
                normed = _normed(plug, *plug.norms[str(part.compress_name)])
                stack.enter_context(patch.object(part, "forward", MethodType(normed, part)))
        yield


def _scanning(plug: Plug) -> Any:
    return lambda *arguments, **named: selective_scan(plug.state, *arguments, **named)


def _rotating(plug: Plug, function: Any) -> Any:
    return lambda *arguments, **named: plug.rotate(function, arguments, named)


def _tables(plug: Plug, module: Any) -> Any:
    forward = module.forward

    def tables(*arguments: Any, **named: Any) -> Any:
        kind = next((one for one in (*arguments, *named.values()) if isinstance(one, str)), None)
        return plug.rotary_tables(module, forward(*arguments, **named), kind)

    return tables


def _normed(plug: Plug, epsilon: float, offset: float) -> Any:
    return lambda self, hidden: plug.norm(self, hidden, epsilon, offset)


_NEAR: tuple[float, ...] = (
    2.81022636e-08,
    3.43273939e-07,
    -3.5233877e-06,
    -4.39150654e-06,
    0.00021858087,
    -0.00125372503,
)
_NEAR += (-0.00417768164, 0.246640727, 1.50140941)
_TAIL: tuple[float, ...] = (
    -0.000200214257,
    0.000100950558,
    0.00134934322,
    -0.00367342844,
    0.00573950773,
    -0.0076224613,
)
_TAIL += (0.00943887047, 1.00167406, 2.83297682)


def inverse_error_function(value: torch.Tensor) -> torch.Tensor:
    """erf^-1, which ONNX lacks, in single precision (Giles 2010, table 5)."""
    far = -torch.log((1 - value) * (1 + value))
    results = []
    for distance, coefficients in ((far - 2.5, _NEAR), (far.sqrt() - 3, _TAIL)):
        result = torch.full_like(value, coefficients[0])
        for coefficient in coefficients[1:]:
            result = result * distance + coefficient
        results.append(result * value)
    return torch.where(far < 5, results[0], results[1])


def plain_norms(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Of every module that computes x / sqrt(mean(x^2) + epsilon) (weight + offset) its epsilon and offset.

    By its answer to numbers, since classes of that name differ.
    """
    found = {}
    for name, module in model.named_modules():
        if "RMSNorm" in type(module).__name__ and (facts := _plain_norm(module)):
            found[name] = facts
    return found


def _plain_norm(module: Any) -> tuple[float, float] | None:
    kind = type(module)
    epsilons = [getattr(module, name) for name in ("variance_epsilon", "eps", "epsilon") if hasattr(module, name)]
    if not epsilons or not isinstance(getattr(kind, "weight", None), property):
        return None
    size = module.weight.shape
    if len(inspect.signature(kind.forward).parameters) != 2:  # itself and the hidden states: no gate beside them
        return None
    if len(size) != 1:
        return None
    generator = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(size, generator=generator), torch.randn(2, 3, *size, generator=generator)
    epsilon = float(epsilons[0] or torch.finfo(torch.float32).eps)
    normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + epsilon)
    with patch.object(kind, "weight", weight):
        try:
            answer = module.forward(hidden)
        except TypeError:
            return None
    offsets = (offset for offset in (0.0, 1.0) if torch.allclose(answer, normed * (weight + offset), atol=1e-5))
    return next(((epsilon, offset) for offset in offsets), None)
