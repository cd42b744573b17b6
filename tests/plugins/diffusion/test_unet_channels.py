"""Channels cut out of diffusers' UNets: one with twins of every channel becomes the one without, weight by weight."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_unets
import torch
from real_diffusion_configs import SD15_UNET, SDXL_UNET

from compress.plugins.diffusion.component_costs import hollow_part
from compress.plugins.diffusion.narrow_unet import check_widths, narrow, tied_stages, width_steps
from compress.plugins.diffusion.unet_channels import channel_sets
from compress.utils.errors import StageError

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
    "unconditional": (tiny_unets.unconditional, (8, 16), {}),
    "resampled by resnets": (
        tiny_unets.unconditional,
        (8, 16),
        {
            "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
            "downsample_type": "resnet",
            "upsample_type": "resnet",
        },
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_twins_of_channels_heads_and_neurons_go_and_nothing_else(kind, tmp_path):
    make, widths, changes = KINDS[kind]
    small, wide = tiny_unets.doubled(make, widths, **changes)
    expected = tiny_unets.answer(small)
    assert torch.allclose(tiny_unets.answer(wide), expected, atol=1e-4)
    sets = channel_sets(wide)
    gates = []
    for channel_set in sets:
        assert channel_set.coupling.size % (2 * channel_set.unit) == 0
        units = torch.arange(channel_set.coupling.size) // channel_set.unit
        gates.append((units % 2 == 0).float())
    narrowed = narrow(wide, sets, gates, widths)
    narrowed.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path)
    assert loaded.config.block_out_channels == (
        list(widths) if isinstance(loaded.config.block_out_channels, list) else widths
    )
    loaded_tensors = loaded.state_dict()
    for name, value in small.state_dict().items():
        near = 1e-3 if name == "time_embedding.linear_1.weight" else 0.0
        assert torch.allclose(loaded_tensors[name], value, atol=near, rtol=0), name
    assert torch.allclose(tiny_unets.answer(loaded), expected, atol=1e-3)


def test_as_many_stay_of_each_group_and_heads_stay_whole():
    unet = tiny_unets.conditional(block_out_channels=(16, 32))
    sets = channel_sets(unet)
    torch.manual_seed(1)
    for channel_set in sets:
        width = unet.config.block_out_channels[channel_set.stage] // 2
        kept_channels = channel_set.kept(torch.randn(channel_set.coupling.size), width)
        assert len(kept_channels) == channel_set.coupling.size // 2 == len(set(kept_channels.tolist()))
        assert torch.equal(kept_channels, kept_channels.sort().values)
        counts = torch.bincount(
            kept_channels // (channel_set.coupling.size // channel_set.groups), minlength=channel_set.groups
        )
        assert counts.tolist() == [len(kept_channels) // channel_set.groups] * channel_set.groups
        assert set(torch.bincount(kept_channels // channel_set.unit).tolist()) <= {0, channel_set.unit}
    assert {channel_set.groups for channel_set in sets} == {1, 2} and {channel_set.unit for channel_set in sets} == {
        1,
        8,
        16,
    }


def test_every_weight_that_a_width_decides_belongs_to_a_set():
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


def test_published_unets_are_cut_by_groups_and_heads():
    for config, steps, tied in (
        (SD15_UNET, [160, 160, 160, 160], [[0], [1], [2, 3]]),
        (SDXL_UNET, [32, 64, 64], [[0], [1], [2]]),
    ):
        unet = hollow_part(config)
        sets = channel_sets(unet)
        assert width_steps(unet, sets) == steps
        assert tied_stages(unet) == tied


def test_widths_that_the_config_cannot_say_are_refused():
    unet = tiny_unets.conditional(block_out_channels=(16, 32))
    sets = channel_sets(unet)
    with pytest.raises(StageError, match=r"\[16, 32\] channels cannot be cut to \[16, 24\]"):
        check_widths(unet, (16, 24), sets)
    with pytest.raises(StageError, match="would have 16 and 16"):
        check_widths(unet, (16, 16), sets)
    with pytest.raises(StageError, match="cannot be cut to"):
        check_widths(unet, (32, 32), sets)


def test_blocks_that_are_not_known_are_named():
    unet = tiny_unets.conditional(
        down_block_types=("CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"), attention_head_dim=4
    )
    with pytest.raises(StageError, match="SimpleCrossAttnDownBlock2D is not known"):
        channel_sets(unet)


def test_fewer_sinusoids_tell_nearly_the_same_time():
    unet = tiny_unets.conditional(block_out_channels=(64, 128), attention_head_dim=4)
    original_layer = copy.deepcopy(unet.time_embedding.linear_1)
    steps = torch.arange(1000)
    sinusoids = unet.time_proj(steps)
    sets = channel_sets(unet)
    narrowed = narrow(unet, sets, [torch.rand(channel_set.coupling.size) for channel_set in sets], (48, 96))
    with torch.no_grad():
        expected, embedded = original_layer(sinusoids), narrowed.time_embedding.linear_1(narrowed.time_proj(steps))
        spread = (expected - expected.mean(0)).square().mean()
    assert narrowed.time_proj(steps).shape == (1000, 48)
    # The highest frequencies are as before, and the lowest are nearly straight lines over a thousand steps.
    assert narrowed.config.freq_shift == -8
    assert float((embedded - expected).square().mean() / spread) < 1e-3


def test_what_a_denoiser_is_told_of_guidance_is_read_as_nearly_as_can_be():
    unet = tiny_unets.conditional(time_cond_proj_dim=6)
    embedding = unet.time_embedding
    with torch.no_grad():
        expected = embedding.linear_1.weight @ embedding.cond_proj.weight
    sets = channel_sets(unet)
    narrowed = narrow(
        unet, sets, [torch.rand(channel_set.coupling.size) for channel_set in sets], (4, 8)
    ).time_embedding
    assert narrowed.cond_proj.weight.shape == (4, 6)
    with torch.no_grad():
        off = narrowed.linear_1.weight @ narrowed.cond_proj.weight - expected
    # What is left of the difference is none that the layer could read.
    assert torch.allclose(narrowed.linear_1.weight.T @ off, torch.zeros(4, 6), atol=1e-4)
    assert float(off.norm()) < float(expected.norm())
