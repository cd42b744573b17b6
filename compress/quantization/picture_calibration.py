"""What the parts of a model are given while it draws pictures: the inputs that their 8-bit ranges are found on.

A denoiser's activations are not the same at the noise where it begins and at the picture where it ends, so that
ranges from one end clip at the other. Examples are therefore the inputs of real sampling, with the guidance that
pictures will be drawn with, taken at steps that lie evenly over all of the way (Q-Diffusion, Li et al. 2023, section
4.1; one range over all steps, as ONNX Runtime's integer kernels have their scales stored).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx

from compress.quantization.int8_run import METADATA
from compress.runtimes.picture_sampler import IDS, LATENT, NOISE, SEED, TIMESTEP, Call, PictureSampler
from compress.runtimes.runtime import Batch

TIMESTEPS = 25
"""Steps of a trajectory that examples are taken at; Li et al. take 20 of 100, and 25 of 50."""
PICTURES = 32
"""Those whose latents are enough to find what a decoder of pictures is given."""


@dataclass(frozen=True)
class PictureCalibration:
    """One feed for each call of a part. ``timesteps`` are those at which the denoiser was watched, if it was."""

    feeds: Sequence[Batch]
    rows: np.ndarray
    seed: int
    guidance: float
    timesteps: tuple[float, ...] = ()

    def __str__(self) -> str:
        when = f" at {len(self.timesteps)} timesteps with guidance {self.guidance:g}" if self.timesteps else ""
        return f"{len(self.rows)} prompts{when}, seed {self.seed}"

    def record(self, graph: onnx.ModelProto) -> None:
        """Write into ``graph``, in place, what it was calibrated on."""
        digest = hashlib.sha256(self.rows.astype("<i8").tobytes()).hexdigest()
        facts = {"split": "train", "prompts": len(self.rows), "seed": self.seed, "rows_sha256": digest}
        way = {"timesteps": self.timesteps, "guidance": self.guidance} if self.timesteps else {}
        graph.metadata_props.add(key=METADATA, value=json.dumps({**facts, **way}, sort_keys=True))


@dataclass
class Watched:
    """A part that keeps what it is given."""

    part: Call
    feeds: list[Batch] = field(default_factory=list)

    def __call__(self, batch: Batch) -> Mapping[str, np.ndarray]:
        """As the part, to whom nothing changes."""
        self.feeds.append({name: np.array(array) for name, array in batch.items()})
        return self.part(batch)


def prompts_needed(sampler: PictureSampler, part: str, count: int) -> int:
    """How many prompts give ``count`` examples: each is in several calls of a denoiser, with guidance as two rows."""
    if part == TEXT_PART:
        return count
    if part == DECODER_PART:
        return min(count, PICTURES)
    each = min(sampler.sampling.steps, TIMESTEPS) * (2 if _guided(sampler) else 1)
    return max(1, -(-count // each))


def _guided(sampler: PictureSampler) -> bool:
    """Whether a call takes the empty prompt along."""
    return sampler.sampling.guidance > 1 and not sampler.latents.condition


TEXT_PART, DECODER_PART = "text_encoder", "vae_decoder"
"""optimum's names of what is before a denoiser and behind it."""


def watch(sampler: PictureSampler, part: str, batch: Batch, rows: np.ndarray, seed: int) -> PictureCalibration:
    """Draw pictures for a ``batch`` of prompts and noise, and keep what a part is given.

    ``rows`` are the places of the prompts in the train split, ``seed`` is what they were drawn by.
    """
    guidance = sampler.sampling.guidance
    if part == TEXT_PART:
        return PictureCalibration([{IDS: ids[np.newaxis]} for ids in batch[IDS]], rows, seed, guidance)
    watched = Watched(sampler.denoise)
    latents = replace(sampler, denoise=watched).denoised(batch[IDS], batch[NOISE], batch[SEED].tolist())
    if part == DECODER_PART:
        given = Watched(sampler.decode)
        replace(sampler, decode=given).decoded(latents)
        (whole,) = given.feeds
        return PictureCalibration([{LATENT: one[np.newaxis]} for one in whole[LATENT]], rows, seed, guidance)
    chosen = evenly(len(watched.feeds), TIMESTEPS)
    feeds = [watched.feeds[place] for place in chosen]
    return PictureCalibration(feeds, rows, seed, guidance, tuple(float(feed[TIMESTEP]) for feed in feeds))


def evenly(calls: int, most: int) -> list[int]:
    """Places of ``most`` of so many calls, or all of them: the first, the last, and evenly between."""
    return [int(place) for place in np.round(np.linspace(0, calls - 1, min(calls, most)))]
