"""Layout of a diffusers folder: components, weights and configs, read before torch is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from compress.models.json_file import read_json
from compress.plugins import explain_missing, find_extensions
from compress.utils.errors import ModelError

__all__ = ["HOOKS", "image_generation_hook"]

MODEL_INDEX, CONFIG = "model_index.json", "config.json"
CHECKER = "safety_checker"
SafetyChecker = Literal["keep", "leave_out"]
"""Decision of a recipe about a pipeline's safety checker."""
UNET = "unet"
"""Component that is called once per sampling step; diffusion transformers are not supported yet."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def is_pipeline(folder: Path) -> bool:
    """Return True if a folder has the layout of diffusers."""
    return (folder / MODEL_INDEX).is_file()


def component_classes(folder: Path) -> dict[str, tuple[str, str]]:
    """Map each component in model_index.json to its library and class; components that are left out are skipped."""
    components = {}
    for name, value in read_json(folder / MODEL_INDEX).items():
        if isinstance(value, list) and len(value) == 2 and all(isinstance(entry, str) for entry in value):
            components[name] = (value[0], value[1])
    return components


def weights_of(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files of one component. Raises `ModelError` if there are none or only pickles."""
    # Skip the same weights in another type, such as `model.fp16.safetensors`.
    files = tuple(path for path in sorted(folder.glob("*.safetensors")) if path.name.count(".") == 1)
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


def pipeline_weights(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files of every component that has any."""
    parts = [folder / name for name in component_classes(folder)]
    return tuple(file for part in parts if any(part.glob("*.safetensors")) for file in weights_of(part))


def part_folders(folder: Path) -> tuple[str, ...]:
    """Return the folders of a pipeline's components in the order of execution; empty for other models."""
    names = ("text_encoder", UNET, "vae", "vae_decoder") if is_pipeline(folder) else ()
    return tuple(name for name in names if (folder / name).is_dir())


def pipeline_config(index: Mapping[str, object]) -> dict[str, Any]:
    """Return the content of a config.json for a pipeline: its class, from which the task is inferred."""
    return {"architectures": [index.get("_class_name")]}


def model_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a model folder, or the equivalent for a pipeline. Raises `ModelError`."""
    if is_pipeline(folder) and not (folder / CONFIG).is_file():
        return pipeline_config(read_json(folder / MODEL_INDEX))
    return dict(read_json(folder / CONFIG))


def part_config(folder: Path, part: str) -> Mapping[str, Any]:
    """Return a component's config.json."""
    return read_json(folder / part / "config.json")


POINT = "image_generation"
"""Name of the extension point."""
HOOKS = {
    "check_folder": "(folder) -> None: raise `ModelError` for a pipeline's folder that is incomplete or unsupported",
    "load_processor": "(folder) -> processor of prompts, which also creates the initial noise",
    "convert_folder": "(folder, cache, safety_checker, progress) -> path of the starting folder, written once",
    "converted_folder": "(folder, cache, safety_checker) -> path that `convert_folder` returns; it may not exist",
    "check_safety_checker": "(folder, safety_checker) -> None: raise `ModelError` if the recipe must decide about it",
    "open_components": "(sessions, folder) -> session that generates images with open components",
    "open_torch": "(model, settings, where) -> session that generates images with the modules of a `TorchModel`",
    "open_onnx": "(model) -> session that generates images with the graphs of an `OnnxModel`",
    "write_onnx": "(model, context, opset, fusions, tolerance) -> `OnnxModel`, compared with torch",
    "graphs_to_convert": "(model, context) -> `OnnxModel`, a session that computes its reference, and what computes it",
    "calibration_inputs": "(model, file, context) -> `GraphInputs` of one graph of an `OnnxModel`",
    "component_inputs": "(session, component, batch, count) -> inputs of that many calls of a component for a batch",
    "component_calls": "(folder) -> predicted cost of one call of each component, as `PartCall`",
    "check_judge": "(folder, classes) -> None: raise `DataError` if the judge lacks one of the rows' classes",
    "judgements": "(session, parts) -> measurements of images by the recipe's judge, on all rows and on each slice",
    "sampling_steps": "(session) -> measurements of the number of steps of each model",
    "image_grid": "(session) -> `PictureRecord`s of the first images of each model",
    "sampling_drifts": "(session) -> `DriftRecord`s of how far each model's latents drift from the baseline's",
    "time_artifacts": "(parameters of `measure_side_by_side`) -> `BenchmarkResult` of whole images and components",
    "time_image": "(session, batch, steps, size, untimed) -> times of one image in the worker process",
    "load_libraries": "(folder) -> None: load the libraries of the sampling loop, so that they are not measured later",
    "app_sampling": "(folder) -> `AppSampling`-like object with the numbers that an app needs to generate an image",
    "sample_by_table": "(table, denoise, noise, added) -> latents, as an app computes them from a scheduler's table",
}
"""Parameters and result of each hook by name."""


def image_generation_hook(name: str) -> Callable[..., Any]:
    """Import and return the function that a plug-in registers for one of `HOOKS`.

    Raises:
        ModelError: No plug-in for models that generate images is installed.
    """
    assert name in HOOKS, name
    extension = find_extensions(POINT).get(name)
    if extension is None:
        raise ModelError(
            "The model generates images, which no installed plug-in supports.",
            expected=explain_missing(POINT, name) or "a plug-in for models that generate images",
        )
    hook: Callable[..., Any] = extension.load()
    return hook
