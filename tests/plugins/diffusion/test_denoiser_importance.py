"""Importance of a UNet's channels and blocks: against finite differences, brute force, and twins that do nothing."""

from __future__ import annotations

import copy

import pytest
import tiny
import tiny_unets
import torch
from diffusers import DDIMScheduler

from compress.plugins.diffusion.component_costs import parameters
from compress.plugins.diffusion.denoiser_importance import Probes, gates_over_timesteps
from compress.plugins.diffusion.denoiser_pruning import least_missed, prune_unet
from compress.plugins.diffusion.noised_latents import Noising
from compress.plugins.diffusion.stage_settings import DenoiserPruning
from compress.plugins.diffusion.unet_blocks import all_blocks, shared_blocks
from compress.plugins.diffusion.unet_channels import channel_sets
from compress.utils.errors import StageError
from compress.utils.progress import SilentProgress

NOISING = Noising.of(DDIMScheduler(prediction_type="v_prediction"))


def probes(rows: int = 3, count: int = 4, **more) -> Probes:
    return Probes.spaced(tiny_unets.latents(rows, **more), NOISING, count, batch_size=2, seed=5)


def test_gates_are_the_slopes_of_the_loss_summed_over_timesteps():
    unet = tiny_unets.conditional().double()
    examples = tiny_unets.latents(3)
    for row in examples.inputs:
        for name in row:
            row[name] = row[name].astype("float64")
    seen = Probes.spaced(examples, NOISING, 4, batch_size=2, seed=5)
    sets = channel_sets(unet)
    gates, timesteps = gates_over_timesteps(unet, sets, seen, 0.0, SilentProgress())
    assert timesteps == [125, 375, 625, 875]
    chosen = [set_index for set_index, channel_set in enumerate(sets) if channel_set.unit > 1][:1]
    chosen += [
        next(set_index for set_index, channel_set in enumerate(sets) if channel_set.times == 4),
        0,
        len(sets) // 2,
    ]
    step = 1e-4
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


def test_timesteps_whose_loss_is_small_beside_the_largest_are_left_out():
    unet, seen = tiny_unets.conditional(), probes(count=6)
    losses = seen.losses(unet)
    threshold = float((losses.sort().values[2] + losses.sort().values[3]) / 2 / losses.max())
    _, timesteps = gates_over_timesteps(unet, [], seen, threshold, SilentProgress())
    assert timesteps == [
        step for step, loss in zip(seen.timesteps, losses.tolist(), strict=True) if loss in losses.topk(3).values
    ]
    assert len(timesteps) == 3


def test_the_same_noise_comes_again_and_training_draws_none_of_it():
    unet, seen = tiny_unets.conditional(), probes()
    state = torch.get_rng_state()
    first = seen.losses(unet)
    torch.manual_seed(99)
    assert torch.equal(seen.losses(unet), first)
    torch.set_rng_state(state)
    seen.losses(unet)
    assert torch.equal(torch.get_rng_state(), state)


def test_channels_that_nobody_reads_go_first(tmp_path):
    small, wide = tiny_unets.doubled(tiny_unets.conditional, (8, 16))
    context = tiny.context(scratch=tmp_path)
    whole = copy.deepcopy(wide)
    settings = DenoiserPruning(channels=0.5, timesteps=4, importance_examples=3)
    pruned = prune_unet(wide, settings, tiny_unets.latents(3), NOISING, context)
    assert torch.allclose(tiny_unets.answer(pruned), tiny_unets.answer(small), atol=1e-3)
    assert f"-> {parameters(small):,} parameters" in context.notes[-1]
    table, costs = context.tables
    assert costs.rows[0][1:] == (parameters(whole), parameters(small))
    assert [row[1] for row in table.rows] == pytest.approx([row[2] for row in table.rows], abs=1e-3)


def test_a_share_of_parameters_goes_where_least_is_lost():
    unet = tiny_unets.conditional(block_out_channels=(8, 32))
    parameters_before = parameters(unet)
    context = tiny.context()
    pruned = prune_unet(
        unet,
        DenoiserPruning(parameters=0.3, timesteps=3, importance_examples=2),
        tiny_unets.latents(2),
        NOISING,
        context,
    )
    assert parameters(pruned) <= 0.7 * parameters_before
    assert tiny_unets.answer(pruned).isfinite().all()
    with pytest.raises(StageError, match=r"can remove .*, and not 99\.0%"):
        prune_unet(
            pruned,
            DenoiserPruning(flops=0.99, timesteps=3, importance_examples=2),
            tiny_unets.latents(2),
            NOISING,
            context,
        )


def test_the_pair_goes_without_which_the_loss_is_least():
    unet, seen = tiny_unets.conditional(layers_per_block=2), probes(rows=2, count=2)
    whole = all_blocks(unet)
    tried = {}
    for stage in (0, 1):
        for down in (0, 1):
            for up in (0, 1, 2):
                kept_blocks = whole.without(stage, down, up)
                if (candidate := shared_blocks(unet, kept_blocks)) is not None:
                    tried[kept_blocks] = seen.loss(candidate)
    kept_blocks, removed = least_missed(unet, 1, middle=False, judge=seen.loss)
    assert kept_blocks == min(tried, key=tried.__getitem__)
    assert removed[0].loss == pytest.approx(min(tried.values()))
    assert len(set(tried.values())) > 1


def test_the_middle_goes_where_it_is_missed_least():
    unet = tiny_unets.conditional(layers_per_block=(1, 2))
    with torch.no_grad():
        # Where nothing is added to what comes in, the middle does nothing.
        for layer in (*(resnet.conv2 for resnet in unet.mid_block.resnets), unet.mid_block.attentions[0].proj_out):
            layer.weight.zero_()
            layer.bias.zero_()
    whole = tiny_unets.answer(unet)

    def apart(tried):
        return float((tiny_unets.answer(tried) - whole).square().mean())

    kept_blocks, (first, second) = least_missed(unet, 2, middle=True, judge=apart)
    assert first.what == "the block in the middle" and not kept_blocks.middle
    assert first.loss == 0.0 < second.loss
    assert least_missed(unet, 1, middle=False, judge=apart)[0].middle
    with pytest.raises(StageError, match="Only 2 blocks of this UNet can go, and 3 are to"):
        least_missed(unet, 3, middle=True, judge=lambda _: 0.0)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "blocks or pairs"),
        ({"channels": 0.5, "flops": 0.5}, "one of channels"),
        ({"blocks": "bk-sdm-base", "pairs": 1}, "which the loss chooses"),
        ({"middle": True, "channels": 0.5}, "pairs, one of which"),
    ],
)
def test_settings_that_ask_for_nothing_or_two_things_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        DenoiserPruning(**fields)
