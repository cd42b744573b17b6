"""LoRA adapters in peft's format: a folder with `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import operator
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compress.models.config_checks import load_error_types
from compress.models.folder_checks import count_not_finite, pickle_error
from compress.models.json_file import read_json, wrong_fields
from compress.models.safetensors_file import read_header
from compress.utils.errors import InputError, MissingExtraError, ModelError, first_line

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

    from compress.models.checkpoint import Checkpoint
    from compress.models.stored_tensor import StoredTensor

ADAPTER = "adapter"
"""Subfolder of a checkpoint that holds its adapter.

In the checkpoint's own folder, `adapter_config.json` would make transformers load the adapter with the model.
"""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"
"""peft's name of an adapter without a name."""
_MAX_REPETITIONS = 6
_FACTOR = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")


class LowRank(NamedTuple):
    """Factors ``a`` [rank, in_features] and ``b`` [out_features, rank]; ``b a`` is added to a layer's weight."""

    a: torch.Tensor
    b: torch.Tensor


def check_adapter(folder: Path) -> dict[str, Any]:
    """Check that ``folder`` holds a LoRA adapter in safetensors with finite weights, and return its config.

    Raises `ModelError`.
    """
    if not (folder / CONFIG).is_file():
        raise ModelError(
            "The folder holds no adapter.",
            where=str(folder),
            expected=f"{CONFIG} and {WEIGHTS}, as peft's save_pretrained writes them",
            hint="check the path",
        )
    config = read_json(folder / CONFIG)
    if (kind := config.get("peft_type")) != "LORA":
        raise ModelError(f"The adapter is of the type {kind!r}.", where=str(folder / CONFIG), expected="LORA")
    # peft imports the module of that name.
    if config.get("megatron_config"):
        raise ModelError(
            "The adapter is for Megatron, whose module would be imported.",
            where=str(folder / CONFIG),
            expected="an adapter of a model of transformers",
            hint=f"if the adapter fits such a model too, remove megatron_config from {CONFIG}",
        )
    if not (folder / WEIGHTS).is_file():
        # Older versions of peft wrote pickles.
        pickles = sorted(folder.glob("adapter_model.bin"))
        if pickles:
            raise pickle_error(pickles[0])
        raise ModelError(f"The adapter has no {WEIGHTS}.", where=str(folder), hint="fetch or save it again")
    tensors = read_header(folder / WEIGHTS)
    _check_sizes(folder, config, tensors)
    # An adapter is small, so all values are read.
    for tensor in tensors:
        if count_not_finite(tensor):
            raise ModelError(
                f"The adapter's tensor {tensor.name!r} holds NaN or infinite values.",
                where=str(folder / WEIGHTS),
                expected="finite weights",
            )
    return config


def check_pattern(pattern: str) -> None:
    """Raise `ValueError` for an invalid regular expression, and for one that may take forever in peft.

    The latter repeats a group, or many parts.
    """
    if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > _MAX_REPETITIONS:
        raise ValueError(f"the pattern {pattern!r:.80} repeats a group, or more than {_MAX_REPETITIONS} parts")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"the pattern {pattern!r:.80} is no regular expression: {error}") from error


def _check_sizes(folder: Path, config: Mapping[str, Any], tensors: Sequence[StoredTensor]) -> None:
    """Raise `ModelError` for ranks beyond those of the file, of which peft would make matrices, and slow patterns."""
    largest = max((size for tensor in tensors for size in tensor.shape), default=0)
    with wrong_fields(folder / CONFIG):
        ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
        for rank in (config.get("r", 8), *ranks.values()):
            if operator.index(rank) > largest:
                raise ValueError(f"the rank is {rank}, and the largest size of a tensor {largest}")
        named = [config.get(name) or [] for name in ("target_modules", "exclude_modules", "layers_pattern")]
        # A text is a regular expression, and the names in a list are plain.
        for pattern in (*(name for name in named if isinstance(name, str)), *ranks, *alphas):
            check_pattern(pattern)


def check_fits(folder: Path, module: nn.Module) -> None:
    """Check that each factor of the adapter matches a linear layer of ``module``. Raises `ModelError`."""
    layers = dict(module.named_modules())
    for tensor in read_header(folder / WEIGHTS):
        match = _FACTOR.match(tensor.name)
        if match is None:
            continue
        # A maps inputs to the rank, B maps the rank to outputs.
        size_name, axis = ("in_features", 1) if match["side"] == "A" else ("out_features", 0)
        layer_width = getattr(layers.get(match["module"]), size_name, None)
        if len(tensor.shape) != 2:
            raise ModelError(
                f"The adapter's tensor {tensor.name!r} has {len(tensor.shape)} axes.",
                where=str(folder / WEIGHTS),
                expected="a matrix",
            )
        if layer_width is None:
            raise ModelError(
                f"The adapter is for a layer {match['module']!r}, which the model does not have.",
                where=str(folder / WEIGHTS),
                expected="an adapter that was trained on this model's architecture",
            )
        if tensor.shape[axis] != layer_width:
            raise ModelError(
                f"The adapter's tensor {tensor.name!r} is {list(tensor.shape)}.",
                where=str(folder / WEIGHTS),
                expected=f"{layer_width} in place of {tensor.shape[axis]}, as {match['module']!r} is wide",
                hint="take the adapter of this model, not of a larger or smaller one",
            )


