"""Hooks of models that generate images: functions that a plug-in registers and the core calls by name.

A diffusion model differs from other models almost everywhere: it is a folder of several components, it needs a sampling
loop to answer, and its answers are judged and timed in other ways. The core knows the layout of such a folder
(`compress.models.pipeline_folder`) and the capability `GENERATES_IMAGES` of a task. All else is behind these hooks,
which are looked up when they are called, so that nothing of the plug-in is imported for other models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from compress.plugins import explain_missing, find_extensions
from compress.utils.errors import ModelError

__all__ = ["HOOKS", "image_generation_hook"]

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
