"""Loading of a folder of weights as a complete torch model in float32, whatever stage wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.formats.quiet_output import suppress_output
from compress.models.checkpoint import Checkpoint
from compress.models.config_checks import allows_repository_code
from compress.models.folder_checks import check_model_folder, weight_files
from compress.models.json_file import read_json
from compress.models.lora_adapter import ADAPTER, merge
from compress.models.model import TorchModel
from compress.models.pipeline_folder import model_config
from compress.models.processor import PREPROCESSOR, load_tokenizer
from compress.models.quantization_config import COMPRESSED_TENSORS
from compress.tasks.capability import EMBEDS, GENERATES, TAKES_IMAGES
from compress.tasks.registry import TASKS, infer_task, tasks_with
from compress.tasks.task import Task
from compress.utils.environment import has_package
from compress.utils.errors import MissingExtraError, ModelError


def find_weights(artifact: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a folder, or the file itself; raise `ModelError` if there is none."""
    return (artifact,) if artifact.is_file() else weight_files(artifact)


def has_integers(folder: Path) -> bool:
    """Return whether weights in the folder are stored as integers."""
    return model_config(folder).get("quantization_config") is not None


def task_of_folder(folder: Path) -> Task:
    """Return the task that the folder's config determines; raise `ModelError` if it determines none."""
    config = model_config(folder)
    preprocessor = read_json(folder / PREPROCESSOR) if (folder / PREPROCESSOR).is_file() else None
    from transformers.models.auto import modeling_auto

    # The config may name a causal language model of its type, or transformers' headless class of it for images.
    task_name = infer_task(config, preprocessor is not None)
    task_name = task_name or _task_of_class(config, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, GENERATES)
    if task_name is None and preprocessor is not None and "sampling_rate" not in preprocessor:
        task_name = _task_of_class(config, modeling_auto.MODEL_MAPPING_NAMES, EMBEDS, TAKES_IMAGES)
    if task_name is None:
        raise ModelError(
            f"No task is known for a model of the class {', '.join(config.get('architectures') or ['?'])}.",
            where=str(folder / "config.json"),
            expected=f"architectures of one of the tasks {', '.join(TASKS)}",
        )
    return TASKS[task_name].specialize(config)


def load_folder(artifact: Path) -> tuple[Task, TorchModel]:
    """Return the folder's task and model, with dequantized integers and the adapter merged; raise `ModelError`."""
    folder = artifact.parent if artifact.is_file() else artifact
    check_model_folder(folder)
    task = task_of_folder(folder)
    # transformers itself opens compressed-tensors; the other layouts are dequantized here.
    if GENERATES not in task.capabilities or not has_integers(folder):
        model = task.load(folder, None, trust_remote_code=allows_repository_code(folder))
    elif Checkpoint(folder).is_compressed_tensors:
        model = _as_served(folder)
    else:
        from compress.models.quantized_module import dequantize_weights, load_quantized_module

        model = TorchModel(dequantize_weights(load_quantized_module(Checkpoint(folder))), load_tokenizer(folder))
    # An adapter that lies beside quantized weights applies to the dequantized ones.
    if (folder / ADAPTER).is_dir():
        model.module = merge(model.module, folder / ADAPTER)
    model.module.requires_grad_(False).eval()
    return task, model


def _as_served(folder: Path) -> TorchModel:
    """Open the folder with compressed-tensors in transformers; inputs are rounded if the config requests it."""
    import torch
    from transformers import AutoModelForCausalLM

    from compress.models.config_checks import load_error_types

    if not has_package(COMPRESSED_TENSORS):
        raise MissingExtraError(COMPRESSED_TENSORS, COMPRESSED_TENSORS, "a checkpoint in the layout of that name")
    with suppress_output("prints"):  # a bar for each step
        try:
            module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
            module.hf_quantizer.compressor.decompress_model(module)
        except load_error_types() as error:
            raise ModelError(f"transformers cannot open the checkpoint: {error}", where=str(folder)) from error
    return TorchModel(module, load_tokenizer(folder))


def _task_of_class(config: Mapping[str, Any], classes: Mapping[str, str], *capabilities: str) -> str | None:
    """Return a task with the capabilities if the config names the class that ``classes`` has for its model type."""
    is_named = classes.get(config.get("model_type", "")) in (config.get("architectures") or [])
    return next(iter(tasks_with(frozenset(capabilities))), None) if is_named else None
