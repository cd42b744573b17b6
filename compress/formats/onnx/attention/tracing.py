"""Attention functions for transformers' registries: one that records each attention call, one that is traced.

transformers calls attention and makes masks by name (`ALL_ATTENTION_FUNCTIONS`, `ALL_MASK_ATTENTION_FUNCTIONS`). Both
functions are registered under one name here. Each call becomes the inputs of one operator. `check_attention` computes
that operator with torch and compares the model's answers; `onnx` writes it into the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.onnx import ops

from compress.formats.parity import mixed_batches
from compress.tasks.inference import answers, tensors
from compress.tasks.task import Examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel


DOMAIN, OPERATOR = "compress", "EncoderAttention"
"""Operator of a traced call until `lower_attention` replaces it; the exporter's own rewrites do not know it."""
QUERY, KEY, VALUE, PADDING, BIAS = range(5)
"""Inputs: three of [batch, length, heads * size], int32 [batch, keys], [1 or batch, 1 or heads, length, keys]."""
_NAME = "compress"


@dataclass(frozen=True)
class AttentionInputs:
    """Inputs of the operator: query, key and value [batch, heads, length, size], all with the same number of heads."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    padding: torch.Tensor | None
    bias: torch.Tensor | None
    causal: bool
    scale: float


Compute = Callable[[AttentionInputs], torch.Tensor]
"""Computes the attention output [batch, length, heads, size] from the inputs."""


@dataclass
class AttentionHooks:
    """Functions that take the place of transformers' attention and mask functions.

    A mask that the model passes on is recognized by an attribute of the tensor.
    """

    compute: Compute

    def mask(self, *args: Any, **options: Any) -> torch.Tensor | None:
        """Return transformers' `eager_mask`, with one row for all queries if it only hides padding."""
        from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, eager_mask

        padding: Any = options.get("attention_mask")
        function = options.get("mask_function", causal_mask_function)
        # A mask of the model's own, with more than two axes, is passed on as a bias.
        flat = padding is None or padding.ndim == 2
        alone = function is bidirectional_mask_function and flat
        if alone and padding is None:
            return None
        mask: Any
        if alone:
            dtype = options.get("dtype", torch.float32)
            hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype)
            mask = torch.where(padding[:, None, None, :].bool(), torch.zeros((), dtype=dtype), hidden)
        else:
            mask = eager_mask(*args, **options | {"allow_is_bidirectional_skip": False})
        # A causal mask from position 0 needs no bias: the operator has an attribute for it.
        causal = function is causal_mask_function and flat and options.get("q_offset", 0) == 0
        if alone or causal:
            # `attend` reads padding and causality from the mask tensor.
            mask.compress_mask_facts = None if padding is None else padding.to(torch.int32), causal
        return mask  # type: ignore[no-any-return]

    def attend(
        self,
        module: nn.Module | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        position_bias: torch.Tensor | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        """Compute attention with the interface of transformers' attention functions.

        Args:
            module: The attention module, or None.
            query: Queries [batch, heads, length, size].
            key: Keys [batch, key heads, length, size].
            value: Values [batch, key heads, length, size].
            attention_mask: Mask that `mask` made, or one of the model's own.
            scaling: Factor of the scores; by default size to the power of -1/2.
            position_bias: Added to the scores.
            softcap: Soft cap of the scores, which no operator supports.
            s_aux: Attention sinks, which no operator supports.

        Returns:
            The output [batch, length, heads, size], and None for the attention weights.
        """
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        # The operator has as many heads of keys as of queries, so shared ones are repeated.
        if key.shape[1] != query.shape[1]:
            key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
        mask_facts = getattr(attention_mask, "compress_mask_facts", None)
        bias = _added(position_bias, None if mask_facts else attention_mask, query.shape[2], key.shape[2])
        padding, causal = mask_facts or (None, False)
        inputs = AttentionInputs(query, key, value, padding, bias, causal, scale)
        # Calls that no operator computes keep the definition in torch's operators.
        if softcap or s_aux is not None:
            return reference_attention(inputs, softcap, s_aux), None
        return self.compute(inputs), None


def _added(
    position_bias: torch.Tensor | None, mask: torch.Tensor | None, length: int, keys: int
) -> torch.Tensor | None:
    """Return the sum of bias and mask as one float tensor with complete last axes."""
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.finfo(torch.float32).min
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, lowest)
    if position_bias is not None and mask is not None:
        return position_bias + mask
    bias = mask if position_bias is None else position_bias
    return None if bias is None else (bias if bias.ndim == 4 else bias.unsqueeze(1)).expand(-1, -1, length, keys)


