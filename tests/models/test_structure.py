"""Models of many architectures whose heads, neurons or layers are cut, against the whole ones without these."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cut_architectures import CUTS, build, trial
from torch import nn

from compress.models.structure import blocks, stacks
from compress.models.transformer_pruning import HEADS_KEY, keep_heads
from compress.utils.errors import StageError

DESCRIBED = (
    *("llama", "gpt2", "gpt_neox", "falcon-new", "deepseek_v3", "stablelm2", "phi3", "lfm2", "gpt_bigcode"),
    *("deberta", "modernbert", "nystromformer", "beit", "swin", "segformer", "swinv2"),
)


@pytest.mark.parametrize("name", DESCRIBED)
@pytest.mark.parametrize("what", CUTS)
def test_a_cut_model_answers_as_the_whole_one_without_what_went(name: str, what: str) -> None:
    assert trial(name, what) == ""


@pytest.mark.parametrize(
    ("name", "what", "reason"),
    [
        ("olmo2", "heads", "q_norm normalises all of them at once"),
        ("bloom", "heads", r"follows from the number of heads \(ALiBi\)"),
        ("mpnet", "heads", r"all layers share mpnet\.encoder\.relative_attention_bias"),
        ("convbert", "heads", "comes from a convolution"),
        ("mamba", "heads", "Heads cannot be distinguished in the attention of backbone.layers.0"),
        ("mixtral", "neurons", "has no feed-forward layer that can be cut"),
        ("minicpm3", "layers", "cannot say which of model.layers are left"),
    ],
)
def test_what_cannot_go_is_refused_with_the_reason(name: str, what: str, reason: str) -> None:
    import re

    assert re.search(reason, trial(name, what))


def test_a_decoder_s_own_config_says_how_many_heads_are_left() -> None:
    model, _ = build("llama")
    keep_heads(model, [[1], [0]])
    config: Any = model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 16)
    assert getattr(config, HEADS_KEY, None) is None


@pytest.mark.parametrize("name", ["gpt_neox", "falcon-new", "phi3", "deberta"])
def test_a_joint_projection_is_told_apart_as_the_model_itself_does(name: str) -> None:
    # Rows of values alone: with zeros for the others, attention is uniform over what came before, and the output of
    # the first token is the projection back of its own values.
    model, answer = build(name)
    attention = blocks(model)[0].require_attention()
    seen: dict[str, torch.Tensor] = {}
    attention.value.register_forward_hook(lambda _, __, output: seen.update(joint=output))
    attention.output.register_forward_pre_hook(lambda _, given: seen.update(attended=given[0]))
    with torch.no_grad():
        for part in ("query", "key"):
            attention.value.weight[attention.rows[part].flatten()] = 0
            if attention.value.bias is not None:
                attention.value.bias[attention.rows[part].flatten()] = 0
    answer(model)
    values = attention.of("value", seen["joint"]).unflatten(-1, (attention.groups, -1))
    expected = values.repeat_interleave(attention.heads // attention.groups, dim=-2).flatten(-2)
    if name != "deberta":
        torch.testing.assert_close(seen["attended"][:, 0], expected[:, 0], rtol=1e-4, atol=1e-5)
    else:
        assert seen["attended"].shape == expected.shape


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(StageError, match="No blocks were found in a Sequential"):
        stacks(nn.Sequential(nn.Linear(3, 4)))
