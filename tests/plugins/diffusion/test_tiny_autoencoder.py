"""A small decoder in a VAE's place: diffusers' pipeline opens it as it is, and it learns what its teacher decodes."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import tiny_pipelines
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline

from compress.numerics.losses import feature_distance
from compress.plugins.diffusion.stage_settings import AutoencoderDistillation
from compress.plugins.diffusion.tiny_autoencoder import (
    decoded_distance,
    encoder_features,
    make_small_autoencoder,
    picture_examples,
    train_small_autoencoder,
)
from compress.utils.errors import StageError

SETTINGS = AutoencoderDistillation(width=8, layers=1, epochs=30, batch_size=8, learning_rate=5e-3, precision="fp32")


def pictures(rows: int = 8) -> np.ndarray:
    side = np.linspace(-1, 1, 16, dtype=np.float32)
    rng = np.random.default_rng(0)
    return np.stack([np.outer(side * a, side * b + c)[None] for a, b, c in rng.uniform(-1, 1, (rows, 3)).astype("f4")])


def test_a_pipeline_opens_as_it_is_and_draws_with_the_small_decoder(tmp_path):
    parts = tiny_pipelines.parts()
    parts["vae"] = make_small_autoencoder(parts["vae"], SETTINGS, seed=0).eval()
    pipeline = StableDiffusionPipeline(
        **parts,
        tokenizer=tiny_pipelines.tokenizer(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(tmp_path)
    opened = StableDiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    opened.set_progress_bar_config(disable=True)
    assert isinstance(opened.vae, AutoencoderTiny) and opened.vae_scale_factor == 2
    asked = {"prompt": "a picture of a bag", "num_inference_steps": 2, "height": 16, "width": 16}
    drawn = [
        opened(**asked, output_type=kind, generator=torch.Generator().manual_seed(0)).images
        for kind in ("latent", "np")
    ]
    with torch.no_grad():
        expected = opened.vae.decode(drawn[0] / opened.vae.config.scaling_factor).sample
    assert drawn[0].shape == (1, 4, 8, 8)
    assert np.allclose(drawn[1][0, ..., 0], (expected[0, 0] / 2 + 0.5).clamp(0, 1), atol=1e-5)


def test_it_learns_what_the_vae_decodes(tmp_path):
    vae = tiny_pipelines.parts()["vae"]
    examples = picture_examples(vae, pictures())
    assert examples.inputs[0]["latents"].shape == (4, 8, 8)
    untaught = decoded_distance(vae, make_small_autoencoder(vae, SETTINGS, 0), examples)
    context = tiny.context(scratch=tmp_path)
    small = train_small_autoencoder(vae, examples, examples, SETTINGS, context)
    assert decoded_distance(vae, small, examples) < 0.6 * untaught
    assert "parameters of the decoder; pictures are off by" in context.notes[-1]
    latents = torch.from_numpy(np.stack([row["latents"] for row in examples.inputs]))
    with torch.no_grad():
        encoded = small.encode(torch.from_numpy(pictures())).latents
    assert (encoded - latents).square().mean() < latents.square().mean()


def test_features_are_those_that_the_encoder_computes_on_its_way():
    vae = tiny_pipelines.parts()["vae"]
    seen: list[torch.Tensor] = []
    handles = [block.register_forward_hook(lambda *made: seen.append(made[2])) for block in vae.encoder.down_blocks]
    given = torch.from_numpy(pictures(2))
    with torch.no_grad():
        vae.encode(given)
        features = encoder_features(vae, given)
    for handle in handles:
        handle.remove()
    assert len(features) == 2 and all(
        torch.equal(feature, other) for feature, other in zip(features, seen, strict=False)
    )


def test_the_distance_of_features_forgets_their_length():
    feature = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    other = torch.tensor([40.0, 30.0]).view(1, 2, 1, 1)
    assert float(feature_distance(feature, 9 * feature)) == pytest.approx(0.0, abs=1e-12)
    assert float(feature_distance(feature, other)) == pytest.approx(0.08, rel=1e-5)


def test_a_vae_of_another_kind_is_refused():
    small = make_small_autoencoder(tiny_pipelines.parts()["vae"], SETTINGS, 0)
    with pytest.raises(StageError, match="AutoencoderTiny teaches no small decoder"):
        make_small_autoencoder(small, SETTINGS, 0)
