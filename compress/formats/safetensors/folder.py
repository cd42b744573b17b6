"""Loading of a folder of weights as a complete torch model in float32, whatever stage wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.formats.quiet_output import suppress_output
from compress.models.checkpoint import Checkpoint
from compress.models.config_checks import is_allowed
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
    pictures = (folder / PREPROCESSOR).is_file() and "sampling_rate" not in read_json(folder / PREPROCESSOR)
    task_name = infer_task(config, (folder / PREPROCESSOR).is_file()) or _generating(config)
    task_name = task_name or (_embedding(config) if pictures else None)
    if task_name is None:
        raise ModelError(
            f"Nothing tells what a model of the class {', '.join(config.get('architectures') or ['?'])} is for.",
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
    if GENERATES in task.capabilities and has_integers(folder):
        model = _as_served(folder) if Checkpoint(folder).is_compressed_tensors else _floats(folder)
    else:
        model = task.load(folder, None, trust_remote_code=is_allowed(str(folder.resolve())))
    # An adapter that lies beside quantized weights applies to the dequantized ones.
    if (folder / ADAPTER).is_dir():
        model.module = merge(model.module, folder / ADAPTER)
    model.module.requires_grad_(False).eval()
    return task, model


def _floats(folder: Path) -> TorchModel:
    from compress.models.quantized_module import dequantize_weights, load_quantized_module

    return TorchModel(dequantize_weights(load_quantized_module(Checkpoint(folder))), load_tokenizer(folder))


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


def _embedding(config: dict[str, Any]) -> str | None:
    """Return a task that embeds images if the config names transformers' headless class of its model type."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    known = MODEL_MAPPING_NAMES.get(config.get("model_type"))
    bare = known is not None and known in (config.get("architectures") or [])
    return next(iter(tasks_with(frozenset({EMBEDS, TAKES_IMAGES}))), None) if bare else None


def _generating(config: dict[str, Any]) -> str | None:
    """Return a generation task if the config's class maps to transformers' causal language model of its type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.get("model_type"))
    generates = known is not None and known in (config.get("architectures") or [])
    return next(iter(tasks_with(frozenset({GENERATES}))), None) if generates else None
