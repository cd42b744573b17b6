"""The diffusion model that a recipe starts from, trained here on patterns, and the loop that outlives a kill."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import diffusion_lessons as lessons
import numpy as np
import pytest
import restartable
import tiny_pipelines
import tiny_unets
import torch
import train_diffusion
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from torch import nn

from compress.plugins.diffusion.noised_latents import (
    TEXT,
    NoiseProcess,
    denoising_losses,
    encode_captions,
    encode_images,
    unscale_latents,
)
from compress.plugins.diffusion.step_losses import (
    NoiseSchedule,
    PredictionType,
    add_noise,
    boundary_scalings,
    ddim_step,
    guidance_embedding,
    predicted_clean,
    pseudo_huber,
)
from compress.utils.errors import InputError, StageError
from compress.utils.progress import SilentProgress

CAPTIONS = ("a photo of a coat", "a picture of a bag")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The command with bright and dark squares for clothes, narrow networks, and four steps each."""

    class Words(lessons.Text):
        def __init__(self) -> None:
            self.tokenizer = tiny_pipelines.tokenizer(12)
            self.encoder = tiny_pipelines.parts()["text_encoder"]

    monkeypatch.setattr(lessons, "TOKENS", 12)
    for table, changes in (
        ("JUDGE", {"hidden_sizes": [8, 8], "depths": [1, 1], "groups_width": 8}),
        ("AUTOENCODER", {"block_out_channels": (8, 8, 8)}),
        ("UNET", {"block_out_channels": (8, 8, 16), "cross_attention_dim": 16}),
    ):
        monkeypatch.setattr(lessons, table, {**getattr(lessons, table), **changes})
    monkeypatch.setattr(lessons.CaptionedImages, "read", lambda *_: _squares())
    changed = {"TOKENS": 12, "Text": Words, "seconds_per_step": lambda *_: 1e9, "SAMPLING_STEPS": 2}
    for name, value in changed.items():
        monkeypatch.setattr(train_diffusion, name, value)
    monkeypatch.setattr(restartable, "_SAVED_EVERY", -1.0)
    return train_diffusion


def _squares() -> Any:
    kinds = torch.arange(160) % 2
    pixels = torch.zeros(160, 1, 32, 32, dtype=torch.uint8)
    pixels[:, :, 8:24, 8:24] = (80 + 120 * kinds)[:, None, None, None].to(torch.uint8)
    texts = [CAPTIONS[kind] for kind in kinds.tolist()]
    return lessons.CaptionedImages(
        ["coat", "bag"], list(CAPTIONS), pixels, kinds, kinds, pixels[:64], kinds[:64], texts[:64]
    )


