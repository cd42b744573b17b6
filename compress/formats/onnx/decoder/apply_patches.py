"""Installation of tracing patches in transformers' registries of attention and masks and in modules with weights."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from compress.formats.onnx.attention.tracing import use_attention_functions
from compress.formats.onnx.decoder.attention_calls import read_rotation
from compress.formats.onnx.decoder.tracing_patches import Placeholder, TracingPatches, nodes_of
from compress.models.experts import SeparateExperts

_DELTA_RULES, _SELECTIVE_SCANS = "torch_chunk_gated_delta_rule", "mamba_selective_scan"
"""transformers' names of recurrences that it unrolls in Python; ONNX's `Scan` works for any length."""
_EPSILON = 1e-6


def replace_parameters(model: nn.Module, patches: TracingPatches) -> None:
    """Name every module and replace each parameter by a property that asks ``patches`` for it, in place."""
    for name, module in model.named_modules():
        module.compress_module_name = name
        # Shapes are recorded before the parameters are deleted.
        shapes = {leaf: value.shape for leaf, value in module.named_parameters(recurse=False, remove_duplicate=False)}
        module.compress_shapes = {leaf: tuple(shape) for leaf, shape in shapes.items()}
        properties: dict[str, Any] = {}
        for leaf, shape in shapes.items():
            del module._parameters[leaf]
            properties[leaf] = _property(patches, f"{name}.{leaf}" if name else leaf, shape)
        # Properties belong to classes, so each module gets a subclass of its own.
        kind = type(module)
        if properties:
            module.__class__ = type(kind.__name__, (kind,), properties | {"__module__": kind.__module__})


def _property(patches: TracingPatches, name: str, shape: torch.Size) -> property:
    """Return a property that asks ``patches`` for a parameter."""
    return property(lambda self: patches.parameter(name, shape))


def _method(function: Any) -> Any:
    """Turn a bound function into a method of a class."""
    return lambda self, *arguments: function(self, *arguments)


@contextmanager
def patched(model: nn.Module, patches: TracingPatches) -> Iterator[None]:
    """Run ``model``, prepared by `replace_parameters`, with ``patches`` in place of attention, layers and tables."""
    with ExitStack() as stack:
        attend = patches.attend if patches.fused or not patches.tracing else None
        mask = None if patches.tracing else patches.mask
        stack.enter_context(use_attention_functions(model, attend, mask))
        forwards = {nn.Linear: patches.product, nn.Embedding: patches.rows, SeparateExperts: patches.mix}
        for kind, forward in forwards.items():
            stack.enter_context(patch.object(kind, "forward", _method(forward)))
        for module, name, replacement in _function_patches(model, patches):
            stack.enter_context(patch.object(module, name, replacement))
        for part in model.modules():
            if patches.tracing and part.compress_module_name in patches.norms:
                stack.enter_context(patch.object(part, "forward", partial(patches.norm, part)))
            # In the dry run the modules of rotary positions mark their cosines, so that `rotate` recognizes them.
            elif not patches.tracing and any(
                name.endswith("inv_freq") for name, _ in part.named_buffers(recurse=False)
            ):
                stack.enter_context(patch.object(part, "forward", partial(_tables, part, part.forward)))
        yield


def _function_patches(model: nn.Module, patches: TracingPatches) -> Iterator[tuple[ModuleType, str, Any]]:
    """Yield module, name and replacement of each function that transformers' model files define for themselves."""
    for module in {sys.modules[type(part).__module__] for part in model.modules()}:
        for name, function in list(vars(module).items()):
            # Every module of transformers has its own copy of the rotation.
            if name.startswith("apply_rotary") and callable(function):
                yield module, name, partial(patches.rotate, function)
            elif name == _DELTA_RULES and patches.tracing:
                yield module, name, delta_rule
            elif name == _SELECTIVE_SCANS and patches.tracing:
                yield module, name, partial(selective_scan, patches)


