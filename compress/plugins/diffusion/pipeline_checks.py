"""Checks of a diffusion pipeline's folder from JSON and headers alone. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.models.pipeline_folder import CONFIG, MODEL_INDEX, UNET, component_classes, part_config, weights_of
from compress.utils.errors import ModelError

_NEEDED = ("text_encoder", UNET, "vae", "tokenizer", "scheduler")
_UNETS = ("UNet2DConditionModel",)
"""Classes of it that are called here as diffusers' pipelines call them."""


def check_pipeline_folder(folder: Path) -> None:
    """Prove that every part is there and that their widths fit. Raises `ModelError`."""
    # What is measured only asks whether a folder is a pipeline, and is to import nothing more.
    from compress.models.safetensors_file import read_header

    named = component_classes(folder)
    absent = [name for name in _NEEDED if name not in named]
    if absent:
        instead = named.get("transformer") if absent[0] == UNET else None
        raise ModelError(
            f"The pipeline lacks the part {absent[0]}"
            + (f", and has a transformer ({instead[1]}) instead." if instead else "."),
            where=str(folder / MODEL_INDEX),
            expected=f"{', '.join(_NEEDED)}, as Stable Diffusion 1 and 2 have them",
        )
    further = [name for name in named if name.startswith(("text_encoder_", "tokenizer_"))]
    if further:
        raise ModelError(
            f"The pipeline has a {further[0]} beside the first.",
            where=str(folder / MODEL_INDEX),
            expected="one text encoder and one denoiser, as Stable Diffusion 1 and 2 have them",
        )
    _, denoises = named[UNET]
    if denoises not in _UNETS:
        raise ModelError(
            f"The pipeline's UNet is a {denoises}, which takes other arguments.",
            where=str(folder / MODEL_INDEX),
            expected=f"a {' or '.join(_UNETS)}, as Stable Diffusion 1 and 2 have it",
        )
    for name in _NEEDED:
        if not (folder / name).is_dir():
            raise ModelError(
                f"The pipeline's part {name!r} is missing.",
                where=str(folder / name),
                expected="a folder for each part that model_index.json names",
                hint="fetch the model again; its download stopped early",
            )
    for name in ("text_encoder", UNET, "vae"):
        for file in weights_of(folder / name):
            read_header(file)
    if part_config(folder, "text_encoder").get("use_attention_mask"):
        raise ModelError(
            "The pipeline's text encoder is told which tokens are padding, which is not done here.",
            where=str(folder / "text_encoder" / CONFIG),
            expected="a text encoder without use_attention_mask, as Stable Diffusion 1 and 2 have it",
        )
    _check_widths(folder)


def noise_shape(folder: Path) -> tuple[int, int, int]:
    """Channels, height and width of the latents that pictures of the model's own size begin as."""
    config = part_config(folder, UNET)
    size = config.get("sample_size")
    height, width = size if isinstance(size, list) else (size, size)
    return int(config["in_channels"]), int(height or 0), int(width or 0)


def vae_config(folder: Path) -> Mapping[str, Any]:
    """The config of the VAE, which beside graphs is that of its decoder."""
    return part_config(folder, "vae_decoder" if (folder / "vae_decoder").is_dir() else "vae")


def picture_shape(folder: Path) -> tuple[int, int, int]:
    """Channels, height and width of pictures of the model's own size."""
    vae, (_, height, width) = vae_config(folder), noise_shape(folder)
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    return int(vae["out_channels"]), factor * height, factor * width


def _check_widths(folder: Path) -> None:
    unet, text, vae = (part_config(folder, part) for part in (UNET, "text_encoder", "vae"))
    wanted = unet.get("cross_attention_dim")
    given = text.get("hidden_size", text.get("d_model"))
    if isinstance(wanted, int) and isinstance(given, int) and wanted != given:
        raise _misfit(folder, UNET, "cross_attention_dim", wanted, "text_encoder", "hidden_size", given)
    channels, latent = unet.get("out_channels"), vae.get("latent_channels")
    if isinstance(channels, int) and isinstance(latent, int) and channels != latent:
        raise _misfit(folder, UNET, "out_channels", channels, "vae", "latent_channels", latent)


def _misfit(folder: Path, one: str, field: str, size: int, other: str, its: str, found: int) -> ModelError:
    return ModelError(
        f"The parts are of two versions: {one} has {field} {size}, {other} has {its} {found}.",
        where=str(folder),
        expected="parts that were trained together",
        hint="take all parts from one model",
    )
