"""What can be proven of a directory in diffusers' layout from its JSON and headers, before torch is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.checkpoints.json_file import read_json
from compress.checkpoints.safetensors_file import read_header
from compress.errors import ModelError

MODEL_INDEX = "model_index.json"
_DENOISERS = ("unet", "transformer")
_NEEDED = ("text_encoder", "vae", "tokenizer", "scheduler")
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
    files = tuple(sorted(folder.glob("*.safetensors")))
    if files:
        return files
    pickled = sorted(path for path in folder.iterdir() if path.suffix in _PICKLES) if folder.is_dir() else []
    if pickled:
        raise ModelError(
            f"{pickled[0].name} is a pickle, which can run code when it is opened; it is refused.",
            where=str(pickled[0]),
            expected="weights in safetensors",
            mend="fetch the files of the same model that end in .safetensors, or save_pretrained it in a sandbox",
        )
    raise ModelError(
        f"The part {folder.name!r} has no weights.",
        where=str(folder),
        expected="a config.json and weights in safetensors, as diffusers' save_pretrained writes them",
        mend="fetch the model again; its download stopped early, or the folder is a part of it",
    )


def check_pipeline_folder(folder: Path) -> None:
    """Prove that every part is there and that their widths fit. Raises `ModelError`."""
    named = component_classes(folder)
    denoiser = [name for name in _DENOISERS if name in named]
    absent = [name for name in _NEEDED if name not in named]
    if absent or len(denoiser) != 1:
        raise ModelError(
            f"The pipeline lacks the part {absent[0] if absent else 'unet or transformer'}.",
            where=str(folder / MODEL_INDEX),
            expected=f"{', '.join(_NEEDED)}, and a unet or a transformer",
        )
    for name in ("text_encoder", *denoiser, "vae"):
        for file in weights_of(folder / name):
            read_header(file)
    for name in ("tokenizer", "scheduler"):
        if not (folder / name).is_dir():
            raise ModelError(f"The pipeline's {name} is missing.", where=str(folder / name), expected="its folder")
    _check_widths(folder, denoiser[0])


def part_config(folder: Path, part: str) -> Mapping[str, Any]:
    """A part's config.json."""
    return read_json(folder / part / "config.json")


def noise_shape(folder: Path) -> tuple[int, int, int]:
    """Channels, height and width of the latents that pictures of the model's own size begin as."""
    denoiser = next(name for name in _DENOISERS if (folder / name).is_dir())
    config = part_config(folder, denoiser)
    size = config.get("sample_size")
    height, width = size if isinstance(size, list) else (size, size)
    return int(config["in_channels"]), int(height or 0), int(width or 0)


def _check_widths(folder: Path, denoiser: str) -> None:
    unet, text, vae = (part_config(folder, part) for part in (denoiser, "text_encoder", "vae"))
    wanted = unet.get("cross_attention_dim")
    given = text.get("hidden_size", text.get("d_model"))
    if isinstance(wanted, int) and isinstance(given, int) and wanted != given:
        raise _misfit(folder, denoiser, "cross_attention_dim", wanted, "text_encoder", "hidden_size", given)
    channels, latent = unet.get("out_channels"), vae.get("latent_channels")
    if isinstance(channels, int) and isinstance(latent, int) and channels != latent:
        raise _misfit(folder, denoiser, "out_channels", channels, "vae", "latent_channels", latent)


def _misfit(folder: Path, one: str, field: str, size: int, other: str, its: str, found: int) -> ModelError:
    return ModelError(
        f"The parts are of two versions: {one} has {field} {size}, {other} has {its} {found}.",
        where=str(folder),
        expected="parts that were trained together",
        mend="take all parts from one model",
    )
