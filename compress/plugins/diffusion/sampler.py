"""Sampling loop of a diffusion model: three open components and a scheduler of diffusers, arrays in, arrays out.

It is the loop of diffusers' StableDiffusionPipeline and LatentConsistencyModelPipeline for components of any runtime,
which sessions open. Apps run the same loop by the scheduler's table. Importing this imports no torch.

Shapes: latents are [batch, channels, height, width].
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.formats.runtime import Batch, Session, TensorType, check_inputs
from compress.formats.safetensors.runtime import FAILURES
from compress.models.pipeline_folder import UNET, part_config
from compress.plugins.diffusion.pipeline_model import (
    Sampling,
    load_prompt_processor,
    load_scheduler,
    vae_config,
)
from compress.plugins.diffusion.scheduler_table import (
    Denoise,
    OnStep,
    SchedulerTable,
    build_scheduler_table,
    set_steps,
)
from compress.tasks.task import Examples
from compress.utils.errors import InputError, ModelError, StageError, first_line

if TYPE_CHECKING:
    import torch
    from diffusers import SchedulerMixin

    from compress.plugins.diffusion.pipeline_model import GeneratorModel


ComponentCall = Callable[[Batch], Mapping[str, np.ndarray]]
"""Function from the named inputs of a component to its named outputs, with the names of optimum's files."""
IDS, HIDDEN = "input_ids", "last_hidden_state"
SAMPLE, TIMESTEP, TEXT = "sample", "timestep", "encoder_hidden_states"
CONDITION, DENOISED = "timestep_cond", "out_sample"
LATENT, IMAGE = "latent_sample", "sample"
NOISE, SEED, IMAGES = "noise", "seed", "pictures"


