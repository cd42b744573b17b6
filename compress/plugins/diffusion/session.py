"""A text encoder, a denoiser and a decoder of pictures that were opened, as one session: prompts and noise in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.formats.runtime import Batch, Session, TensorType, check_inputs
from compress.models.pipeline_folder import UNET, part_config
from compress.plugins.diffusion.pipeline_checks import vae_config
from compress.plugins.diffusion.sampler import (
    CONDITION,
    DENOISED,
    HIDDEN,
    IDS,
    LATENT,
    NOISE,
    PICTURE,
    PICTURES,
    SAMPLE,
    SEED,
    TEXT,
    TIMESTEP,
    Call,
    Latents,
    PictureSampler,
)
from compress.plugins.diffusion.sampling_settings import Sampling, empty_ids, load_scheduler
from compress.tasks.task import Examples
from compress.utils.errors import ModelError

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


TEXT_ENCODER, DECODER = "text_encoder", "vae_decoder"
"""The folders before the UNet's and behind it, as optimum names them."""
_TAKES = {TEXT_ENCODER: {IDS}, UNET: {SAMPLE, TIMESTEP, TEXT}, DECODER: {LATENT}}
_GIVES = {TEXT_ENCODER: HIDDEN, UNET: DENOISED, DECODER: PICTURE}
_PROBES, _PROBE_STEPS = 2, 2
_OPTIONAL = {CONDITION}


class PictureSession:
    """Draws with ``parts``, sessions by optimum's names of their folders, in the order in which they run."""

    inputs = (IDS, NOISE, SEED)

    def __init__(self, sampler: PictureSampler, parts: Mapping[str, Session], where: str) -> None:
        self.sampler, self.parts, self._where = sampler, dict(parts), where
        channels = sampler.latents.channels
        self.input_types = {
            IDS: TensorType("int64", (None, None)),
            NOISE: TensorType("float32", (None, channels, None, None)),
            SEED: TensorType("int64", (None,)),
        }
        self.output_types = {PICTURES: TensorType("float32", (None, None, None, None))}
        first = next(iter(self.parts.values()))
        self.provider = first.provider
        self.settings: dict[str, Any] = {
            **first.settings,
            "scheduler": type(sampler.scheduler).__name__,
            "steps": sampler.sampling.steps,
            "guidance": sampler.sampling.guidance,
        }

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """`pictures` [n, height, width, channels] from 0 to 1 of `input_ids`, `noise` and `seed`.

        Raises `InputError` for a batch without these or of sizes that the parts can't take, and what the parts raise.
        """
        check_inputs(self.inputs, batch, self._where)
        return {PICTURES: self.sampler.draw(batch[IDS], batch[NOISE], batch[SEED].tolist())}

    def probe(self, examples: Examples) -> np.ndarray:
        """A few pictures in next to no steps, which every part has a hand in: [n, height, width, channels]."""
        batch = examples.batch(range(min(_PROBES, len(examples))))
        return self.shortened().predict(batch)[PICTURES]

    def shortened(self) -> PictureSession:
        """The same in next to no steps: what parts differ by is not yet what many steps make of it."""
        return self.with_sampling(replace(self.sampler.sampling, steps=_PROBE_STEPS))

    def with_sampling(self, sampling: Sampling) -> PictureSession:
        """The same parts, drawing in another number of steps or with other guidance."""
        return PictureSession(replace(self.sampler, sampling=sampling), self.parts, self._where)

    def with_part(self, part: str, session: Session) -> PictureSession:
        """The same but for one part."""
        calls = {TEXT_ENCODER: "encode", DECODER: "decode"}
        sampler = replace(self.sampler, **{calls.get(part, "denoise"): _call(session)})  # type: ignore[arg-type]
        return PictureSession(sampler, {**self.parts, part: session}, self._where)


def open_pictures(sessions: Sequence[Session], folder: Path) -> PictureSession:
    """Draw with the opened parts of ``folder``, its scheduler and its own number of steps.

    Raises `ModelError` for parts that lack an input or an output of optimum's.
    """
    parts = dict(zip((TEXT_ENCODER, UNET, DECODER), sessions, strict=True))
    for name, session in parts.items():
        _check(name, session, folder)
    latents = Latents.of(part_config(folder, UNET), vae_config(folder))
    found = (Sampling.read(folder), load_scheduler(folder), empty_ids(folder))
    return PictureSession(sampler_of(parts, latents, *found), parts, str(folder))


def sampler_of(
    parts: Mapping[str, Session],
    latents: Latents,
    sampling: Sampling,
    scheduler: SchedulerMixin,
    empty: np.ndarray,
) -> PictureSampler:
    """The loop over sessions; ``empty`` is the empty prompt [1, tokens]."""
    return PictureSampler(
        encode=_call(parts[TEXT_ENCODER]),
        denoise=_call(parts[UNET]),
        decode=_call(parts[DECODER]),
        scheduler=scheduler,
        latents=latents,
        sampling=sampling,
        empty=empty,
    )


def _call(session: Session) -> Call:
    """A session given each input in the type and with the axes that it takes: other exporters' timesteps are integers,
    or have an axis.
    """

    def call(batch: Batch) -> Mapping[str, np.ndarray]:
        given = dict(batch)
        for name, (dtype, shape) in session.input_types.items():
            if name in given:
                array = given[name].astype(dtype, copy=False)
                given[name] = array[np.newaxis] if array.ndim == 0 and len(shape) == 1 else array
        return session.predict(given)

    return call


def _check(part: str, session: Session, folder: Path) -> None:
    takes, gives = set(session.inputs), session.output_types
    if takes - _OPTIONAL == _TAKES[part] and _GIVES[part] in gives:
        return
    raise ModelError(
        f"The part {part!r} has the inputs {', '.join(sorted(takes))} and the outputs {', '.join(gives)}.",
        where=str(folder / part),
        expected=f"{', '.join(sorted(_TAKES[part]))} and {_GIVES[part]}",
        hint="write the model with the stage onnx; pipelines of other inputs cannot be drawn with here",
    )
