"""The parts of a model that draws pictures, as torch computes them, for the loop that draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from compress.formats.runtime import Batch, TensorType, check_inputs
from compress.formats.safetensors.runtime import FAILURES
from compress.models.pipeline_folder import UNET
from compress.plugins.diffusion.pipeline_model import TEXT_ENCODER, VAE, GeneratorModel
from compress.plugins.diffusion.sampler import (
    CONDITION,
    DENOISED,
    HIDDEN,
    IDS,
    LATENT,
    PICTURE,
    SAMPLE,
    TEXT,
    TIMESTEP,
    Latents,
    PictureSampler,
)
from compress.plugins.diffusion.session import DECODER, PictureSession, sampler_of
from compress.utils.errors import StageError, first_line


class TorchPart:
    """One part as a session: ``compute`` takes tensors by the names of ``inputs`` and gives the output ``gives``."""

    provider = "cpu"

    def __init__(
        self, inputs: Sequence[str], gives: str, compute: Callable[..., Any], settings: Mapping[str, object]
    ) -> None:
        self.inputs, self._gives, self._compute, self.settings = tuple(inputs), gives, compute, dict(settings)
        self.input_types: Mapping[str, TensorType] = {}
        self.output_types: Mapping[str, TensorType] = {}

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """See `Session.predict`."""
        import torch

        check_inputs(self.inputs, batch, "the torch module")
        given = {name: torch.from_numpy(np.asarray(batch[name])) for name in self.inputs}
        try:
            with torch.inference_mode():
                return {self._gives: np.asarray(self._compute(**given).float().numpy())}
        except FAILURES as error:
            raise StageError(f"The model failed on a batch: {first_line(error)}") from error


def torch_pictures(model: GeneratorModel, settings: Mapping[str, object], where: str = "the model") -> PictureSession:
    """Draws with the modules of ``model``, its scheduler and its own number of steps."""
    text, denoiser, vae = (model.parts[name] for name in (TEXT_ENCODER, UNET, VAE))
    latents = Latents.of(denoiser.config, vae.config)
    told = (CONDITION,) if latents.condition else ()
    parts = {
        TEXT_ENCODER: TorchPart([IDS], HIDDEN, lambda input_ids: text(input_ids)[0], settings),
        UNET: TorchPart((SAMPLE, TIMESTEP, TEXT, *told), DENOISED, _first(denoiser), settings),
        DECODER: TorchPart([LATENT], PICTURE, lambda latent_sample: vae.decode(latent_sample)[0], settings),
    }
    empty = model.processor.ids([""])
    loop = sampler_of(parts, latents, model.sampling, model.scheduler, empty)
    return PictureSession(loop, parts, where)


def torch_sampler(model: GeneratorModel) -> PictureSampler:
    """The loop over the modules of ``model``, with its scheduler and its own number of steps."""
    return torch_pictures(model, {}).sampler


def _first(denoiser: Any) -> Callable[..., Any]:
    def compute(**given: Any) -> Any:
        return denoiser(**given, return_dict=False)[0]

    return compute
