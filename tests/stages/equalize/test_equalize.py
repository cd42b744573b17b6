"""Tests of `equalize`: unchanged logits, equal column ranges, and lower quantization error at few bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import Notes, context, module_of, save_decoder, some_ids
from torch import nn

from compress.models.checkpoint import Checkpoint
from compress.stages.equalize.equalization import equalizing, find_folds, share
from compress.stages.equalize.stage import Equalize
from compress.stages.gptq.stage import Gptq
from compress.utils.errors import ModelError, StageError

IDS = some_ids(3, 20, seed=5)
ATTENTION = ["q_proj", "k_proj", "v_proj"]


def uneven(folder: Path, config: str = "LlamaConfig", **changes: Any) -> Checkpoint:
    """Save a decoder whose linear layers have columns of very different magnitudes."""
    source = save_decoder(folder / "even", config, **changes)
    module = module_of(source)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for part in module.model.layers.modules():
            if isinstance(part, nn.Linear):
                part.weight.mul_(torch.randn(part.in_features, generator=generator).mul_(0.8).exp_())
    module.save_pretrained(folder / "source")
    source.folder.joinpath("tokenizer.json").rename(folder / "source" / "tokenizer.json")
    source.folder.joinpath("tokenizer_config.json").rename(folder / "source" / "tokenizer_config.json")
    return Checkpoint(folder / "source")


def equalized(source: Checkpoint, scratch: Path, notes: Notes | None = None, **fields: Any) -> Checkpoint:
    return Equalize(**fields).run(source, context(scratch, progress=notes))


@torch.no_grad()
def logits(checkpoint: Checkpoint) -> torch.Tensor:
    return module_of(checkpoint)(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("config", "left_alone"),
    [
        ("LlamaConfig", 0),
        ("Qwen2Config", 0),  # biases of q, k, v
        ("Qwen3Config", 0),  # norms of heads, head_dim apart from the width
        ("Gemma2Config", 0),  # norms that multiply by 1 + weight
        ("PhiConfig", 2),  # one norm for attention and feed-forward; factors cannot pass through its GELU
        ("Phi3Config", 4),  # fused layers
        ("OlmoConfig", 10),  # norms without weights
    ],
)
def test_logits_are_preserved(config: str, left_alone: int, tmp_path: Path) -> None:
    source, notes = uneven(tmp_path, config), Notes()
    result = equalized(source, tmp_path / "scratch", notes)
    logits_before, after = logits(source), logits(result)
    assert float((after - logits_before).abs().max()) < 1e-4 * float(logits_before.std())
    linear = [name for name in source.files if name.endswith("proj.weight") or name.endswith("fc1.weight")]
    assert any(not torch.equal(result.stored(name), source.stored(name)) for name in linear)
    remark = notes.said[-1].partition("unchanged: ")[2]
    assert remark.startswith(f"{left_alone} layers") if left_alone else remark == "", notes.said[-1]


def test_column_ranges_become_equal(tmp_path: Path) -> None:
    source = uneven(tmp_path)
    result = equalized(source, tmp_path / "scratch", strength=1.0)
    layer = "model.layers.1.self_attn"

    def sizes(checkpoint: Checkpoint) -> torch.Tensor:
        rows = torch.cat([checkpoint.weight(f"{layer}.{name}") for name in ATTENTION[:2]])
        return rows.square().mean(0).sqrt()

    # v's rows were divided to equalize o; the columns of q and k have the factors of all three.
    stacked = torch.cat([source.weight(f"{layer}.{name}") for name in ATTENTION])
    factors = stacked.square().mean(0).rsqrt()
    factors = factors / factors.log().mean().exp()
    torch.testing.assert_close(sizes(result), sizes(source) * factors)
    norm = "model.layers.1.input_layernorm.weight"
    torch.testing.assert_close(result.stored(norm), source.stored(norm) / factors)
    spread = [float(column_sizes.max() / column_sizes.min()) for column_sizes in (sizes(source), sizes(result))]
    assert spread[0] > 10 and spread[1] < spread[0] / 3


def test_heads_that_share_values_share_factors(tmp_path: Path) -> None:
    source = uneven(tmp_path)
    result = equalized(source, tmp_path / "scratch")
    name = "model.layers.0.self_attn.o_proj"
    # Four query heads of 16 read two heads of values: columns 0-15 and 16-31 the first.
    factors = (result.weight(name) / source.weight(name)).median(0).values.view(2, 2, 16)
    torch.testing.assert_close(factors[:, 0], factors[:, 1], rtol=1e-4, atol=0)
    sizes = source.weight(name).square().mean(0).sqrt().view(2, 2, 16).log().mean(1)
    expected = (-0.5 * (sizes - sizes.mean())).exp()
    torch.testing.assert_close(factors[:, 0], expected, rtol=1e-4, atol=0)


def test_factors_match_hand_computation() -> None:
    weight = torch.tensor([[1.0, 2.0, 0.0, 16.0], [1.0, 2.0, 0.0, 16.0]])
    apart = torch.arange(4)
    # Sizes 1, 2, 0, 16 about their geometric mean 32^(1/3); a column of zeros has no size.
    factors = equalizing([weight], 1.0, apart)
    ratios = torch.tensor([1.0, 1 / 2, 32 ** (-1 / 3), 1 / 16]) / factors
    torch.testing.assert_close(ratios, ratios[:1].expand(4))
    assert float(factors.log().sum()) == pytest.approx(0, abs=1e-6)
    pairs = share(torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(pairs, torch.tensor([-1.0, -1.0, 1.0, 1.0]).exp())


class Doubtful(nn.Module):
    """``first`` feeds ``second`` and, if ``used_twice``, also the sum, so that its factor cannot be folded."""

    def __init__(self, used_twice: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.used_twice = used_twice

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        projected = self.first(hidden)
        return self.second(projected * 1.0) + (projected if self.used_twice else 0)


@pytest.mark.parametrize("used_twice", [False, True])
def test_output_with_a_second_reader_is_not_folded(used_twice: bool) -> None:
    block, hidden = Doubtful(used_twice), torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    parameters_before = [parameter.clone() for parameter in block.parameters()]
    folds, alone = find_folds(dict(block.named_children()), lambda: block(hidden), 4)
    assert [(fold.consumers, fold.source) for fold in folds] == ([] if used_twice else [(("second",), "first")])
    assert alone == (["first", "second"] if used_twice else ["first"])
    assert all(
        torch.equal(unchanged, other) for unchanged, other in zip(parameters_before, block.parameters(), strict=True)
    )


def test_layers_that_cannot_be_equalized_are_reported(tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source")
    quantized = Gptq(method="rtn", group_size=32).run(source, context(tmp_path / "quantized"))
    with pytest.raises(ModelError, match="quantized already"):
        equalized(Checkpoint(quantized.folder), tmp_path / "scratch")


def test_changed_half_precision_tensors_become_float32(tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source", dtype=torch.bfloat16)
    result = equalized(source, tmp_path / "scratch")
    assert result.stored("model.layers.0.mlp.up_proj.weight").dtype == torch.float32
    assert result.stored("model.embed_tokens.weight").dtype == torch.bfloat16
    logits_before, after = logits(source), logits(result)
    assert float((after - logits_before).abs().max()) < 1e-4 * float(logits_before.std())


def test_architecture_without_foldable_layers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.stages.equalize.equalization.find_folds", lambda *_: ([], ["x"]))
    with pytest.raises(StageError, match="Nothing could be equalized"):
        equalized(save_decoder(tmp_path / "source"), tmp_path / "scratch")


def test_transposed_layers_stay_transposed(tmp_path: Path) -> None:
    import tiny_decoders

    tiny_decoders.save("gpt2", tmp_path / "model")
    source = Checkpoint(tmp_path / "model")
    expected, result = logits(source), logits(equalized(source, tmp_path / "scratch"))
    assert float((result - expected).abs().max() / expected.abs().max()) < 1e-4
