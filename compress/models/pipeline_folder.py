"""What can be proven of a directory in diffusers' layout from its JSON and headers, before torch is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.models.json_file import read_json
from compress.utils.errors import ModelError

MODEL_INDEX, CONFIG = "model_index.json", "config.json"
CHECKER = "safety_checker"
UNET = "unet"
"""The part that is called once a step. Transformers in its place take other arguments; none is called here yet."""
_UNETS = ("UNet2DConditionModel",)
"""Classes of it that are called here as diffusers' pipelines call them."""
_NEEDED = ("text_encoder", UNET, "vae", "tokenizer", "scheduler")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def is_pipeline(folder: Path) -> bool:
    """Whether a folder is in diffusers' layout."""
    return (folder / MODEL_INDEX).is_file()


def component_classes(folder: Path) -> dict[str, tuple[str, str]]:
    """Component -> its library and class, those that model_index.json leaves out not counted."""
    found = {}
    for name, value in read_json(folder / MODEL_INDEX).items():
        if isinstance(value, list) and len(value) == 2 and all(isinstance(one, str) for one in value):
            found[name] = (value[0], value[1])
    return found


def weights_of(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of one part. Raises `ModelError` where there are none, or pickles alone."""
    files = tuple(path for path in sorted(folder.glob("*.safetensors")) if not _is_variant(path))
    if files:
        return files
    pickled = sorted(path for path in folder.iterdir() if path.suffix in _PICKLES) if folder.is_dir() else []
    if pickled:
        raise ModelError(
            f"{pickled[0].name} is a pickle, which can run code when it is opened; it is refused.",
            where=str(pickled[0]),
            expected="weights in safetensors",
            hint="fetch the files of the same model that end in .safetensors, or save_pretrained it in a sandbox",
        )
    raise ModelError(
        f"The part {folder.name!r} has no weights.",
        where=str(folder),
        expected="a config.json and weights in safetensors, as diffusers' save_pretrained writes them",
        hint="fetch the model again; its download stopped early, or the folder is a part of it",
    )


def _is_variant(path: Path) -> bool:
    """Whether it is the same weights in another type: `model.fp16.safetensors`."""
    return path.name.count(".") > 1


def pipeline_weights(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of every part that has any."""
    parts = [folder / name for name in component_classes(folder)]
    return tuple(file for part in parts if any(part.glob("*.safetensors")) for file in weights_of(part))


def part_folders(folder: Path) -> tuple[str, ...]:
    """The folders of a pipeline's parts, weights or graphs, in the order in which they run; none of another model."""
    names = ("text_encoder", UNET, "vae", "vae_decoder") if is_pipeline(folder) else ()
    return tuple(name for name in names if (folder / name).is_dir())


def pipeline_config(index: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json beside model_index.json says: the class of the pipeline, so that the task is told."""
    return {"architectures": [index.get("_class_name")]}


def model_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder, or of a pipeline what it would say. Raises `ModelError`."""
    if is_pipeline(folder) and not (folder / CONFIG).is_file():
        return pipeline_config(read_json(folder / MODEL_INDEX))
    return dict(read_json(folder / CONFIG))


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


def part_config(folder: Path, part: str) -> Mapping[str, Any]:
    """A part's config.json."""
    return read_json(folder / part / "config.json")


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
