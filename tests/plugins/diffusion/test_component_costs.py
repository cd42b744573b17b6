"""Costs of published pipelines' parts by their configs: counts that are known, and sums done by hand."""

from __future__ import annotations

import pytest
import torch
from real_diffusion_configs import BK_SDM_BASE, BK_SDM_TINY, SD15_UNET, SD_VAE, SDXL_UNET
from torch import nn

from compress.plugins.diffusion.component_costs import _Alive, hollow_part, multiplications, parameters, part_costs
from compress.utils.errors import ModelError

SMALL = {
    "_class_name": "AutoencoderTiny",
    "encoder_block_out_channels": [8, 8],
    "decoder_block_out_channels": [8, 8],
    "num_encoder_blocks": [1, 1],
    "num_decoder_blocks": [1, 1],
}


@pytest.mark.parametrize(
    ("config", "count"), [(SD15_UNET, 859_520_964), (SDXL_UNET, 2_567_463_684), (SD_VAE, 83_653_863)]
)
def test_published_models_have_their_published_counts(config, count):
    assert parameters(hollow_part(config)) == count


@pytest.mark.parametrize(
    ("config", "blocks", "published"),
    [(SD15_UNET, (5, 5, 5, 1), 339), (BK_SDM_BASE, (3, 3, 3, 1), 224), (BK_SDM_TINY, (3, 3, 3, 0), 205)],
)
def test_unets_multiply_as_often_as_published(config, blocks, published):
    # Kim et al. 2023 (BK-SDM), table 1: multiply-accumulates of one step at 512x512, of convolutions and linear layers.
    # Attention multiplies queries with keys, and what comes of it with values.
    places = zip((64 * 64, 32 * 32, 16 * 16, 8 * 8), (320, 640, 1280, 1280), blocks, strict=True)
    attention = sum(2 * width * here * (here + 77) * count for here, width, count in places)
    unet = hollow_part(config)
    assert (multiplications(unet) - attention) / 1e9 == pytest.approx(published, abs=0.5)


def test_memory_is_that_of_weights_and_of_what_is_alive_at_once():
    costs = part_costs(SD15_UNET)
    # The largest attention: 4096 x 4096 places for each of 8 heads, of which softmax makes another.
    matrix = 8 * 4096 * 4096
    assert matrix <= costs.stored_attention_values - costs.working_values <= 3 * matrix
    assert costs.memory_bytes(32) == 4 * (costs.parameters + costs.working_values)


def test_multiplications_of_convolutions_are_those_of_the_formula():
    part = hollow_part(SMALL)
    convolutions, side = 0, 4
    for layer in part.decoder.layers:
        side *= 2 if isinstance(layer, nn.Upsample) else 1
        for one in layer.modules():
            if isinstance(one, nn.Conv2d):
                convolutions += one.weight.numel() * side * side
    assert part_costs(SMALL, size=4).multiplications == convolutions
    assert part_costs(SMALL, batch=3, size=4).multiplications == 3 * convolutions


def test_what_is_alive_at_once_is_counted_with_what_was_freed():
    class Chain(nn.Module):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            wide = torch.cat([values] * 3)
            small = wide[:1] * 2
            del wide
            return small + small.expand(2, 10)

    module, values = Chain(), torch.zeros(2, 10, device="meta")
    alive = _Alive(module)
    with alive:
        module(values)
    # Three times 20 values, and the 10 that are made of them: more than the 10 and 20 that come behind.
    assert alive.peak_bytes == 4 * 70


def test_other_parts_are_refused_by_name():
    with pytest.raises(ModelError, match="'Strange'"):
        hollow_part({"_class_name": "Strange"})
    with pytest.raises(ModelError, match="PixArtTransformer2DModel"):
        part_costs({"_class_name": "PixArtTransformer2DModel", "num_layers": 1, "sample_size": 8})