def _tables(module: Any, forward: Any, *arguments: Any, **named: Any) -> Any:
    """Call a module of rotary positions and attach its rotation to the cosines, for recognition where they are used."""
    tables = forward(*arguments, **named)
    if isinstance(tables, tuple) and len(tables) == 2:
        kind = next((argument for argument in (*arguments, *named.values()) if isinstance(argument, str)), None)
        tables[0].compress_rotation = read_rotation(module, tables[0], kind)
    return tables


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
    """Trace the gated delta rule (Yang et al. 2024, equation 10).

    Args:
        query: [batch, length, key heads, size].
        key: [batch, length, key heads, size].
        value: [batch, length, heads, value size].
        g: Logarithm of the decay [batch, length, heads].
        beta: Learning rates [batch, length, heads].
        chunk_size: Unused; part of transformers' signature.
        initial_state: State [batch, heads, size, value size], or None for zeros.
        output_final_state: Whether to return the final state.
        use_qk_l2norm_in_kernel: Whether to normalize queries and keys.
        **others: Unused; part of transformers' signature.

    Returns:
        The outputs [batch, length, heads, value size] and the state [batch, heads, size, value size].
    """
    kind, heads = query.dtype, value.shape[2]
    # Keys may have fewer heads than values.
    if heads != key.shape[2]:
        query, key = (tensor.repeat_interleave(heads // tensor.shape[2], dim=2) for tensor in (query, key))
    query, key, value, g, beta = (tensor.float() for tensor in (query, key, value, g, beta))
    if use_qk_l2norm_in_kernel:
        query, key = (tensor * torch.rsqrt(tensor.square().sum(-1, keepdim=True) + _EPSILON) for tensor in (query, key))
    query = query * query.shape[-1] ** -0.5
    state = initial_state
    if state is None:
        state = query.new_zeros(query.shape[0], heads, query.shape[-1], value.shape[-1])
    # `Scan` goes along the first axis.
    along = [tensor.transpose(0, 1) for tensor in (query, key, value, g.exp(), beta)]
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
    """Trace the selective scan (Gu and Dao 2023, algorithm 2).

    Args:
        patches: The patches, whose ``state`` is the layer's earlier state.
        hidden_states: [batch, channels, length].
        dt: Step sizes [batch, channels, length].
        A: Decays [channels, size].
        B: Input projection [batch, size, length].
        C: Output projection [batch, size, length].
        D: Skip connection [channels].
        z: Gate [batch, channels, length].
        delta_bias: Added to the step sizes [channels].
        delta_softplus: Whether to apply softplus to the step sizes.
        return_last_state: Whether to return the state.
        **others: Unused; part of transformers' signature.

    Returns:
        The outputs [batch, channels, length], and the state [batch, channels, size] if it is requested.
    """
    kind, hidden = hidden_states.dtype, hidden_states.float()
    dt = dt.float() if delta_bias is None else dt.float() + delta_bias[:, None]
    dt = torch.nn.functional.softplus(dt) if delta_softplus else dt
    initial_state = hidden.new_zeros(hidden.shape[0], *A.shape) if patches.state is None else patches.state
    along = [sequence.float().permute(2, 0, 1) for sequence in (dt, dt * hidden, B, C)]
    last, outputs = nodes_of(
        Placeholder.SELECTIVE_SCAN, [initial_state, A.float(), *along], [initial_state.shape, along[0].shape]
    )
    output = outputs.permute(1, 2, 0)
    output = output if D is None else output + hidden * D[:, None]
    output = (output if z is None else output * torch.nn.functional.silu(z.float())).to(kind)
    return (output, last) if return_last_state else output


def find_rms_norms(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Return epsilon and offset of every module that computes x / sqrt(mean(x^2) + epsilon) (weight + offset).

    Modules are recognized by their output for random numbers, because classes of that name differ.
    """
    norms = {}
    for name, module in model.named_modules():
        # The name only limits the candidates; the output decides.
        if "RMSNorm" in type(module).__name__ and (facts := _plain_norm(module)):
            norms[name] = facts
    return norms


def _plain_norm(module: Any) -> tuple[float, float] | None:
    """Return epsilon and offset of a module, or None if it computes something else."""
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
    # The weight is a property of the prepared module, so the test value replaces it on the class.
    with patch.object(kind, "weight", weight):
        try:
            answer = module.forward(hidden)
        except TypeError:
            return None
    offsets = (offset for offset in (0.0, 1.0) if torch.allclose(answer, normed * (weight + offset), atol=1e-5))
    return next(((epsilon, offset) for offset in offsets), None)
