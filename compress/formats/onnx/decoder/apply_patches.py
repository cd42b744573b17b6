"""Where a `TracingPatches` gets in: transformers' registries of attention and masks, and the classes that hold weights."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from compress.formats.onnx.attention.tracing import use_attention_functions
from compress.formats.onnx.decoder.attention_calls import read_rotation
from compress.formats.onnx.decoder.tracing_patches import Placeholder, TracingPatches, nodes_of
from compress.models.experts import SeparateExperts

_DELTA_RULES, _SELECTIVE_SCANS = "torch_chunk_gated_delta_rule", "mamba_selective_scan"
"""What transformers' modules call recurrences that they unroll in Python; ONNX's `Scan` goes over any length."""
_EPSILON = 1e-6


def replace_parameters(model: nn.Module, patches: TracingPatches) -> None:
    """Name every module, and let each parameter be asked of ``patches`` in place of being kept, in place."""
    for name, module in model.named_modules():
        module.compress_name = name
        shapes = {leaf: value.shape for leaf, value in module.named_parameters(recurse=False, remove_duplicate=False)}
        module.compress_shapes = {leaf: tuple(shape) for leaf, shape in shapes.items()}
        asked: dict[str, Any] = {}
        for leaf, shape in shapes.items():
            del module._parameters[leaf]
            asked[leaf] = _property(patches, f"{name}.{leaf}" if name else leaf, shape)
        kind = type(module)
        if asked:
            module.__class__ = type(kind.__name__, (kind,), asked | {"__module__": kind.__module__})


def _property(patches: TracingPatches, name: str, shape: torch.Size) -> property:
    return property(lambda self: patches.parameter(name, shape))


@contextmanager
def patched(model: nn.Module, patches: TracingPatches) -> Iterator[None]:
    """Run ``model``, prepared by `replace_parameters`, with ``patches`` behind its attention, layers, tables, norms and experts."""
    with ExitStack() as stack:
        attend, mask = (
            patches.attend if patches.fused or not patches.tracing else None,
            None if patches.tracing else patches.mask,
        )
        stack.enter_context(use_attention_functions(model, attend, mask))
        for kind, forward in (
            (nn.Linear, patches.product),
            (nn.Embedding, patches.rows),
            (SeparateExperts, patches.mix),
        ):
            stack.enter_context(patch.object(kind, "forward", _method(forward)))
        if patches.tracing:
            stack.enter_context(patch.object(torch, "erfinv", inverse_error_function))
        for module in {sys.modules[type(part).__module__] for part in model.modules()}:
            for name, function in list(vars(module).items()):
                if name.startswith("apply_rotary") and callable(function):
                    stack.enter_context(patch.object(module, name, partial(patches.rotate, function)))
                elif name == _DELTA_RULES and patches.tracing:
                    stack.enter_context(patch.object(module, name, delta_rule))
                elif name == _SELECTIVE_SCANS and patches.tracing:
                    stack.enter_context(patch.object(module, name, partial(selective_scan, patches)))
        for part in model.modules():
            if patches.tracing and part.compress_name in patches.norms:
                stack.enter_context(patch.object(part, "forward", partial(patches.norm, part)))
            elif not patches.tracing and any(
                name.endswith("inv_freq") for name, _ in part.named_buffers(recurse=False)
            ):
                stack.enter_context(patch.object(part, "forward", partial(_tables, part, part.forward)))
        yield


def _method(function: Any) -> Any:
    """A bound function as a class's own."""
    return lambda self, *given: function(self, *given)


def _tables(module: Any, forward: Any, *arguments: Any, **named: Any) -> Any:
    """What a module of rotary positions gives, recognised again where it is used."""
    found = forward(*arguments, **named)
    if isinstance(found, tuple) and len(found) == 2:
        kind = next((one for one in (*arguments, *named.values()) if isinstance(one, str)), None)
        found[0].compress_rotation = read_rotation(module, found[0], kind)
    return found


def delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    chunk_size: int = 64,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **others: object,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gated delta rule (Yang et al. 2024, equation 10) in a trace, with transformers' arguments.

    ``query`` and ``key`` [batch, length, key heads, size], ``value`` [batch, length, heads, value size], ``g`` (the log
    of the decay) and ``beta`` [batch, length, heads]. Gives the outputs [batch, length, heads, value size] and the
    state [batch, heads, size, value size].
    """
    kind, heads = query.dtype, value.shape[2]
    if heads != key.shape[2]:
        query, key = (one.repeat_interleave(heads // one.shape[2], dim=2) for one in (query, key))
    query, key, value, g, beta = (one.float() for one in (query, key, value, g, beta))
    if use_qk_l2norm_in_kernel:
        query, key = (one * torch.rsqrt(one.square().sum(-1, keepdim=True) + _EPSILON) for one in (query, key))
    query = query * query.shape[-1] ** -0.5
    state = initial_state
    if state is None:
        state = query.new_zeros(query.shape[0], heads, query.shape[-1], value.shape[-1])
    along = [one.transpose(0, 1) for one in (query, key, value, g.exp(), beta)]
    last, outputs = nodes_of(Placeholder.DELTA_RULE, [state, *along], [state.shape, along[2].shape])
    return outputs.transpose(0, 1).to(kind), last if output_final_state else None


def selective_scan(
    patches: TracingPatches,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **others: object,
) -> Any:
    """The selective scan (Gu and Dao 2023, algorithm 2) in a trace, with transformers' arguments behind ``patches``.

    ``hidden_states``, ``dt`` and ``z`` [batch, channels, length], ``A`` [channels, size], ``B`` and ``C`` [batch,
    size, length]. Gives the outputs [batch, channels, length], and the state [batch, channels, size] if it is asked.
    """
    kind, hidden = hidden_states.dtype, hidden_states.float()
    dt = dt.float() if delta_bias is None else dt.float() + delta_bias[:, None]
    dt = torch.nn.functional.softplus(dt) if delta_softplus else dt
    before = hidden.new_zeros(hidden.shape[0], *A.shape) if patches.state is None else patches.state
    along = [one.float().permute(2, 0, 1) for one in (dt, dt * hidden, B, C)]
    last, outputs = nodes_of(Placeholder.SELECTIVE_SCAN, [before, A.float(), *along], [before.shape, along[0].shape])
    given = outputs.permute(1, 2, 0)
    given = given if D is None else given + hidden * D[:, None]
    given = (given if z is None else given * torch.nn.functional.silu(z.float())).to(kind)
    return (given, last) if return_last_state else given


# Giles 2010, table 5: the coefficients near 0 and in the tails, of the highest power first.
_NEAR = "2.81022636e-08 3.43273939e-07 -3.5233877e-06 -4.39150654e-06 0.00021858087 -0.00125372503 -0.00417768164"
_NEAR += " 0.246640727 1.50140941"
_TAIL = "-0.000200214257 0.000100950558 0.00134934322 -0.00367342844 0.00573950773 -0.0076224613 0.00943887047"
_TAIL += " 1.00167406 2.83297682"


def inverse_error_function(value: torch.Tensor) -> torch.Tensor:
    """erf^-1, which ONNX lacks, in single precision (Giles 2010, table 5)."""
    far = -torch.log((1 - value) * (1 + value))
    results = []
    for distance, coefficients in ((far - 2.5, _NEAR), (far.sqrt() - 3, _TAIL)):
        first, *others = map(float, coefficients.split())
        result = torch.full_like(value, first)
        for coefficient in others:
            result = result * distance + coefficient
        results.append(result * value)
    return torch.where(far < 5, results[0], results[1])


def find_rms_norms(model: nn.Module) -> dict[str, tuple[float, float]]:
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
    # A forward of itself and the hidden states: no gate beside them.
    if len(size) != 1 or len(inspect.signature(kind.forward).parameters) != 2:
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