def _weights(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_a_killed_training_ends_with_the_same_bytes_in_diffusers_layout(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import StableDiffusionPipeline
    from transformers import AutoModelForImageClassification

    bench.train(tmp_path / "whole", 5.0, 3, SilentProgress())

    loss = bench.denoising_loss

    def dies(*given: Any) -> Any:
        steps, whole = iter(range(2)), loss(*given)

        def once(generator: torch.Generator) -> torch.Tensor:
            if next(steps, None) is None:
                raise KeyboardInterrupt
            return whole(generator)  # type: ignore[no-any-return]

        return once

    with monkeypatch.context() as patched:
        patched.setattr(bench, "denoising_loss", dies)
        with pytest.raises(KeyboardInterrupt):
            bench.train(tmp_path / "killed", 5.0, 3, SilentProgress())
    bench.train(tmp_path / "killed", 99.0, 3, SilentProgress())
    whole = _weights(tmp_path / "whole")
    assert _weights(tmp_path / "killed") == whole
    assert sorted(Path(name).parent.as_posix() for name in whole) == [
        "judge",
        "model/text_encoder",
        "model/unet",
        "model/vae",
    ]
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "whole" / "model")
    assert type(pipeline.text_encoder).__name__ == "BertModel" and pipeline.safety_checker is None
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    judge = AutoModelForImageClassification.from_pretrained(tmp_path / "whole" / "judge")
    assert judge.config.id2label == {0: "coat", 1: "bag"}
    with pytest.raises(InputError, match="is trained"):
        bench.train(tmp_path / "whole", 5.0, 3, SilentProgress())


def test_a_folder_that_holds_something_is_refused(bench: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        bench.train(tmp_path, 5.0, 0, SilentProgress())
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_latents_are_scaled_to_a_deviation_of_one(bench: Any) -> None:
    class Encoder:
        """Latents with a known mean and spread: their variance is that of the means, and the square of the spread."""

        def __init__(self) -> None:
            self.config = type("Config", (), {"scaling_factor": 0.0})

        def encode(self, pixels: torch.Tensor) -> Any:
            mean = torch.where(pixels[:, :, 8:16, 8:16] > 0, 4.0, -4.0).expand(-1, 4, -1, -1)
            posterior = type("Posterior", (), {"mean": mean, "std": torch.full_like(mean, 3.0)})
            return type("Encoded", (), {"latent_dist": posterior})

        def register_to_config(self, scaling_factor: float) -> None:
            self.config.scaling_factor = scaling_factor

    encoder = Encoder()
    latents = bench.scaled_latents(encoder, _squares().train, SilentProgress())
    assert encoder.config.scaling_factor == pytest.approx(1 / 5, rel=1e-3)  # of 16 + 9
    assert latents.shape == (160, 2, 4, 8, 8)
    assert latents[:, 1].unique().tolist() == pytest.approx([0.6], rel=1e-3)


def test_the_loss_of_who_answers_nothing_is_that_of_the_velocity() -> None:
    squares = _squares()
    latents = torch.stack([torch.ones(160, 4, 8, 8), torch.zeros(160, 4, 8, 8)], dim=1)
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    class Nothing(nn.Module):
        def forward(self, sample: torch.Tensor, times: torch.Tensor, prompts: torch.Tensor) -> Any:
            seen.append((times, sample, prompts[:, 0, 0]))
            return type("Output", (), {"sample": torch.zeros_like(sample)})

    states = torch.arange(3.0)[:, None, None].expand(3, 12, 16)
    loss = lessons.denoising_loss(Nothing(), squares, latents, states)
    losses = np.array([float(loss(torch.Generator().manual_seed(seed))) for seed in range(20)])
    # Nichol and Dhariwal (2021), equation 17: of latents that are all 1, x = a + s e and v = a e - s = (a x - 1) / s.
    expected = []
    for times, sample, _ in seen:
        signal_share = np.cumprod(1 - np.minimum(1 - _cosine(np.arange(1, 1001)) / _cosine(np.arange(1000)), 0.999))[
            times
        ]
        a, s = (np.sqrt(share)[:, None, None, None] for share in (signal_share, 1 - signal_share))
        expected.append(np.mean(((a * sample.numpy() - 1) / s) ** 2))
    assert losses == pytest.approx(np.array(expected), rel=1e-2)
    empty = torch.cat([first for _, _, first in seen]) == 2
    assert float(empty.float().mean()) == pytest.approx(0.1, abs=0.02)


def _cosine(step: np.ndarray) -> np.ndarray:
    return np.cos((step / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2


def test_timing_leaves_the_weights_as_they_were() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    tensors_before = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def loss(generator: torch.Generator) -> torch.Tensor:
        return module(torch.randn(4, 3, generator=generator)).square().mean()

    assert restartable.seconds_per_step(restartable.Training("one", module, loss, 1.0), 0) > 0
    assert all(torch.equal(tensor, tensors_before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_a_step_is_that_of_diffusers(kind: PredictionType) -> None:
    scheduler = DDIMScheduler(
        1000, prediction_type=kind, clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=False
    )
    scheduler.set_timesteps(8)
    levels = NoiseSchedule(scheduler.alphas_cumprod, float(scheduler.final_alpha_cumprod))
    noisy, output = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).split(1)
    for time in scheduler.timesteps.tolist():
        start_level, end_level = levels.levels(torch.tensor([time]), 4), levels.levels(torch.tensor([time - 125]), 4)
        stepped = ddim_step(predicted_clean(kind, output, noisy, start_level), noisy, start_level, end_level)
        expected = scheduler.step(output, time, noisy).prev_sample
        torch.testing.assert_close(stepped, expected, rtol=2e-5, atol=2e-5)


def test_noise_is_added_as_in_diffusers() -> None:
    scheduler, times = DDIMScheduler(1000), torch.tensor([3, 100, 500, 900, 999])
    clean, noise = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(1))
    noisy = add_noise(clean, noise, NoiseSchedule(scheduler.alphas_cumprod).levels(times, 2))
    torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, times))


def test_boundary_scalings_are_those_of_diffusers() -> None:
    scheduler = LCMScheduler(timestep_scaling=3.0)
    skip, out = boundary_scalings(torch.arange(1000), 1, 3.0)
    expected = [scheduler.get_scalings_for_boundary_condition_discrete(time) for time in range(1000)]
    torch.testing.assert_close(torch.stack([skip, out], 1), torch.tensor(expected))


def test_guidance_is_embedded_as_diffusers_does_it() -> None:
    """LatentConsistencyModelPipeline has the sinusoids of timesteps, of 1000 (scale - 1)."""
    from diffusers.models.embeddings import get_timestep_embedding

    scales = torch.tensor([1.0, 4.5, 8.0])
    expected = get_timestep_embedding(1000 * (scales - 1), 33, downscale_freq_shift=1)
    torch.testing.assert_close(guidance_embedding(scales, 33), expected, rtol=1e-4, atol=1e-3)


def test_the_pseudo_huber_loss_is_a_square_near_by_and_a_distance_far_off() -> None:
    target = torch.zeros(1, 100)
    constant = 0.00054 * 10
    near, far = torch.full((1, 100), 1e-6), torch.full((1, 100), 10.0)
    assert float(pseudo_huber(near.double(), target.double())) == pytest.approx((1e-5) ** 2 / 2 / constant, rel=1e-3)
    assert float(pseudo_huber(far, target)) == pytest.approx(100 - constant, rel=1e-5)


def batch(rows: int = 4) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in tiny_unets.latents(rows).batch(list(range(rows))).items()}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_scheduler_that_is_given_the_target_finds_the_clean_latents(kind):
    noised = NoiseProcess.from_scheduler(DPMSolverMultistepScheduler(prediction_type=kind)).sample(
        batch(), torch.tensor(400)
    )
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(1000)
    clean_latents = scheduler.step(noised.target, 400, noised.noised).pred_original_sample
    assert torch.allclose(clean_latents, noised.clean, atol=1e-4)
    assert noised.timesteps.tolist() == [400] * 4


def test_the_share_without_a_prompt_has_the_empty_one():
    empty = torch.full((tiny_unets.TOKENS, tiny_unets.TEXT_WIDTH), 7.0)
    noising = NoiseProcess.from_scheduler(DDIMScheduler(), {TEXT: empty}, dropped=0.25)
    torch.manual_seed(0)
    rows = {name: value.repeat(100, *[1] * (value.ndim - 1)) for name, value in batch(4).items()}
    states = noising.sample(rows).conditions[TEXT]
    emptied = (states == 7.0).all(2).all(1)
    assert emptied.float().mean().item() == pytest.approx(0.25, abs=0.08)
    assert torch.equal(states[~emptied], rows[TEXT][~emptied])


def test_a_unet_that_answers_with_the_target_has_no_loss():
    noised = NoiseProcess.from_scheduler(DDIMScheduler()).sample(batch())
    asked = []

    def unet(sample, timesteps, encoder_hidden_states, return_dict):
        asked.append((sample, timesteps, encoder_hidden_states))
        return (noised.noise + torch.tensor([0.0, 1.0, 2.0, 3.0])[:, None, None, None],)

    assert denoising_losses(unet, noised).tolist() == pytest.approx([0.0, 1.0, 4.0, 9.0])
    assert torch.equal(asked[0][0], noised.noised) and torch.equal(asked[0][2], noised.conditions[TEXT])


def test_latents_of_pictures_are_scaled_as_the_config_says():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    )
    pictures = np.random.default_rng(0).uniform(-1, 1, (3, 3, 8, 8)).astype(np.float32)
    latents = encode_images(vae, pictures)
    with torch.no_grad():
        own = vae.encode(torch.from_numpy(pictures)).latent_dist.mode()
    assert np.allclose(latents, (own - 0.25) * 0.5, atol=1e-5)
    assert torch.allclose(unscale_latents(vae, torch.from_numpy(latents)), own, atol=1e-5)


def test_each_caption_is_encoded_once():
    asked: list[str] = []

    def encode(captions: list[str]) -> np.ndarray:
        asked.extend(captions)
        return np.array([[[float(len(caption))]] for caption in captions])

    states = encode_captions(["a", "bcd", "a"], encode)
    assert asked == ["a", "bcd"] and [state.item() for state in states] == [1.0, 3.0, 1.0]
    assert states[0] is states[2]


def test_flow_matching_is_refused_by_name():
    with pytest.raises(StageError, match="FlowMatchEulerDiscreteScheduler has no schedule of betas"):
        NoiseProcess.from_scheduler(FlowMatchEulerDiscreteScheduler())
