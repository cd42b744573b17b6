"""Sessions that generate images with an open text encoder, denoiser and decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.formats.runtime import Batch, Session, TensorType, check_inputs
from compress.formats.safetensors.runtime import FAILURES
from compress.models.pipeline_folder import UNET, part_config
from compress.plugins.diffusion.sampler import (
    CONDITION,
    DENOISED,
    HIDDEN,
    IDS,
    IMAGE,
    IMAGES,
    LATENT,
    NOISE,
    SAMPLE,
    SEED,
    TEXT,
    TIMESTEP,
    ComponentCall,
    DiffusionSampler,
    LatentSpace,
)
from compress.plugins.diffusion.sampling_settings import Sampling, empty_prompt_ids, load_scheduler, vae_config
from compress.tasks.task import Examples
from compress.utils.errors import ModelError, StageError, first_line

if TYPE_CHECKING:
    import torch

    from compress.plugins.diffusion.pipeline_model import GeneratorModel

TEXT_ENCODER, DECODER = "text_encoder", "vae_decoder"
"""Folders of optimum before the UNet's and after it."""
_INPUTS = {TEXT_ENCODER: {IDS}, UNET: {SAMPLE, TIMESTEP, TEXT}, DECODER: {LATENT}}
_OUTPUTS = {TEXT_ENCODER: HIDDEN, UNET: DENOISED, DECODER: IMAGE}
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
        if inputs - {CONDITION} != _INPUTS[name] or _OUTPUTS[name] not in outputs:
            raise ModelError(
                f"The part {name!r} has the inputs {', '.join(sorted(inputs))} and the outputs {', '.join(outputs)}.",
                where=str(folder / name),
                expected=f"{', '.join(sorted(_INPUTS[name]))} and {_OUTPUTS[name]}",
                hint="write the model with the stage onnx; pipelines of other inputs are not supported",
            )
    sampler = DiffusionSampler(
        **_component_calls(parts),
        scheduler=load_scheduler(folder),
        latents=LatentSpace.from_configs(part_config(folder, UNET), vae_config(folder)),
        sampling=Sampling.read(folder),
        empty=empty_prompt_ids(folder),
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

    def __init__(
        self,
        inputs: Sequence[str],
        output: str,
        compute: Callable[..., torch.Tensor],
        settings: Mapping[str, object],
    ) -> None:
        self.inputs, self._output, self._compute, self.settings = tuple(inputs), output, compute, dict(settings)
        self.input_types: Mapping[str, TensorType] = {}
        self.output_types: Mapping[str, TensorType] = {}

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
