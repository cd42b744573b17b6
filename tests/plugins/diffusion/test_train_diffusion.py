"""The diffusion model that a recipe starts from, trained here on patterns, and the loop that outlives a kill."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipelines
import torch
from torch import nn

from compress.utils.errors import InputError
from compress.utils.progress import SilentProgress

CAPTIONS = ("a photo of a coat", "a picture of a bag")


@pytest.fixture
def lessons() -> Any:
    return importlib.import_module("diffusion_lessons")


@pytest.fixture
def bench(lessons: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command with bright and dark squares for clothes, narrow networks, and four steps each."""
    module = importlib.import_module("train_diffusion")
    restartable = importlib.import_module("restartable")

    class Words(lessons.Text):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            self.tokenizer = tiny_pipelines.tokenizer(12)
            self.encoder = tiny_pipelines.parts()["text_encoder"]

    monkeypatch.setattr(lessons, "TOKENS", 12)
    monkeypatch.setattr(module, "TOKENS", 12)
    monkeypatch.setattr(module, "Text", Words)
    monkeypatch.setattr(
        lessons, "JUDGE", {**lessons.JUDGE, "hidden_sizes": [8, 8], "depths": [1, 1], "groups_width": 8}
    )
    monkeypatch.setattr(lessons, "AUTOENCODER", {**lessons.AUTOENCODER, "block_out_channels": (8, 8, 8)})
    narrow = {"block_out_channels": (8, 8, 16), "cross_attention_dim": 16}
    monkeypatch.setattr(lessons, "UNET", {**lessons.UNET, **narrow})
    monkeypatch.setattr(lessons.Pictures, "read", lambda *_: _squares(lessons))
    monkeypatch.setattr(module, "seconds_a_step", lambda *_: 1e9)
    monkeypatch.setattr(module, "SAMPLING_STEPS", 2)
    monkeypatch.setattr(restartable, "_SAVED_EVERY", -1.0)
    return module


def _squares(lessons: Any) -> Any:
    kinds = torch.arange(160) % 2
    pixels = torch.zeros(160, 1, 32, 32, dtype=torch.uint8)
    pixels[:, :, 8:24, 8:24] = (80 + 120 * kinds)[:, None, None, None].to(torch.uint8)
    texts = [CAPTIONS[kind] for kind in kinds.tolist()]
    return lessons.Pictures(["coat", "bag"], list(CAPTIONS), pixels, kinds, kinds, pixels[:64], kinds[:64], texts[:64])


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


def test_latents_are_scaled_to_a_deviation_of_one(bench: Any, lessons: Any) -> None:
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
    latents = bench.scaled_latents(encoder, _squares(lessons).train, SilentProgress())
    assert encoder.config.scaling_factor == pytest.approx(1 / 5, rel=1e-3)  # of 16 + 9
    assert latents.shape == (160, 2, 4, 8, 8)
    assert latents[:, 1].unique().tolist() == pytest.approx([0.6], rel=1e-3)


def test_the_loss_of_who_answers_nothing_is_that_of_the_velocity(lessons: Any) -> None:
    squares = _squares(lessons)
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
    schedule: np.ndarray = np.cos((step / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    return schedule


def test_timing_leaves_the_weights_as_they_were() -> None:
    restartable = importlib.import_module("restartable")
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    tensors_before = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def loss(generator: torch.Generator) -> torch.Tensor:
        mean_square: torch.Tensor = module(torch.randn(4, 3, generator=generator)).square().mean()
        return mean_square

    assert restartable.seconds_a_step(restartable.Lesson("one", module, loss, 1.0), 0) > 0
    assert all(torch.equal(tensor, tensors_before[name]) for name, tensor in module.state_dict().items())
