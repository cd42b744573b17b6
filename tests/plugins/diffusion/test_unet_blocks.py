"""Blocks cut out of diffusers' UNets: against BK-SDM's published configs, and a UNet made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_unets
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from real_diffusion_configs import BK_SDM_BASE, BK_SDM_SMALL, BK_SDM_TINY, SD15_UNET

from compress.plugins.diffusion.component_costs import hollow_part, parameters
from compress.plugins.diffusion.unet_blocks import KeptBlocks, all_blocks, bk_sdm_blocks, keep_blocks, shared_blocks
from compress.utils.errors import StageError


@pytest.mark.parametrize(("size", "published"), [("base", BK_SDM_BASE), ("small", BK_SDM_SMALL), ("tiny", BK_SDM_TINY)])
def test_stable_diffusion_is_cut_to_the_published_configs(size, published):
    unet = hollow_part(SD15_UNET)
    cut, expected_unet = keep_blocks(unet, bk_sdm_blocks(unet, size)), hollow_part(published)
    shapes = [
        {name: tensor.shape for name, tensor in compared.state_dict().items()} for compared in (cut, expected_unet)
    ]
    assert shapes[0] == shapes[1]
    assert parameters(cut) == {"base": 579_384_964, "small": 482_346_884, "tiny": 323_384_964}[size]
    for name, value in published.items():
        if not name.startswith("_"):
            cut_value = cut.config[name]
            assert (list(cut_value) if isinstance(cut_value, tuple) else cut_value) == value, name


def test_what_is_left_computes_with_the_weights_of_the_paper(tmp_path):
    unet = tiny_unets.conditional(layers_per_block=2)
    cut = keep_blocks(unet, bk_sdm_blocks(unet, "small"))
    by_hand = UNet2DConditionModel(**{**tiny_unets.SETTINGS, "layers_per_block": 1, "mid_block_type": None}).eval()
    state = by_hand.state_dict()
    for name in state:
        # Of three pairs on the way up the second goes, and the third is second now.
        whole = name
        if name.startswith("up_blocks") and (".resnets.1." in name or ".attentions.1." in name):
            whole = name.replace("resnets.1.", "resnets.2.").replace("attentions.1.", "attentions.2.")
        state[name] = unet.state_dict()[whole]
    by_hand.load_state_dict(state)
    cut.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(tiny_unets.answer(loaded), tiny_unets.answer(by_hand))
    assert parameters(loaded) < parameters(unet)


def test_the_innermost_stage_goes_where_the_next_is_as_wide():
    unet = tiny_unets.conditional(block_out_channels=(8, 16, 16), **tiny_unets.THREE)
    cut = keep_blocks(unet, bk_sdm_blocks(unet, "tiny"))
    assert cut.config.block_out_channels == (8, 16) and cut.mid_block is None
    assert cut.down_blocks[1].downsamplers is None
    assert torch.equal(cut.up_blocks[0].resnets[0].conv1.weight, unet.up_blocks[1].resnets[0].conv1.weight)
    assert tiny_unets.answer(cut).shape == tiny_unets.answer(unet).shape
    apart = tiny_unets.conditional(block_out_channels=(8, 16, 24), **tiny_unets.THREE)
    with pytest.raises(StageError, match=r"up_blocks\.1\.resnets\.0"):
        keep_blocks(apart, bk_sdm_blocks(apart, "tiny"))


def test_pairs_go_only_where_what_is_left_can_be_joined():
    unet = tiny_unets.conditional(layers_per_block=2)
    whole = all_blocks(unet)
    assert whole == KeptBlocks(((0, 1), (0, 1)), ((0, 1, 2), (0, 1, 2)), True)
    removable = {
        (stage, down, up): shared_blocks(unet, whole.without(stage, down, up)) is not None
        for stage in (0, 1)
        for down in (0, 1)
        for up in (0, 1, 2)
    }
    # Of stage 0 (8 channels) the first pair up reads 16 of the stage below; of stage 1 (16) the first pair down reads
    # 8, and the last pair up 8 of what stage 0 skipped.
    assert {key for key, possible in removable.items() if possible} == {
        *((0, down, up) for down in (0, 1) for up in (1, 2)),
        *((1, 1, up) for up in (0, 1)),
    }


def test_one_stage_may_lose_a_pair_alone():
    unet = tiny_unets.conditional(layers_per_block=2)
    cut = keep_blocks(unet, all_blocks(unet).without(1, 1, 1))
    assert tuple(cut.config.layers_per_block) == (2, 1)
    assert torch.equal(cut.up_blocks[0].resnets[1].conv2.weight, unet.up_blocks[0].resnets[2].conv2.weight)
    assert torch.equal(cut.up_blocks[1].resnets[1].conv2.weight, unet.up_blocks[1].resnets[1].conv2.weight)
    assert tiny_unets.answer(cut).isfinite().all()


def test_a_copy_leaves_the_whole_one_as_it_was_and_a_look_shares_its_weights():
    unet = tiny_unets.conditional(layers_per_block=2)
    kept_blocks = bk_sdm_blocks(unet, "base")
    look = shared_blocks(unet, kept_blocks)
    assert look is not None and look.conv_in.weight.data_ptr() == unet.conv_in.weight.data_ptr()
    assert keep_blocks(unet, kept_blocks).conv_in.weight.data_ptr() != unet.conv_in.weight.data_ptr()


def test_unconditional_unets_lose_pairs_of_every_stage():
    unet = tiny_unets.unconditional(layers_per_block=2)
    cut = keep_blocks(unet, bk_sdm_blocks(unet, "small"))
    assert isinstance(cut, UNet2DModel) and cut.mid_block is None
    assert tiny_unets.answer(cut).shape == tiny_unets.answer(unet).shape
    with pytest.raises(StageError, match=r"as many layers in each stage, and \[2, 1\]"):
        keep_blocks(unet, all_blocks(unet).without(1, 1, 1))


def test_transformer_layers_by_attention_go_with_their_pair():
    nested: dict[str, Any] = {
        "transformer_layers_per_block": ((1, 1), (1, 2)),
        "reverse_transformer_layers_per_block": ((1, 2, 1), (1, 1, 1)),
    }
    unet = tiny_unets.conditional(layers_per_block=2, **nested)
    cut = keep_blocks(unet, all_blocks(unet).without(1, 1, 1))
    assert cut.config.transformer_layers_per_block == ((1, 1), (1,))
    assert cut.config.reverse_transformer_layers_per_block == ((1, 1), (1, 1, 1))
    assert tiny_unets.answer(cut).isfinite().all()


def test_nothing_to_remove_is_said():
    unet = keep_blocks(whole := tiny_unets.conditional(layers_per_block=2), bk_sdm_blocks(whole, "base"))
    with pytest.raises(StageError, match="would leave this UNet as it is"):
        bk_sdm_blocks(unet, "base")
