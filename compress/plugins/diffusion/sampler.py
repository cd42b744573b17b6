"""Pictures from words with three opened models and a scheduler of diffusers: arrays in, arrays out.

It is the loop of diffusers' StableDiffusionPipeline and LatentConsistencyModelPipeline, whoever computes the parts.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.formats.runtime import Batch
from compress.plugins.diffusion.sampling_settings import Sampling
from compress.plugins.diffusion.scheduler_table import OnStep, StepTable, set_steps, step_table
from compress.utils.errors import InputError, ModelError, StageError

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


Call = Callable[[Batch], Mapping[str, np.ndarray]]
"""A part: arrays by the names of its inputs -> arrays by the names of its outputs, those of optimum's files."""
IDS, HIDDEN = "input_ids", "last_hidden_state"
SAMPLE, TIMESTEP, TEXT, CONDITION, DENOISED = (
    "sample",
    "timestep",
    "encoder_hidden_states",
    "timestep_cond",
    "out_sample",
)
LATENT, PICTURE = "latent_sample", "sample"
NOISE, SEED, PICTURES = "noise", "seed", "pictures"


@dataclass(frozen=True)
class Latents:
    """What lies between the denoiser and the decoder of pictures.

    A picture is ``factor`` times as high and wide as its latents, whose sides are multiples of ``multiple``. The
    decoder is given latents / ``scaling`` + ``shift``. ``condition`` is the width of the embedding that tells the
    denoiser of the guidance, 0 where it isn't told.
    """

    channels: int
    factor: int
    multiple: int
    scaling: float
    shift: float = 0.0
    condition: int = 0

    @classmethod
    def of(cls, denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> Latents:
        """By the configs of the two parts."""
        return cls(
            channels=int(denoiser["in_channels"]),
            factor=2 ** (len(vae["block_out_channels"]) - 1),
            multiple=2 ** (len(denoiser["block_out_channels"]) - 1),
            scaling=float(vae.get("scaling_factor") or 1.0),
            shift=float(vae.get("shift_factor") or 0.0),
            condition=int(denoiser.get("time_cond_proj_dim") or 0),
        )


@dataclass(frozen=True)
class PictureSampler:
    """Draws pictures: ``encode``, ``denoise`` and ``decode`` are the parts, ``empty`` [1, tokens] the empty prompt."""

    encode: Call
    denoise: Call
    decode: Call
    scheduler: SchedulerMixin
    latents: Latents
    sampling: Sampling
    empty: np.ndarray

    @property
    def guided(self) -> bool:
        """Whether the denoiser is called with the empty prompt too, to be led away from it."""
        return self.sampling.guidance > 1 and not self.latents.condition

    def draw(
        self, ids: np.ndarray, noise: np.ndarray, seeds: Sequence[int] | None = None, on_step: OnStep | None = None
    ) -> np.ndarray:
        """Pictures [n, height, width, channels] from 0 to 1 for prompts [n, tokens] and noise [n, channels, h, w].

        ``seeds`` [n] are of the noise that some schedulers add at each step. ``on_step`` is told the number of a step
        that is done, from 1 on, and its latents. Raises `InputError` for sizes that the parts can't take or steps
        that the scheduler can't make, `StageError` for a part that gives NaN.
        """
        return self.decoded(self.denoised(ids, noise, seeds, on_step))

    def denoised(
        self, ids: np.ndarray, noise: np.ndarray, seeds: Sequence[int] | None = None, on_step: OnStep | None = None
    ) -> np.ndarray:
        """The latents [n, channels, h, w] that `decoded` makes pictures of."""
        self._check(noise)
        text = self._encoded(ids)
        told = {CONDITION: self._condition(len(noise))} if self.latents.condition else {}
        steps = itertools.count(1)

        def denoise(latents: np.ndarray, timestep: object) -> np.ndarray:
            given = np.concatenate([latents] * 2) if self.guided else latents
            return self._denoised(given, timestep, text, told, next(steps))

        if self._table is not None:
            return self._table.draw(denoise, noise, on_step=on_step)
        return self._scheduled(denoise, noise, seeds, on_step)

    @cached_property
    def _table(self) -> StepTable | None:
        """The scheduler as sums, which take next to no time; None where it is none, or draws noise of its own."""
        try:
            table = step_table(self.scheduler, self.sampling.steps)
        except (ModelError, ValueError, IndexError, ZeroDivisionError):
            return None
        return None if table.adds_noise else table

    def _scheduled(
        self,
        denoise: Callable[[np.ndarray, Any], np.ndarray],
        noise: np.ndarray,
        seeds: Sequence[int] | None,
        on_step: OnStep | None,
    ) -> np.ndarray:
        """`denoised` by the scheduler itself."""
        import torch

        # Its steps leave traces in it. To make one of its config takes as long as a call of a small denoiser.
        scheduler = copy.deepcopy(self.scheduler)
        timesteps = self._timesteps(scheduler)
        latents = torch.from_numpy(np.asarray(noise, np.float32)) * scheduler.init_noise_sigma
        options = self._options(scheduler, seeds)
        for place, timestep in enumerate(timesteps):
            found = denoise(scheduler.scale_model_input(latents, timestep).numpy(), timestep)
            latents = scheduler.step(torch.from_numpy(found), timestep, latents, **options, return_dict=False)[0]
            if on_step is not None:
                on_step(place + 1, latents.numpy())
        return np.asarray(latents.numpy())

    def decoded(self, latents: np.ndarray) -> np.ndarray:
        """Pictures [n, height, width, channels] from 0 to 1."""
        given = latents / np.float32(self.latents.scaling) + np.float32(self.latents.shift)
        found = self.decode({LATENT: given.astype(np.float32)})[PICTURE]
        _finite(found, "the decoder of pictures")
        return np.ascontiguousarray(np.clip(found / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1))

    def _encoded(self, ids: np.ndarray) -> np.ndarray:
        """[n, tokens, width], behind as many of the empty prompt where guidance asks for it."""
        text = self.encode({IDS: ids})[HIDDEN]
        _finite(text, "the text encoder")
        if not self.guided:
            return text
        empty = self.encode({IDS: self.empty})[HIDDEN]
        return np.concatenate([np.repeat(empty, len(text), axis=0), text])

    def _denoised(
        self, given: np.ndarray, timestep: Any, text: np.ndarray, told: Mapping[str, np.ndarray], step: int
    ) -> np.ndarray:
        """What the denoiser makes of latents, guidance applied."""
        when = np.asarray(float(timestep), np.float32)
        found = self.denoise({SAMPLE: given, TIMESTEP: when, TEXT: text, **told})[DENOISED].astype(np.float32)
        _finite(found, f"the denoiser, at step {step} of {self.sampling.steps} (timestep {float(timestep):g})")
        if self.guided:
            without, wanted = np.split(found, 2)
            found = without + np.float32(self.sampling.guidance) * (wanted - without)
        return found

    def _condition(self, count: int) -> np.ndarray:
        """Sinusoids of the guidance [count, width] (Meng et al. 2023, On Distillation of Guided Diffusion Models)."""
        half = self.latents.condition // 2
        rates = np.exp(np.arange(half, dtype=np.float32) * -(np.log(10000.0) / (half - 1)))
        angles = 1000.0 * (self.sampling.guidance - 1) * rates
        row = np.concatenate([np.sin(angles), np.cos(angles), np.zeros(self.latents.condition % 2)])
        return np.repeat(row[np.newaxis].astype(np.float32), count, axis=0)

    def _timesteps(self, scheduler: SchedulerMixin) -> Any:
        try:
            set_steps(scheduler, self.sampling.steps)
        except (ValueError, IndexError, ZeroDivisionError) as error:
            raise InputError(
                f"{type(scheduler).__name__} cannot make {self.sampling.steps} steps: {error}",
                expected="a number of steps that the scheduler takes",
                hint="choose fewer steps, or another scheduler",
            ) from error
        return scheduler.timesteps

    def _options(self, scheduler: SchedulerMixin, seeds: Sequence[int] | None) -> dict[str, Any]:
        """A generator for each picture, where the scheduler draws noise of its own."""
        import torch

        if seeds is None or "generator" not in inspect.signature(scheduler.step).parameters:
            return {}
        return {"generator": [torch.Generator().manual_seed(int(seed)) for seed in seeds]}

    def _check(self, noise: np.ndarray) -> None:
        known = self.latents
        sides = noise.shape[2:]
        if noise.ndim != 4 or noise.shape[1] != known.channels or any(not s or s % known.multiple for s in sides):
            step = known.factor * known.multiple
            raise InputError(
                f"Noise of the shape {list(noise.shape)} makes no picture.",
                expected=f"[n, {known.channels}, height / {known.factor}, width / {known.factor}], with pictures whose "
                f"sides are multiples of {step}",
                hint=f"choose a height and a width that {step} divides",
            )


def _finite(found: np.ndarray, what: str) -> None:
    if not np.isfinite(found).all():
        raise StageError(
            f"There is NaN or infinity in what comes of {what}.",
            expected="finite numbers",
            hint="in half precision, keep the operators that overflow in float32",
        )
