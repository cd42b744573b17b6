"""Tests of UNet channel and block pruning: duplicated channels, published configs and numerical gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import tiny_unets
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from real_diffusion_configs import BK_SDM_BASE, BK_SDM_SMALL, BK_SDM_TINY, SD15_UNET, SDXL_UNET

from compress.plugins.diffusion.component_costs import build_component_on_meta, count_parameters
from compress.plugins.diffusion.denoiser_pruning import LossProbe, accumulate_gates, prune_unet
from compress.plugins.diffusion.noised_latents import NoiseProcess
from compress.plugins.diffusion.stages import PruneDenoiser
from compress.plugins.diffusion.unet_blocks import select_bk_sdm_blocks
from compress.plugins.diffusion.unet_channels import channel_sets, narrow_unet, tied_stages, width_steps
from compress.utils.errors import StageError
from compress.utils.progress import SilentProgress

KINDS: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "Stable Diffusion 1": (tiny_unets.conditional, (8, 16), {"layers_per_block": 2}),
    "Stable Diffusion XL": (
        tiny_unets.conditional,
        (8, 16),
        {"use_linear_projection": True, "transformer_layers_per_block": (1, 2)},
    ),
    "stages as wide as the next": (tiny_unets.conditional, (8, 16, 16), tiny_unets.THREE),
    "scale and shift": (tiny_unets.conditional, (8, 16), {"resnet_time_scale_shift": "scale_shift"}),
    "no middle": (tiny_unets.conditional, (8, 16), {"mid_block_type": None}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pruning_removes_exactly_the_duplicated_channels(kind, tmp_path):
    make, widths, changes = KINDS[kind]
    small, wide = tiny_unets.doubled(make, widths, **changes)
    expected = tiny_unets.answer(small)
    assert torch.allclose(tiny_unets.answer(wide), expected, atol=1e-4)
    sets = channel_sets(wide)
    gates = [(torch.arange(one.coupling.size) // one.unit % 2 == 0).float() for one in sets]
    narrow_unet(wide, sets, gates, widths).save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path)
    assert tuple(loaded.config.block_out_channels) == widths
    loaded_tensors = loaded.state_dict()
    for name, value in small.state_dict().items():
        near = 1e-3 if name == "time_embedding.linear_1.weight" else 0.0
        assert torch.allclose(loaded_tensors[name], value, atol=near, rtol=0), name
    assert torch.allclose(tiny_unets.answer(loaded), expected, atol=1e-3)


def test_selection_keeps_groups_equal_and_heads_whole():
    unet = tiny_unets.conditional(block_out_channels=(16, 32))
    sets = channel_sets(unet)
    torch.manual_seed(1)
    for one in sets:
        size = one.coupling.size
        channels = one.select(torch.randn(size), unet.config.block_out_channels[one.stage] // 2)
        assert channels.tolist() == sorted(set(channels.tolist())) and len(channels) == size // 2
        counts = torch.bincount(channels // (size // one.groups), minlength=one.groups)
        assert counts.tolist() == [len(channels) // one.groups] * one.groups
        assert set(torch.bincount(channels // one.unit).tolist()) <= {0, one.unit}
    assert {one.groups for one in sets} == {1, 2} and {one.unit for one in sets} == {1, 8, 16}


def test_channel_sets_cover_every_prunable_weight_axis():
    unet = tiny_unets.conditional(layers_per_block=2)
    covered: dict[tuple[str, str], set[int]] = {}
    for channel_set in channel_sets(unet):
        for part in channel_set.coupling.parts:
            for side in ("in", "out") if part.side == "both" else (part.side,):
                covered_features = covered.setdefault((part.layer, side), set())
                assert not covered_features & set(part.features.tolist()), part.layer
                covered_features |= set(part.features.tolist())
    fixed = {("conv_in", "in"), ("conv_out", "out")}
    for name, layer in unet.named_modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear) and not name.startswith("time_embedding"):
            for side, size in (("out", layer.weight.shape[0]), ("in", layer.weight.shape[1])):
                text = side == "in" and name.endswith(("attn2.to_k", "attn2.to_v"))
                time = side == "in" and name.endswith("time_emb_proj")
                if (name, side) not in fixed and not text and not time:
                    assert covered.get((name, side)) == set(range(size)), (name, side)


def test_width_steps_of_published_unets():
    for config, steps, tied in (
        (SD15_UNET, [160, 160, 160, 160], [[0], [1], [2, 3]]),
        (SDXL_UNET, [32, 64, 64], [[0], [1], [2]]),
    ):
        unet = build_component_on_meta(config)
        sets = channel_sets(unet)
        assert width_steps(unet, sets) == steps
        assert tied_stages(unet) == tied


def test_unknown_block_types_are_named():
    unet = tiny_unets.conditional(
        down_block_types=("CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"), attention_head_dim=4
    )
    with pytest.raises(StageError, match="SimpleCrossAttnDownBlock2D is not known"):
        channel_sets(unet)


def narrowed_at_random(unet, widths):
    sets = channel_sets(unet)
    return narrow_unet(unet, sets, [torch.rand(one.coupling.size) for one in sets], widths)


def test_narrowed_time_embedding_approximates_the_original():
    unet = tiny_unets.conditional(block_out_channels=(64, 128), attention_head_dim=4)
    original_layer = copy.deepcopy(unet.time_embedding.linear_1)
    steps = torch.arange(1000)
    sinusoids = unet.time_proj(steps)
    narrowed = narrowed_at_random(unet, (48, 96))
    with torch.no_grad():
        expected, embedded = original_layer(sinusoids), narrowed.time_embedding.linear_1(narrowed.time_proj(steps))
        spread = (expected - expected.mean(0)).square().mean()
    assert narrowed.time_proj(steps).shape == (1000, 48)
    # The highest frequencies are kept, and the lowest are nearly linear over 1000 timesteps.
    assert narrowed.config.freq_shift == -8
    assert float((embedded - expected).square().mean() / spread) < 1e-3


def test_narrowed_guidance_embedding_is_the_least_squares_fit():
    unet = tiny_unets.conditional(time_cond_proj_dim=6)
    embedding = unet.time_embedding
    with torch.no_grad():
        expected = embedding.linear_1.weight @ embedding.cond_proj.weight
    narrowed = narrowed_at_random(unet, (4, 8)).time_embedding
    assert narrowed.cond_proj.weight.shape == (4, 6)
    with torch.no_grad():
        off = narrowed.linear_1.weight @ narrowed.cond_proj.weight - expected
    # At the least-squares solution the residual is orthogonal to the columns of the layer.
    assert torch.allclose(narrowed.linear_1.weight.T @ off, torch.zeros(4, 6), atol=1e-4)
    assert float(off.norm()) < float(expected.norm())


@pytest.mark.parametrize(("size", "published"), [("base", BK_SDM_BASE), ("small", BK_SDM_SMALL), ("tiny", BK_SDM_TINY)])
def test_block_selection_equals_published_bk_sdm_configs(size, published):
    unet = build_component_on_meta(SD15_UNET)
    cut = select_bk_sdm_blocks(unet, size)
    assert count_parameters(cut) == {"base": 579_384_964, "small": 482_346_884, "tiny": 323_384_964}[size]
    for name, value in published.items():
        if not name.startswith("_"):
            cut_value = cut.config[name]
            assert (list(cut_value) if isinstance(cut_value, tuple) else cut_value) == value, name


def test_block_selection_copies_the_weights_that_bk_sdm_keeps(tmp_path):
    unet = tiny_unets.conditional(layers_per_block=2)
    cut = select_bk_sdm_blocks(unet, "small")
    by_hand = UNet2DConditionModel(**{**tiny_unets.SETTINGS, "layers_per_block": 1, "mid_block_type": None}).eval()
    state = by_hand.state_dict()
    for name in state:
        # Of three pairs in an up block the second is removed, so that the third becomes the second.
        whole = name
        if name.startswith("up_blocks") and (".resnets.1." in name or ".attentions.1." in name):
            whole = name.replace("resnets.1.", "resnets.2.").replace("attentions.1.", "attentions.2.")
        state[name] = unet.state_dict()[whole]
    by_hand.load_state_dict(state)
    cut.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(tiny_unets.answer(loaded), tiny_unets.answer(by_hand))
    assert count_parameters(loaded) < count_parameters(unet)


def test_innermost_stage_is_removed_only_if_widths_match():
    unet = tiny_unets.conditional(block_out_channels=(8, 16, 16), **tiny_unets.THREE)
    cut = select_bk_sdm_blocks(unet, "tiny")
    assert cut.config.block_out_channels == (8, 16) and cut.mid_block is None
    assert cut.down_blocks[1].downsamplers is None
    assert torch.equal(cut.up_blocks[0].resnets[0].conv1.weight, unet.up_blocks[1].resnets[0].conv1.weight)
    assert tiny_unets.answer(cut).shape == tiny_unets.answer(unet).shape
    apart = tiny_unets.conditional(block_out_channels=(8, 16, 24), **tiny_unets.THREE)
    with pytest.raises(StageError, match=r"up_blocks\.1\.resnets\.0"):
        select_bk_sdm_blocks(apart, "tiny")


def test_block_selection_without_effect_is_refused():
    unet = select_bk_sdm_blocks(tiny_unets.conditional(layers_per_block=2), "base")
    with pytest.raises(StageError, match="would leave this UNet as it is"):
        select_bk_sdm_blocks(unet, "base")


NOISING = NoiseProcess.from_scheduler(DDIMScheduler(prediction_type="v_prediction"))


def probes(rows: int = 3, count: int = 4, **more) -> LossProbe:
    return LossProbe.spaced(tiny_unets.latents(rows, **more), NOISING, count, batch_size=2, seed=5)


def test_gates_equal_numerical_gradients_summed_over_timesteps():
    unet = tiny_unets.conditional().double()
    examples = tiny_unets.latents(3)
    for row in examples.inputs:
        for name in row:
            row[name] = row[name].astype("float64")
    seen = LossProbe.spaced(examples, NOISING, 4, batch_size=2, seed=5)
    sets = channel_sets(unet)
    gates, timesteps = accumulate_gates(unet, sets, seen, 0.0, SilentProgress())
    assert timesteps == [125, 375, 625, 875]
    heads = next(index for index, one in enumerate(sets) if one.unit > 1)
    neurons = next(index for index, one in enumerate(sets) if one.times == 4)
    chosen, step = [heads, neurons, 0, len(sets) // 2], 1e-4
    for set_index in chosen:
        channel_set, channel = sets[set_index], sets[set_index].coupling.size // 2
        losses = []
        for sign in (1, -1):
            tensors_before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
            with torch.no_grad():
                for part in channel_set.coupling.readers:
                    features = part.features[part.channels == channel]
                    unet.get_submodule(part.layer).weight[:, features] *= 1 + sign * step
            losses.append(float(seen.losses(unet).sum()))
            unet.load_state_dict(tensors_before)
        slope = (losses[0] - losses[1]) / (2 * step)
        assert float(gates[set_index][channel]) == pytest.approx(slope, rel=1e-3, abs=1e-7)
        assert abs(slope) > 1e-6


def test_timesteps_with_relatively_small_loss_are_skipped():
    unet, seen = tiny_unets.conditional(), probes(count=6)
    losses = seen.losses(unet)
    threshold = float((losses.sort().values[2] + losses.sort().values[3]) / 2 / losses.max())
    _, timesteps = accumulate_gates(unet, [], seen, threshold, SilentProgress())
    assert timesteps == [
        step for step, loss in zip(seen.timesteps, losses.tolist(), strict=True) if loss in losses.topk(3).values
    ]
    assert len(timesteps) == 3


def test_probe_noise_is_fixed_and_leaves_the_global_rng_unchanged():
    unet, seen = tiny_unets.conditional(), probes()
    state = torch.get_rng_state()
    first = seen.losses(unet)
    torch.manual_seed(99)
    assert torch.equal(seen.losses(unet), first)
    torch.set_rng_state(state)
    seen.losses(unet)
    assert torch.equal(torch.get_rng_state(), state)


def test_unread_channels_are_pruned_first(tmp_path):
    small, wide = tiny_unets.doubled(tiny_unets.conditional, (8, 16))
    context = tiny.context(scratch=tmp_path)
    whole = copy.deepcopy(wide)
    share = 1 - count_parameters(small) / count_parameters(whole)
    settings = PruneDenoiser(parameters=share - 1e-6, timesteps=4, importance_examples=3)
    pruned = prune_unet(wide, settings, tiny_unets.latents(3), NOISING, context)
    assert torch.allclose(tiny_unets.answer(pruned), tiny_unets.answer(small), atol=1e-3)
    assert f"-> {count_parameters(small):,} parameters" in context.notes[-1]
    table, costs = context.tables
    assert costs.rows[0][1:] == (count_parameters(whole), count_parameters(small))
    assert [row[1] for row in table.rows] == pytest.approx([row[2] for row in table.rows], abs=1e-3)


def test_pruning_reaches_the_requested_share_of_parameters():
    unet = tiny_unets.conditional(block_out_channels=(8, 32))
    parameters_before = count_parameters(unet)
    few, given = {"timesteps": 3, "importance_examples": 2}, (tiny_unets.latents(2), NOISING, tiny.context())
    pruned = prune_unet(unet, PruneDenoiser(parameters=0.3, **few), *given)
    assert count_parameters(pruned) <= 0.7 * parameters_before
    assert tiny_unets.answer(pruned).isfinite().all()
    with pytest.raises(StageError, match=r"can remove .*, and not 99\.0%"):
        prune_unet(pruned, PruneDenoiser(parameters=0.99, **few), *given)
