"""Checks of a diffusers folder, and its conversion to a starting folder with the checked components only.

JSON and safetensors headers suffice. Importing this imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.models.folder_checks import check_model_folder
from compress.models.json_file import read_json
from compress.models.model import link_or_copy
from compress.models.pipeline_folder import (
    CHECKER,
    CONFIG,
    MODEL_INDEX,
    UNET,
    SafetyChecker,
    component_classes,
    part_config,
    pipeline_config,
    weights_of,
)
from compress.plugins.diffusion.pipeline_model import SAMPLING
from compress.utils.errors import ModelError
from compress.utils.progress import Progress, SilentProgress
from compress.utils.storage import digest_file

_REQUIRED = ("text_encoder", UNET, "vae", "tokenizer", "scheduler")
_UNET_CLASS = "UNet2DConditionModel"
_CHECKER_COMPONENTS = (CHECKER, "feature_extractor")
"""Safety checker, and the component that prepares images for it."""
_REVISION = 1
"""Increase it when the same files should be converted into another folder."""
_SMALL_FILES = (".json", ".txt", ".model", ".jinja")


def check_pipeline_folder(folder: Path) -> None:
    """Check that every component exists and that their widths fit. Raises `ModelError`."""
    # Benchmarks only ask if a folder is a pipeline, and should import no more than that needs.
    from compress.models.safetensors_file import read_header

    def misfit(what: str, expected: str, file: str = MODEL_INDEX, hint: str | None = None) -> ModelError:
        return ModelError(what, where=str(folder / file), expected=expected, hint=hint)

    # Check the components that model_index.json names.
    classes = component_classes(folder)
    absent = [name for name in _REQUIRED if name not in classes]
    if absent:
        transformer = classes.get("transformer") if absent[0] == UNET else None
        instead = f", and has a transformer ({transformer[1]}) instead" if transformer else ""
        expected = f"{', '.join(_REQUIRED)}, as Stable Diffusion 1 and 2 have them"
        raise misfit(f"The pipeline lacks the part {absent[0]}{instead}.", expected)
    further = [name for name in classes if name.startswith(("text_encoder_", "tokenizer_"))]
    if further:
        expected = "one text encoder and one denoiser, as Stable Diffusion 1 and 2 have them"
        raise misfit(f"The pipeline has a {further[0]} beside the first.", expected)
    _, denoiser_class = classes[UNET]
    if denoiser_class != _UNET_CLASS:
        expected = f"a {_UNET_CLASS}, as Stable Diffusion 1 and 2 have it"
        raise misfit(f"The pipeline's UNet is a {denoiser_class}, which takes other arguments.", expected)
    for name in _REQUIRED:
        if not (folder / name).is_dir():
            hint = "fetch the model again; its download stopped early"
            expected = "a folder for each part that model_index.json names"
            raise misfit(f"The pipeline's part {name!r} is missing.", expected, name, hint)
    for name in ("text_encoder", UNET, "vae"):
        for file in weights_of(folder / name):
            read_header(file)
    unet, text, vae = (part_config(folder, name) for name in (UNET, "text_encoder", "vae"))
    if text.get("use_attention_mask"):
        message = "The pipeline's text encoder needs an attention mask for padding, which is not supported."
        expected = "a text encoder without use_attention_mask, as Stable Diffusion 1 and 2 have it"
        raise misfit(message, expected, f"text_encoder/{CONFIG}")
    _check_widths(folder, unet, text, vae)


def _check_widths(folder: Path, unet: Mapping[str, Any], text: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    widths = (
        ("cross_attention_dim", "text_encoder", "hidden_size", text.get("hidden_size", text.get("d_model"))),
        ("out_channels", "vae", "latent_channels", vae.get("latent_channels")),
    )
    for field, component, component_field, width in widths:
        if isinstance(unet.get(field), int) and isinstance(width, int) and unet[field] != width:
            sizes = f"{UNET} has {field} {unet[field]}, {component} has {component_field} {width}"
            raise ModelError(
                f"The parts are of two versions: {sizes}.",
                where=str(folder),
                expected="parts that were trained together",
                hint="take all parts from one model",
            )


def converted_folder(folder: Path, cache: Path, checker: SafetyChecker | None) -> Path:
    """Return the path that `convert_pipeline` writes, or ``folder`` if there is nothing to convert.

    Raises:
        ModelError: A file of the pipeline cannot be read.
    """
    from compress.utils.storage import cache_key

    if (folder / CONFIG).is_file() and not _removes_checker(folder, checker):
        return folder
    digests = {path.relative_to(folder).as_posix(): digest_file(path) for path in _component_files(folder, checker)}
    return cache / f"pipeline-{cache_key({'revision': _REVISION, 'files': digests, 'checker': checker})[:32]}"


def convert_pipeline(
    folder: Path, cache: Path, checker: SafetyChecker | None, progress: Progress | None = None
) -> Path:
    """Write a folder with the components of ``folder`` and a config.json that names the pipeline.

    It is written once, below ``cache``. Files are linked where possible.

    Args:
        folder: Pipeline in diffusers' layout.
        cache: Folder of converted models.
        checker: Decision of the recipe about the safety checker.
        progress: Progress display.

    Raises:
        ModelError: The pipeline is incomplete, or has a safety checker that the recipe does not decide about.
    """
    from compress.sources.build_model import write_once

    check_model_folder(folder)
    check_safety_checker(folder, checker)
    target = converted_folder(folder, cache, checker)
    if target == folder or target.is_dir():
        return target
    (progress or SilentProgress()).note(f"preparing the parts of {folder.name} in {cache}")

    def write(directory: Path) -> None:
        directory.mkdir()
        for path in _component_files(folder, checker):
            copy = directory / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(path, copy)
        left_out = _CHECKER_COMPONENTS if _removes_checker(folder, checker) else ()
        index = {
            name: [None, None] if name in left_out else value for name, value in read_json(folder / MODEL_INDEX).items()
        }
        # The copy may be a link to the source's file, which must not change.
        (directory / MODEL_INDEX).unlink()
        (directory / MODEL_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        (directory / CONFIG).write_text(json.dumps(pipeline_config(index), indent=2) + "\n", encoding="utf-8")

    return write_once(target, write, "free some space or name another folder with --artifacts")


def check_safety_checker(folder: Path, checker: SafetyChecker | None) -> None:
    """Raise `ModelError` for a pipeline with a safety checker that the recipe does not decide about."""
    if checker is None and CHECKER in component_classes(folder):
        raise ModelError(
            "The pipeline has a safety checker, and the recipe does not say whether to keep it.",
            where=str(folder / CHECKER),
            expected="safety_checker: keep or leave_out in the recipe",
            hint="write `safety_checker: leave_out` into the recipe and check the images that users see yourself; or "
            "`safety_checker: keep`, for recipes that write no ONNX",
        )


def _removes_checker(folder: Path, checker: SafetyChecker | None) -> bool:
    return checker == "leave_out" and CHECKER in component_classes(folder)


def _component_files(folder: Path, checker: SafetyChecker | None) -> list[Path]:
    """Return the files of the components: one variant of their weights, and small files."""
    files = [path for name in (MODEL_INDEX, SAMPLING) if (path := folder / name).is_file()]
    for name in component_classes(folder):
        if name in _CHECKER_COMPONENTS and _removes_checker(folder, checker):
            continue
        small = [p for p in sorted((folder / name).rglob("*")) if p.suffix in _SMALL_FILES and p.is_file()]
        weights = weights_of(folder / name) if any((folder / name).glob("*.safetensors")) else ()
        files += [*small, *weights]
    return files