def reference_attention(
    inputs: AttentionInputs, softcap: float | None = None, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute softmax(Q Kᵀ · scale + bias) V with torch's operators."""
    scores = inputs.query @ inputs.key.transpose(-1, -2) * inputs.scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    lowest = torch.finfo(scores.dtype).min
    if inputs.bias is not None:
        scores = scores + inputs.bias
    if inputs.causal:
        places = torch.arange(scores.shape[-1])
        scores = scores.masked_fill(places[None, :] > places[: scores.shape[-2], None], lowest)
    if inputs.padding is not None:
        scores = scores.masked_fill(inputs.padding[:, None, None, :] == 0, lowest)
    # Sinks take part in the softmax as one more key without a value.
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        column = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    return (weights @ inputs.value).transpose(1, 2)


def trace_attention(inputs: AttentionInputs) -> torch.Tensor:
    """Return the call as one node of the traced graph."""
    batch, heads, length, _ = inputs.query.shape
    size = inputs.value.shape[-1]
    # The operator takes [batch, length, heads * size].
    flat = [tensor.transpose(1, 2).flatten(2) for tensor in (inputs.query, inputs.key, inputs.value)]
    operands, shape = [*flat, inputs.padding, inputs.bias], [batch, length, heads * size]
    attributes: dict[str, Any] = {"num_heads": heads, "scale": inputs.scale, "unidirectional": int(inputs.causal)}
    kind, dtype = f"{DOMAIN}::{OPERATOR}", inputs.query.dtype
    attended: torch.Tensor = ops.symbolic(kind, operands, attributes, dtype=dtype, shape=shape, version=1)
    return attended.reshape(batch, length, heads, size)


@contextmanager
def use_attention_functions(module: nn.Module, attend: object = None, mask: object = None) -> Iterator[None]:
    """Make ``module``, its parts and their configs call ``attend`` and ``mask`` within the context.

    Without ``attend`` the model's eager attention runs; without ``mask`` no masks are made.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # transformers looks functions up by the name in the config; without a mask function of that name it makes no mask.
    name = "eager" if attend is None else _NAME if mask is None else f"{_NAME}_masked"
    configs = {id(config): config for part in module.modules() if (config := getattr(part, "config", None)) is not None}
    previous = [(config, getattr(config, "_attn_implementation_internal", None)) for config in configs.values()]
    if attend is not None:
        ALL_ATTENTION_FUNCTIONS.register(name, attend)
    if mask is not None:
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask)
    try:
        for config, _ in previous:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, implementation in previous:
            config._attn_implementation_internal = implementation


_SAME = 1e-4
"""Largest difference as a share of the largest answer; sums in another order differ by less."""


def check_attention(module: PreTrainedModel, examples: Examples) -> str:
    """Return why a model's attention cannot be replaced by the operator, or "".

    A padded batch of ``examples`` must give the same answers with the operator's definition.
    """
    batch = tensors(examples, mixed_batches(examples)[0])
    inputs = {name: value for name, value in batch.items() if name in examples.padding}
    hooks = AttentionHooks(reference_attention)
    with torch.no_grad():
        expected = answers(examples, module(**inputs), batch)
        try:
            with use_attention_functions(module, hooks.attend, hooks.mask):
                actual = answers(examples, module(**inputs), batch)
        # A model may call attention in a way that the hooks do not support.
        except (KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            return f"it fails with traced attention: {' '.join(str(error).split())[:120]}"
    difference = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    differs = f"its outputs differ with traced attention, by {difference:.1e} of the largest"
    return "" if difference <= _SAME else differs