@dataclass(frozen=True)
class LatentSpace:
    """Shape and scale of the latents between the denoiser and the decoder.

    An image is ``factor`` times as high and wide as its latents, whose sides are multiples of ``multiple``. The decoder
    takes latents / ``scaling`` + ``shift``. ``condition`` is the width of the guidance embedding that the denoiser
    takes, or 0.
    """

    channels: int
    factor: int
    multiple: int
    scaling: float
    shift: float = 0.0
    condition: int = 0

    @classmethod
    def from_configs(cls, denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> LatentSpace:
        """Read the latent space from the configs of the denoiser and the VAE."""
        return cls(
            channels=int(denoiser["in_channels"]),
            factor=2 ** (len(vae["block_out_channels"]) - 1),
            multiple=2 ** (len(denoiser["block_out_channels"]) - 1),
            scaling=float(vae.get("scaling_factor") or 1.0),
            shift=float(vae.get("shift_factor") or 0.0),
            condition=int(denoiser.get("time_cond_proj_dim") or 0),
        )


@dataclass(frozen=True)
class DiffusionSampler:
    """Sampling loop. ``encode``, ``denoise`` and ``decode`` call the components.

    ``empty`` are the token ids of the empty prompt, [1, tokens].
    """

    encode: ComponentCall
    denoise: ComponentCall
    decode: ComponentCall
    scheduler: SchedulerMixin
    latents: LatentSpace
    sampling: Sampling
    empty: np.ndarray

    @property
    def guided(self) -> bool:
        """True if the denoiser also runs with the empty prompt, for classifier-free guidance."""
        return self.sampling.guidance > 1 and not self.latents.condition

    def generate(
        self, ids: np.ndarray, noise: np.ndarray, seeds: Sequence[int] | None = None, on_step: OnStep | None = None
    ) -> np.ndarray:
        """Generate images [n, height, width, channels] from 0 to 1.

        Args:
            ids: Token ids of the prompts, [n, tokens].
            noise: Initial noise, [n, channels, h, w].
            seeds: Seeds [n] of the noise that some schedulers add at each step.
            on_step: Called after each step with its number, from 1 on, and its latents.

        Raises:
            InputError: The components cannot use the size, or the scheduler the number of steps.
            StageError: A component returns NaN.
        """
        return self.decode_latents(self.sample_latents(ids, noise, seeds, on_step))

    def sample_latents(
        self, ids: np.ndarray, noise: np.ndarray, seeds: Sequence[int] | None = None, on_step: OnStep | None = None
    ) -> np.ndarray:
        """Return the latents [n, channels, h, w] of `generate`.

        Args:
            ids: Token ids of the prompts, [n, tokens].
            noise: Initial noise, [n, channels, h, w].
            seeds: Seeds [n] of the noise that some schedulers add at each step.
            on_step: Called after each step with its number, from 1 on, and its latents.
        """
        space, sides = self.latents, noise.shape[2:]
        if noise.ndim != 4 or noise.shape[1] != space.channels or any(not s or s % space.multiple for s in sides):
            step = space.factor * space.multiple
            raise InputError(
                f"Noise of the shape {list(noise.shape)} makes no image.",
                expected=f"[n, {space.channels}, height / {space.factor}, width / {space.factor}], with images whose "
                f"sides are multiples of {step}",
                hint=f"choose a height and a width that {step} divides",
            )
        text = self._encode_prompts(ids)
        condition = {}
        if self.latents.condition:
            row = guidance_embedding(self.sampling.guidance, self.latents.condition)
            condition = {CONDITION: np.repeat(row[np.newaxis], len(noise), axis=0)}
        steps = itertools.count(1)

        def denoise(latents: np.ndarray, timestep: float) -> np.ndarray:
            """Return the denoiser's output for latents, guidance applied."""
            # One call computes both halves of classifier-free guidance: the empty prompt first, as in diffusers.
            sample, time = np.concatenate([latents] * 2) if self.guided else latents, float(timestep)
            inputs = {SAMPLE: sample, TIMESTEP: np.asarray(time, np.float32), TEXT: text, **condition}
            output = self.denoise(inputs)[DENOISED].astype(np.float32)
            _require_finite(output, f"the denoiser, at step {next(steps)} of {self.sampling.steps} (timestep {time:g})")
            if self.guided:
                unconditional, conditional = np.split(output, 2)
                output = unconditional + np.float32(self.sampling.guidance) * (conditional - unconditional)
            return output

        if self._table is not None:
            return self._table.sample(denoise, noise, on_step=on_step)
        return self._run_scheduler(denoise, noise, seeds, on_step)

    @cached_property
    def _table(self) -> SchedulerTable | None:
        """Table of the scheduler, which is much faster; None if there is none, or if the scheduler adds noise."""
        try:
            table = build_scheduler_table(self.scheduler, self.sampling.steps)
        except (ModelError, ValueError, IndexError, ZeroDivisionError):
            return None
        return None if table.adds_noise else table

    def _run_scheduler(
        self, denoise: Denoise, noise: np.ndarray, seeds: Sequence[int] | None, on_step: OnStep | None
    ) -> np.ndarray:
        """Return the latents that the scheduler itself computes.

        Args:
            denoise: Denoiser with guidance.
            noise: Initial noise.
            seeds: Seeds of the noise of each step.
            on_step: Called after each step.
        """
        import torch

        # Steps change the scheduler's state. Building one from its config takes as long as a call of a small denoiser.
        scheduler = copy.deepcopy(self.scheduler)
        try:
            set_steps(scheduler, self.sampling.steps)
        except (ValueError, IndexError, ZeroDivisionError) as error:
            raise InputError(
                f"{type(scheduler).__name__} cannot make {self.sampling.steps} steps: {error}",
                expected="a number of steps that the scheduler takes",
                hint="choose fewer steps, or another scheduler",
            ) from error
        latents = torch.from_numpy(np.asarray(noise, np.float32)) * scheduler.init_noise_sigma
        options = {}
        if seeds is not None and "generator" in inspect.signature(scheduler.step).parameters:
            # One generator per image makes an image independent of its batch.
            options["generator"] = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        for index, timestep in enumerate(scheduler.timesteps):
            output = denoise(scheduler.scale_model_input(latents, timestep).numpy(), timestep)
            latents = scheduler.step(torch.from_numpy(output), timestep, latents, **options, return_dict=False)[0]
            if on_step is not None:
                on_step(index + 1, latents.numpy())
        return np.asarray(latents.numpy())

    def decode_latents(self, latents: np.ndarray) -> np.ndarray:
        """Decode latents [n, channels, h, w] to images [n, height, width, channels] from 0 to 1."""
        unscaled = latents / np.float32(self.latents.scaling) + np.float32(self.latents.shift)
        images = self.decode({LATENT: unscaled.astype(np.float32)})[IMAGE]
        _require_finite(images, "the decoder of images")
        return np.ascontiguousarray(np.clip(images / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1))

    def _encode_prompts(self, ids: np.ndarray) -> np.ndarray:
        """Return hidden states [n, tokens, width], with guidance after as many of the empty prompt."""
        text = self.encode({IDS: ids})[HIDDEN]
        _require_finite(text, "the text encoder")
        if not self.guided:
            return text
        empty = self.encode({IDS: self.empty})[HIDDEN]
        return np.concatenate([np.repeat(empty, len(text), axis=0), text])


def guidance_embedding(guidance: float, width: int) -> np.ndarray:
    """Return sinusoids [width] of a guidance scale, as in diffusers' LatentConsistencyModelPipeline."""
    half = width // 2
    rates = np.exp(np.arange(half, dtype=np.float32) * -(np.log(10000.0) / (half - 1)))
    angles = 1000.0 * (guidance - 1) * rates
    return np.concatenate([np.sin(angles), np.cos(angles), np.zeros(width % 2)]).astype(np.float32)


def _require_finite(array: np.ndarray, source: str) -> None:
    if not np.isfinite(array).all():
        raise StageError(
            f"The output of {source} has NaN or infinity.",
            expected="finite numbers",
            hint="in half precision, keep the operators that overflow in float32",
        )


TEXT_ENCODER, DECODER = "text_encoder", "vae_decoder"
"""Folders of optimum before the UNet's and after it."""
_INPUTS = {TEXT_ENCODER: {IDS}, UNET: {SAMPLE, TIMESTEP, TEXT}, DECODER: {LATENT}}
OUTPUTS = {TEXT_ENCODER: HIDDEN, UNET: DENOISED, DECODER: IMAGE}
"""Output of each component, by the folders of optimum."""
_PROBES, _PROBE_STEPS = 2, 2


class DiffusionSession:
    """Session of several components. ``parts`` are their sessions by optimum's folders, in the order they run."""

    inputs = (IDS, NOISE, SEED)

    def __init__(self, sampler: DiffusionSampler, parts: Mapping[str, Session], where: str) -> None:
        self.sampler, self.parts, self._where = sampler, dict(parts), where
        channels = sampler.latents.channels
        self.input_types = {
            IDS: TensorType("int64", (None, None)),
            NOISE: TensorType("float32", (None, channels, None, None)),
            SEED: TensorType("int64", (None,)),
        }
        self.output_types = {IMAGES: TensorType("float32", (None, None, None, None))}
        first = next(iter(self.parts.values()))
        self.provider = first.provider
        self.settings: dict[str, object] = {
            **first.settings,
            "scheduler": type(sampler.scheduler).__name__,
            "steps": sampler.sampling.steps,
            "guidance": sampler.sampling.guidance,
        }

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """Generate images [n, height, width, channels] from 0 to 1 of `input_ids`, `noise` and `seed`.

        Raises:
            InputError: An input is missing, or has a size that the components cannot use.
        """
        check_inputs(self.inputs, batch, self._where)
        return {IMAGES: self.sampler.generate(batch[IDS], batch[NOISE], batch[SEED].tolist())}

    def probe(self, examples: Examples) -> np.ndarray:
        """Generate a few images in a few steps, with all components: [n, height, width, channels]."""
        batch = examples.batch(range(min(_PROBES, len(examples))))
        return self.shortened().predict(batch)[IMAGES]

    def shortened(self) -> DiffusionSession:
        """Return the session with few steps, which do not amplify differences of components as many steps do."""
        return self.with_sampling(replace(self.sampler.sampling, steps=_PROBE_STEPS))

    def with_sampling(self, sampling: Sampling) -> DiffusionSession:
        """Return the session with another number of steps or guidance scale."""
        return DiffusionSession(replace(self.sampler, sampling=sampling), self.parts, self._where)

    def with_part(self, part: str, session: Session) -> DiffusionSession:
        """Return the session with another session of one component."""
        call = {TEXT_ENCODER: "encode", DECODER: "decode"}.get(part, "denoise")
        sampler = replace(self.sampler, **{call: _component_call(session)})  # type: ignore[arg-type]
        return DiffusionSession(sampler, {**self.parts, part: session}, self._where)


def open_session(sessions: Sequence[Session], folder: Path) -> DiffusionSession:
    """Return the session of the open components of ``folder``, with its scheduler and number of steps.

    Raises:
        ModelError: A component lacks an input or an output of optimum's export.
    """
    parts = dict(zip((TEXT_ENCODER, UNET, DECODER), sessions, strict=True))
    for name, session in parts.items():
        inputs, outputs = set(session.inputs), session.output_types
        if inputs - {CONDITION} != _INPUTS[name] or OUTPUTS[name] not in outputs:
            raise ModelError(
                f"The part {name!r} has the inputs {', '.join(sorted(inputs))} and the outputs {', '.join(outputs)}.",
                where=str(folder / name),
                expected=f"{', '.join(sorted(_INPUTS[name]))} and {OUTPUTS[name]}",
                hint="write the model with the stage onnx; pipelines of other inputs are not supported",
            )
    sampler = DiffusionSampler(
        **_component_calls(parts),
        scheduler=load_scheduler(folder),
        latents=LatentSpace.from_configs(part_config(folder, UNET), vae_config(folder)),
        sampling=Sampling.read(folder),
        empty=load_prompt_processor(folder).ids([""]),
    )
    return DiffusionSession(sampler, parts, str(folder))


def _component_calls(parts: Mapping[str, Session]) -> dict[str, ComponentCall]:
    """Return the calls of a sampler."""
    names = {"encode": TEXT_ENCODER, "denoise": UNET, "decode": DECODER}
    return {call: _component_call(parts[name]) for call, name in names.items()}


def _component_call(session: Session) -> ComponentCall:
    """Return a call that converts inputs to the types of the session.

    Timesteps of other exporters are integers, or have an axis.
    """

    def call(batch: Batch) -> Mapping[str, np.ndarray]:
        inputs = dict(batch)
        for name, (dtype, shape) in session.input_types.items():
            if name in inputs:
                array = inputs[name].astype(dtype, copy=False)
                inputs[name] = array[np.newaxis] if array.ndim == 0 and len(shape) == 1 else array
        return session.predict(inputs)

    return call


class TorchComponent:
    """Session of one torch component. ``compute`` maps tensors with the names of ``inputs`` to the ``output``."""

    provider = "cpu"

    input_types: Mapping[str, TensorType] = MappingProxyType({})
    output_types: Mapping[str, TensorType] = MappingProxyType({})

    def __init__(
        self, inputs: Sequence[str], output: str, compute: Callable[..., torch.Tensor], settings: Mapping[str, object]
    ) -> None:
        self.inputs, self._output, self._compute, self.settings = tuple(inputs), output, compute, dict(settings)

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """See `Session.predict`."""
        import torch

        check_inputs(self.inputs, batch, "the torch module")
        tensors = {name: torch.from_numpy(np.asarray(batch[name])) for name in self.inputs}
        try:
            with torch.inference_mode():
                return {self._output: np.asarray(self._compute(**tensors).float().numpy())}
        except FAILURES as error:
            raise StageError(f"The model failed on a batch: {first_line(error)}") from error


def open_torch(model: GeneratorModel, settings: Mapping[str, object], where: str = "the model") -> DiffusionSession:
    """Return the session of the torch components of ``model``, with its scheduler and number of steps."""
    text, denoiser, vae = (model.parts[name] for name in (TEXT_ENCODER, UNET, "vae"))
    latents = LatentSpace.from_configs(denoiser.config, vae.config)
    condition = (CONDITION,) if latents.condition else ()
    parts: dict[str, Session] = {
        TEXT_ENCODER: TorchComponent([IDS], HIDDEN, lambda input_ids: text(input_ids)[0], settings),
        UNET: TorchComponent(
            (SAMPLE, TIMESTEP, TEXT, *condition),
            DENOISED,
            lambda **inputs: denoiser(**inputs, return_dict=False)[0],
            settings,
        ),
        DECODER: TorchComponent([LATENT], IMAGE, lambda latent_sample: vae.decode(latent_sample)[0], settings),
    }
    sampler = DiffusionSampler(
        **_component_calls(parts),
        scheduler=model.scheduler,
        latents=latents,
        sampling=model.sampling,
        empty=model.processor.ids([""]),
    )
    return DiffusionSession(sampler, parts, where)


def torch_sampler(model: GeneratorModel) -> DiffusionSampler:
    """Return the sampling loop over the torch components of ``model``."""
    return open_torch(model, {}).sampler
