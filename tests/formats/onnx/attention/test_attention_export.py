"""What is plugged into transformers: it sees every call, computes what torch computes, and leaves no trace."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from compress.formats.onnx.attention.tracing import (
    AttentionHooks,
    AttentionInputs,
    check_attention,
    install_hooks,
    reference_attention,
)
from compress.tasks.task import Examples

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "num_labels": 3,
}
DECODER = SHAPE | {"num_key_value_heads": 2, "head_dim": 8}


def examples() -> Examples:
    generator = np.random.default_rng(0)
    rows = [
        {"input_ids": generator.integers(3, 60, length), "attention_mask": np.ones(length, np.int64)}
        for length in generator.integers(3, 20, 24)
    ]
    return Examples(rows, {"input_ids": 0.0, "attention_mask": 0.0})


def made(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    module = kind(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return module


def heads(count: int = 2, length: int = 5, keys: int = 5, size: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, count, length if seed == 0 else keys, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_the_definition_is_that_of_torch(causal: bool, padded: bool, biased: bool):
    query, key, value = (heads(seed=seed) for seed in range(3))
    padding = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]) if padded else None
    bias = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(9)) if biased else None
    mask = torch.zeros(2, 2, 5, 5) if bias is None else bias.expand(2, 2, 5, 5)
    if causal:
        mask = mask.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    if padding is not None:
        mask = mask.masked_fill(padding[:, None, None, :] == 0, float("-inf"))
    expected = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.3)
    actual = reference_attention(AttentionInputs(query, key, value, padding, bias, causal, 0.3))
    torch.testing.assert_close(actual.transpose(1, 2), expected)


def keeping() -> tuple[AttentionHooks, list[AttentionInputs]]:
    """A plug, and what each call hands to its operator."""
    calls: list[AttentionInputs] = []

    def keep(inputs: AttentionInputs) -> torch.Tensor:
        calls.append(inputs)
        return reference_attention(inputs)

    return AttentionHooks(keep), calls


def test_torchs_own_function_with_a_bias_is_a_call_like_others():
    query, key, value = (heads(seed=seed) for seed in range(3))
    bias = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(9))
    torch_function = nn.functional.scaled_dot_product_attention
    hooks, calls = keeping()
    with install_hooks(nn.Linear(1, 1), hooks):
        actual = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=0.3)
        nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(actual, torch_function(query, key, value, bias, scale=0.3))
    (call,) = calls
    assert (call.query.shape[1], call.scale, call.bias is not None, call.padding) == (2, 0.3, True, None)
    assert nn.functional.scaled_dot_product_attention is torch_function


def calls_of(module: Any, given: Examples) -> list[AttentionInputs]:
    """What each call of a padded batch hands to the operator."""
    hooks, calls = keeping()
    batch = {name: torch.from_numpy(array) for name, array in given.batch([0, 1, 2]).items() if name in given.padding}
    with install_hooks(module, hooks), torch.no_grad():
        module(**batch)
    assert len(hooks.calls) == len(calls)
    return calls


def test_each_call_of_an_encoder_is_described():
    model, encoded = tiny.encoder("bert"), tiny.context().encode("train", tiny.encoder("bert"))
    check = check_attention(model.module, encoded)
    assert check.refused is None and check.unfused == () and len(check.calls) == tiny.LAYERS
    call = calls_of(model.module, encoded)[0]
    assert call.query.shape[1] == tiny.HEADS and not call.causal and call.bias is None
    assert call.padding is not None and call.padding.shape == (3, call.key.shape[2])
    assert call.scale == pytest.approx((tiny.WIDTH / tiny.HEADS) ** -0.5)


def test_windows_causes_and_groups_are_told_apart():
    local = made(
        ModernBertForSequenceClassification,
        ModernBertConfig(
            **SHAPE,
            local_attention=4,
            global_attn_every_n_layers=2,
            cls_token_id=1,
            sep_token_id=2,
            bos_token_id=1,
            eos_token_id=2,
        ),
    )
    assert [call.padding is None for call in calls_of(local, examples())] == [False, True]
    assert [call.bias is None for call in calls_of(local, examples())] == [True, False]
    causal = made(Qwen3ForSequenceClassification, Qwen3Config(**DECODER, bos_token_id=1, eos_token_id=2))
    for call in calls_of(causal, examples()):
        assert call.causal and call.key.shape == call.query.shape == (3, 4, call.key.shape[2], 8)
        for tensor in (call.key, call.value):  # two heads of keys serve two of queries each
            torch.testing.assert_close(tensor[:, 0::2], tensor[:, 1::2], rtol=0, atol=0)
    assert check_attention(causal, examples()).refused is None


def test_a_soft_cap_is_computed_and_named():
    config = Gemma2Config(**DECODER, attn_logit_softcapping=5.0, sliding_window=64, bos_token_id=1, eos_token_id=2)
    check = check_attention(made(Gemma2ForSequenceClassification, config), examples())
    assert check.refused is None and check.unfused == ("soft cap of scores",)


def test_attention_past_the_interface_is_named():
    config = MPNetConfig(**SHAPE, bos_token_id=1, eos_token_id=2)
    check = check_attention(made(MPNetForSequenceClassification, config), examples())
    assert check.refused is None and check.calls == () and "without transformers' interface" in check.unfused[0]


def test_a_model_that_answers_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch):
    from transformers.models.bert import modeling_bert

    model = tiny.encoder("bert")
    encoded = tiny.context().encode("train", model)
    assert check_attention(model.module, encoded).refused is None

    def twice(module: nn.Module, query: torch.Tensor, key: torch.Tensor, *more: Any, **options: Any) -> Any:
        return nn.functional.scaled_dot_product_attention(query, key, 2 * more[0]).transpose(1, 2), None

    mapping = modeling_bert.ALL_ATTENTION_FUNCTIONS
    monkeypatch.setitem(mapping, model.module.config._attn_implementation, twice)
    check = check_attention(model.module, encoded)
    assert check.refused is not None and "its answers differ" in check.refused
    assert check_attention(model.module, encoded).unfused == (check.refused,)


def test_models_are_as_they_were_afterwards():
    module = tiny.encoder("bert").module
    implementations = [part.config._attn_implementation for part in module.modules() if hasattr(part, "config")]
    hooks = AttentionHooks(reference_attention)
    with pytest.raises(ZeroDivisionError), install_hooks(module, hooks):
        assert module.config._attn_implementation not in implementations
        raise ZeroDivisionError
    assert implementations == [part.config._attn_implementation for part in module.modules() if hasattr(part, "config")]