def merge(module: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Add the adapter's product to the weights of ``module`` in place: W + (alpha / r) B A.

    Hu et al. 2021 (LoRA), section 4.1. Raises `ModelError` for an adapter that does not fit.
    """
    check_adapter(folder)
    check_fits(folder, module)
    # Refuse to merge if that would change the input embeddings together with a head that shares their weight.
    adapted = {match["module"] for tensor in read_header(folder / WEIGHTS) if (match := _FACTOR.match(tensor.name))}
    # The head's weight is the embedding's in a tied model.
    head = module.get_output_embeddings()
    name = next((name for name, layer in module.named_modules() if layer is head), None)
    if name in adapted and head.weight is module.get_input_embeddings().weight:
        raise ModelError(
            f"The adapter is for {name!r}, whose weight is the embedding's too; merging would change both.",
            where=str(folder / WEIGHTS),
            expected="an adapter of other layers, or a model whose head is not tied",
        )
    try:
        merged: PreTrainedModel = open_adapter(module, folder).merge_and_unload(safe_merge=True)
    except ValueError as error:
        # Infinite or NaN weights, or a scale that makes the merged ones so.
        raise ModelError(
            f"The adapter cannot be merged: {first_line(error)}",
            where=str(folder),
            expected="an adapter with which all weights are finite",
        ) from error
    return merged


def open_adapter(module: PreTrainedModel, folder: Path) -> PeftModel:
    """Insert the adapter's layers into ``module`` in place. Raises `ModelError` if some of its weights are unused."""
    peft = import_peft("an adapter")
    from safetensors import SafetensorError

    refusals: tuple[type[Exception], ...] = (*load_error_types(), UserWarning, SafetensorError, re.error)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # peft only warns of weights that are missing
            warnings.simplefilter("ignore", FutureWarning)  # its own calls of what transformers will remove
            opened: PeftModel = peft.PeftModel.from_pretrained(module, str(folder))
            loaded = set(peft.get_peft_model_state_dict(opened, save_embedding_layers=False))
    except refusals as error:
        raise ModelError(
            f"peft cannot put the adapter on the model: {first_line(error)}",
            where=str(folder),
            expected=f"an adapter for {type(module).__name__}",
        ) from error
    # peft ignores tensors for modules that the model does not have.
    unused = {tensor.name for tensor in read_header(folder / WEIGHTS)} - loaded
    if unused:
        raise ModelError(
            f"The model has no layers for {len(unused)} of the adapter's tensors, such as {min(unused)!r}.",
            where=str(folder / WEIGHTS),
            expected=f"an adapter for {type(module).__name__}",
        )
    return opened


def load_adapted(checkpoint: Checkpoint) -> PreTrainedModel:
    """Load the checkpoint as a module, with its adapter if it has one. Raises `ModelError`."""
    from compress.models.quantized_module import load_quantized_module

    module, folder = load_quantized_module(checkpoint), checkpoint.folder / ADAPTER
    if not folder.is_dir():
        return module
    check_adapter(folder)
    check_fits(folder, module)
    adapted: PreTrainedModel = open_adapter(module, folder).eval().get_base_model()
    return adapted


def low_rank(checkpoint: Checkpoint) -> dict[str, LowRank]:
    """Return the factors of a checkpoint's adapter by layer; empty if it has no adapter.

    Raises `ModelError` for one that is more than a sum of products, such as DoRA.
    """
    if not (checkpoint.folder / ADAPTER).is_dir():
        return {}
    factors = {}
    for name, layer in load_adapted(checkpoint).named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        # DoRA and biases change the weight by more than a product.
        if set(layer.lora_A) != {_NAME} or layer.lora_variant or layer.lora_bias.get(_NAME):
            raise ModelError(
                f"The adapter of {name!r} is more than a product of two factors.",
                where=str(checkpoint.folder / ADAPTER),
                expected="plain LoRA, without DoRA and without a bias",
            )
        a, b = (side[_NAME].weight.detach().float() for side in (layer.lora_A, layer.lora_B))
        # The scaling alpha / r is multiplied into B.
        factors[name] = LowRank(a, b * layer.scaling[_NAME])
    return factors


def write_adapter(adapted: PeftModel, folder: Path) -> None:
    """Write the adapter as peft does, without fields that name this machine or differ between equal runs."""
    folder.mkdir(parents=True)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    # The card and the base model's path would name local folders.
    (folder / "README.md").unlink(missing_ok=True)
    config = read_json(folder / CONFIG)
    config["base_model_name_or_path"] = None
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def copy_adapter(source: Path, target: Path) -> None:
    """Copy an adapter's config and weights unchanged."""
    target.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(source / name, target / name)


def refuse_second(folder: Path) -> None:
    """Raise `InputError` if a checkpoint has an adapter already."""
    if (folder / ADAPTER).exists():
        raise InputError(
            "The checkpoint has an adapter already.",
            where=str(folder / ADAPTER),
            expected="one adapter for a checkpoint",
            hint="leave one of the recipe's two stages out",
        )


def import_peft(needed_by: str) -> Any:
    """Import the package peft. Raises `MissingExtraError`."""
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError("peft", "lora", needed_by) from error
    return peft
