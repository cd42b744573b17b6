"""Text-to-image diffusion models: pruning and distillation, export, sessions, evaluation, timing and metrics."""

from __future__ import annotations

from compress.plugins import PluginSpec

_PACKAGE = "compress.plugins.diffusion"

SPEC = PluginSpec(
    name="diffusion",
    summary="Compress, export, evaluate and time text-to-image diffusion models.",
    stages={
        "prune_denoiser": f"{_PACKAGE}.stages:PruneDenoiser",
        "distill_features": f"{_PACKAGE}.stages:DistillFeatures",
        "distill_steps": f"{_PACKAGE}.stages:DistillSteps",
        "distill_consistency": f"{_PACKAGE}.stages:DistillConsistency",
        "distill_autoencoder": f"{_PACKAGE}.stages:DistillAutoencoder",
        "schedule": f"{_PACKAGE}.stages:Schedule",
    },
    tasks={"text-to-image": f"{_PACKAGE}.task:TASK"},
    metrics={"image_generation": f"{_PACKAGE}.metrics:METRICS"},
    image_generation={
        "check_folder": f"{_PACKAGE}.source_folder:check_pipeline_folder",
        "load_processor": f"{_PACKAGE}.pipeline_model:load_prompt_processor",
        "convert_folder": f"{_PACKAGE}.source_folder:convert_pipeline",
        "converted_folder": f"{_PACKAGE}.source_folder:converted_folder",
        "check_safety_checker": f"{_PACKAGE}.source_folder:check_safety_checker",
        "open_components": f"{_PACKAGE}.sampler:open_session",
        "open_torch": f"{_PACKAGE}.sampler:open_torch",
        "open_onnx": f"{_PACKAGE}.onnx_export:open_diffusion",
        "write_onnx": f"{_PACKAGE}.onnx_export:write_onnx",
        "graphs_to_convert": f"{_PACKAGE}.onnx_export:graphs_to_convert",
        "calibration_inputs": f"{_PACKAGE}.calibration:ComponentInputs",
        "component_inputs": f"{_PACKAGE}.calibration:component_inputs",
        "component_calls": f"{_PACKAGE}.component_costs:component_calls",
        "check_judge": f"{_PACKAGE}.judge:check_classes",
        "judgements": f"{_PACKAGE}.evals:judgements",
        "sampling_steps": f"{_PACKAGE}.evals:sampling_steps",
        "image_grid": f"{_PACKAGE}.evals:image_grid",
        "sampling_drifts": f"{_PACKAGE}.evals:sampling_drifts",
        "time_artifacts": f"{_PACKAGE}.timing:measure_image_generation",
        "time_image": f"{_PACKAGE}.worker_timing:time_image",
        "load_libraries": f"{_PACKAGE}.worker_timing:load_libraries",
        "app_sampling": f"{_PACKAGE}.app:app_sampling",
        "sample_by_table": f"{_PACKAGE}.app:sample_by_table",
    },
)
