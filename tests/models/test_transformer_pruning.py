"""Tests of removed heads, neurons and layers of transformers, against the whole model with zeroed weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cut_architectures import PRUNED_PARTS, build, trial
from torch import nn
from transformers import AutoModelForSequenceClassification

from compress.models import PRUNING_TESTED_TYPES
from compress.models.model import TorchModel
from compress.models.prune_dry_run import check_layer_selection, check_prunable
from compress.models.structure import blocks, stacks
from compress.models.transformer_pruning import HEADS_KEY, keep_heads, keep_layers, keep_neurons
from compress.tasks.registry import TASKS
from compress.utils.errors import ModelError, StageError

SIZE = tiny.WIDTH // tiny.HEADS
TEXTS = tiny.texts(24)
# Relative paths of the projections that read the heads and the neurons, as transformers names them.
BERT = ("encoder.layer", "attention.output.dense", "output.dense", "intermediate_size")
NAMES = {
    "bert": BERT,
    "roberta": BERT,
    "electra": BERT,
    "distilbert": ("transformer.layer", "attention.out_lin", "ffn.lin2", "hidden_dim"),
}


@pytest.fixture(params=list(NAMES))
def model(request: pytest.FixtureRequest) -> TorchModel:
    processor = tiny.byte_level() if request.param == "roberta" else tiny.word_piece()
    return tiny.encoder(request.param, processor=processor)


def family(model: TorchModel) -> tuple[str, str, str, str]:
    return NAMES[model.module.config.model_type]


def zeroed(model: TorchModel, output: str, kept: Sequence[Sequence[int]]) -> TorchModel:
    """Return a copy whose output projections ``output`` read only the features ``kept``."""
    other = copy.deepcopy(model)
    layers = other.module.base_model.get_submodule(family(model)[0])
    with torch.no_grad():
        for layer, features in zip(layers, kept, strict=True):
            weight = layer.get_submodule(output).weight
            gone = [index for index in range(weight.shape[1]) if index not in set(features)]
            weight[:, gone] = 0
    return other


def features_of_heads(heads: Sequence[int]) -> list[int]:
    return [head * SIZE + offset for head in heads for offset in range(SIZE)]


def close(model: TorchModel, expected: torch.Tensor) -> None:
    torch.testing.assert_close(tiny.logits(model, TEXTS), expected, rtol=1e-4, atol=1e-5)


HEADS = ((1, 3), (0,))
NEURONS = (tuple(range(0, 40, 4)), tuple(range(5, 15)))


def test_removed_heads_equal_zeroed_heads(model: TorchModel):
    expected = tiny.logits(zeroed(model, family(model)[1], [features_of_heads(heads) for heads in HEADS]), TEXTS)
    assert not torch.allclose(expected, tiny.logits(model, TEXTS), atol=1e-3)
    original = model.parameters()
    keep_heads(model.module, HEADS)
    close(model, expected)
    # A head has SIZE rows of three projections with their biases, and SIZE columns of the output projection.
    assert original - model.parameters() == (2 + 3) * SIZE * (4 * tiny.WIDTH + 3)
    assert [block.prunable_units for block in blocks(model.module)] == [2, 1]
    assert getattr(model.module.config, HEADS_KEY) == [2, 1]
    assert model.module.config.num_attention_heads == tiny.HEADS


def test_removed_neurons_equal_zeroed_neurons(model: TorchModel):
    expected = tiny.logits(zeroed(model, family(model)[2], NEURONS), TEXTS)
    assert not torch.allclose(expected, tiny.logits(model, TEXTS), atol=1e-3)
    original = model.parameters()
    keep_neurons(model.module, [torch.tensor(neurons) for neurons in NEURONS])
    close(model, expected)
    assert original - model.parameters() == tiny.LAYERS * (tiny.NEURONS - 10) * (2 * tiny.WIDTH + 1)
    assert getattr(model.module.config, family(model)[3]) == 10


def test_removed_layers_are_absent(model: TorchModel):
    layers = model.module.base_model.get_submodule(family(model)[0])
    expected = {name: tensor.clone() for name, tensor in layers[1].state_dict().items()}
    keep_layers(model.module, [1])
    assert len(layers) == 1 and model.module.config.num_hidden_layers == 1
    assert all(torch.equal(tensor, expected[name]) for name, tensor in layers[0].state_dict().items())
    assert {part.layer_idx for part in layers.modules() if hasattr(part, "layer_idx")} <= {0}


def test_removed_layer_equals_an_identity_layer():
    # A pre-computed identity: with zero attention and feed-forward output, a layer is two normalisations, which a
    # normalised input passes unchanged when weight and bias are 1 and 0.
    model = tiny.encoder("bert", num_hidden_layers=3)
    _pass_on(model.module.bert.encoder.layer[1])
    for layer in (model.module.bert.encoder.layer[0].output, model.module.bert.embeddings):
        torch.nn.init.ones_(layer.LayerNorm.weight)
        torch.nn.init.zeros_(layer.LayerNorm.bias)
    expected = tiny.logits(model, TEXTS)
    keep_layers(model.module, [0, 2])
    close(model, expected)


def _pass_on(layer: Any) -> None:
    for part in (layer.attention.output, layer.output):
        for parameter in (part.dense.weight, part.dense.bias, part.LayerNorm.bias):
            torch.nn.init.zeros_(parameter)
        torch.nn.init.ones_(part.LayerNorm.weight)


def test_head_pruned_model_loads_through_the_task(model: TorchModel, tmp_path: Path):
    keep_heads(model.module, HEADS)
    keep_neurons(model.module, [torch.tensor(neurons) for neurons in NEURONS])
    expected = tiny.logits(model, TEXTS)
    model.save(tmp_path)
    loaded = TorchModel.load(tmp_path, TASKS[tiny.TASK])
    torch.testing.assert_close(tiny.logits(loaded, TEXTS), expected, rtol=0, atol=0)
    assert [block.prunable_units for block in blocks(loaded.module)] == [2, 1]


def test_pruning_can_be_repeated(model: TorchModel, tmp_path: Path):
    keep_heads(model.module, HEADS)
    once = copy.deepcopy(model)
    keep_heads(model.module, ((1,), (0,)))
    expected = zeroed(once, family(model)[1], (range(SIZE, 2 * SIZE), range(SIZE)))
    close(model, tiny.logits(expected, TEXTS))
    keep_layers(model.module, [0])
    assert getattr(model.module.config, HEADS_KEY) == [1]
    model.save(tmp_path)
    close(TorchModel.load(tmp_path, TASKS[tiny.TASK]), tiny.logits(model, TEXTS))


def test_plain_transformers_loads_pruned_neurons_and_layers(model: TorchModel, tmp_path: Path):
    keep_neurons(model.module, [torch.tensor(neurons) for neurons in NEURONS])
    keep_layers(model.module, [0])
    expected = tiny.logits(model, TEXTS)
    model.save(tmp_path)
    module, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    loaded = TorchModel(module, model.processor)
    torch.testing.assert_close(tiny.logits(loaded, TEXTS), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kept", [[0, 2], [-1], [0, 0]])
def test_missing_layers_are_refused(kept: list[int]):
    model = tiny.encoder()
    with pytest.raises(StageError) as caught:
        keep_layers(model.module, kept)
    assert caught.value.expected == "distinct indices from 0 to 1"
    assert len(model.module.bert.encoder.layer) == 2


DESCRIBED = (
    *("llama", "gpt2", "gpt_neox", "falcon-new", "deepseek_v3", "stablelm2", "phi3", "lfm2", "gpt_bigcode"),
    *("deberta", "modernbert", "nystromformer", "beit", "swin", "segformer", "swinv2"),
)


@pytest.mark.parametrize("name", DESCRIBED)
@pytest.mark.parametrize("what", PRUNED_PARTS)
def test_pruned_model_equals_whole_model_with_zeroed_parts(name: str, what: str) -> None:
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
def test_unprunable_parts_are_refused_with_the_reason(name: str, what: str, reason: str) -> None:
    import re

    assert re.search(reason, trial(name, what))


def test_decoder_config_stores_the_number_of_heads() -> None:
    model, _ = build("llama")
    keep_heads(model, [[1], [0]])
    config: Any = model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 16)
    assert getattr(config, HEADS_KEY, None) is None


@pytest.mark.parametrize("name", ["gpt_neox", "falcon-new", "phi3", "deberta"])
def test_fused_qkv_projection_is_split_as_in_the_model(name: str) -> None:
    # With zero query and key rows attention is uniform over earlier tokens, so that the attention output of
    # the first token equals its own values.
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
    values = seen["joint"][..., attention.rows["value"].flatten()].unflatten(-1, (attention.groups, -1))
    expected = values.repeat_interleave(attention.heads // attention.groups, dim=-2).flatten(-2)
    if name != "deberta":
        torch.testing.assert_close(seen["attended"][:, 0], expected[:, 0], rtol=1e-4, atol=1e-5)
    else:
        assert seen["attended"].shape == expected.shape


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(StageError, match="No blocks were found in a Sequential"):
        stacks(nn.Sequential(nn.Linear(3, 4)))


def config_of(name: str, folder: Path) -> Path:
    build(name)[0].config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [*sorted(PRUNING_TESTED_TYPES), "deepseek_v3", "segformer"])
def test_prunable_configs_are_accepted(name: str, tmp_path: Path) -> None:
    check_prunable(config_of(name, tmp_path), layers=True, heads=0.4, neurons=0.5)


@pytest.mark.parametrize(
    ("name", "part", "reason"),
    [
        ("mpnet", "heads", r"all layers share relative_attention_bias|share encoder\.relative_attention_bias"),
        ("minicpm3", "layers", "cannot say which of layers are left"),
    ],
)
def test_unprunable_configs_are_refused_without_weights(name: str, part: str, reason: str, tmp_path: Path) -> None:
    shares = {"layers": 0.0, "heads": 0.0, "neurons": 0.0, part: 0.5}
    with pytest.raises(StageError, match=reason):
        check_prunable(config_of(name, tmp_path), **shares)


def test_keeping_missing_layers_is_refused(tmp_path: Path) -> None:
    folder = config_of("bert", tmp_path)
    check_layer_selection(folder, (1,))
    with pytest.raises(StageError, match=r"Layers \[0, 2\] cannot be kept"):
        check_layer_selection(folder, (0, 2))


def test_invalid_config_is_reported(tmp_path: Path) -> None:
    folder = config_of("bert", tmp_path)
    text = (folder / "config.json").read_text().replace('"num_attention_heads": 4', '"num_attention_heads": 5')
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"transformers cannot build a model from this config: The hidden size"):
        check_prunable(folder, layers=False, heads=0.5, neurons=0.0)


def test_folder_without_a_model_is_skipped(tmp_path: Path) -> None:
    check_prunable(tmp_path, layers=True, heads=0.4, neurons=0.5)


@pytest.mark.parametrize(("heads", "says"), [(0.1, "heads 0.1 would remove nothing"), (0.9, "leaves none")])
def test_shares_of_no_head_or_all_heads_are_refused(heads: float, says: str, tmp_path: Path) -> None:
    """A tenth of a few heads rounds to none of them; nine tenths round to all."""
    with pytest.raises(StageError, match=says):
        check_prunable(config_of("bert", tmp_path), layers=False, heads=heads, neurons=0.0)
