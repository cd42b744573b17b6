"""Torch modules that transformers doesn't know: made by a function that the recipe names, kept in Hugging Face layout.

A folder holds the module's own state dict as `model.safetensors`, and its `config.json` says under `compress_module`
which function made it. Loading it runs that function, so only what the recipe of this process named is ever imported.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import ImageClassifierOutput, ModelOutput

from compress.models.folder_checks import WEIGHTS
from compress.models.pruned_layer_sizes import shrink_to_recorded
from compress.models.remote_code import MODULE_KEY, allowed_code, is_allowed
from compress.utils.errors import ModelError, first_line

Answers = Callable[[Any, Any, PreTrainedConfig], ModelOutput]
"""What a network gave, targets or None, and the config -> outputs as transformers names them, with a loss."""


def logits(found: Any, targets: Any, config: PreTrainedConfig) -> ImageClassifierOutput:
    """[batch, classes], as they are."""
    return ImageClassifierOutput(logits=found)


class PlainModule(nn.Module):
    """A module of images that takes ``pixel_values`` [batch, channels, height, width] and gives what its task asks.

    It has what the rest of the package asks of a transformers model: a config, and a way to be saved.
    """

    def __init__(self, network: nn.Module, config: PreTrainedConfig, answers: Answers = logits) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self._answers = answers

    def forward(self, pixel_values: torch.Tensor, labels: Any = None) -> ModelOutput:
        """The network's answer under transformers' names."""
        return self._answers(self.network(pixel_values), labels, self.config)

    def save_pretrained(self, directory: Path, max_shard_size: str = "") -> None:
        """Write `config.json` and the network's state dict as `model.safetensors`, in one file."""
        self.config.save_pretrained(directory)
        save_model(self.network, str(Path(directory) / WEIGHTS), metadata={"format": "pt"})


def load_plain(directory: Path, config: PreTrainedConfig, answers: Answers = logits) -> PlainModule:
    """The module that ``directory`` holds. Raises `ModelError` where it may not be made, or its weights don't fit."""
    made = getattr(config, MODULE_KEY)
    network = make_network(made["module"], made["arguments"], str(directory))
    shrink_to_recorded(network, config, str(directory / "config.json"))
    try:
        load_model(network, str(directory / WEIGHTS), strict=True)
    except (RuntimeError, OSError) as error:
        raise misfit(made["module"], directory / WEIGHTS, error) from error
    return PlainModule(network, config, answers)


def make_network(reference: str, arguments: Mapping[str, Any], where: str) -> nn.Module:
    """Call the function ``reference``. Raises `ModelError` where no recipe named it, or it gives no module."""
    if not is_allowed(reference):
        raise ModelError(
            f"The model is made by the code {reference!r}, which this recipe doesn't name.",
            where=where,
            expected="a recipe that names all code which it runs",
            hint=f"if you trust that code, write `module: {reference}` into the recipe",
        )
    try:
        network = _function(reference, allowed_code()[reference])(**arguments)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        shown = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise ModelError(
            f"{reference}({shown}) fails: {error}", where="module", hint="correct `module_arguments`"
        ) from error
    if not isinstance(network, nn.Module):
        raise ModelError(f"{reference} gives {type(network).__name__}.", where="module", expected="a torch.nn.Module")
    return network


def code_digest(reference: str) -> str:
    """What tells one state of the code from another: the file's SHA-256, or the package's version."""
    place = reference.partition(":")[0]
    if place.endswith(".py"):
        return f"sha256:{hashlib.sha256(_file(place, allowed_code()[reference]).read_bytes()).hexdigest()}"
    package = place.partition(".")[0]
    names = packages_distributions().get(package, [])
    return " ".join(f"{name}=={version(name)}" for name in sorted(set(names))) or package


def load_state(network: nn.Module, weights: Path, reference: str) -> None:
    """Put the state dict of a `.pth`, `.pt` or `.bin` file into ``network``; it may hold tensors only.

    It is read with torch's ``weights_only``, so that nothing in it is run. Raises `ModelError`.
    """
    import pickle

    try:
        found = torch.load(weights, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
        raise ModelError(
            f"{weights.name} cannot be read as weights: {first_line(error)}",
            where=str(weights),
            expected="a state dict, tensors by name, as torch.save(module.state_dict()) writes it",
        ) from error
    state = found.get("state_dict", found) if isinstance(found, Mapping) else None
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(f"{weights.name} holds no state dict.", where=str(weights), expected="tensors by name")
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise misfit(reference, weights, error) from error


def _function(reference: str, folder: Path) -> Callable[..., object]:
    place, _, name = reference.partition(":")
    try:
        found: Any = _module_of_file(_file(place, folder)) if place.endswith(".py") else importlib.import_module(place)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ModelError(
            f"{reference} cannot be imported: {error}.",
            where="module",
            expected="`package.module:function` of an installed package, or `file.py:function` beside the recipe",
            hint=f"pip install the package that has {place}" if isinstance(error, ModuleNotFoundError) else None,
        ) from error
    return found  # type: ignore[no-any-return]


def _file(name: str, folder: Path) -> Path:
    path = folder / name
    if not path.is_file() or path.resolve().parent != folder.resolve():
        raise ModelError(
            f"There is no file {name!r} beside the recipe.", where="module", expected=f"a file in {folder.resolve()}"
        )
    return path


def _module_of_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"compress_module_{path.stem}", path)
    assert spec is not None and spec.loader is not None, "its name ends in .py"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def misfit(reference: str, weights: Path, error: Exception) -> ModelError:
    """The error for weights of other names or shapes than the module has."""
    lines = str(error).strip().splitlines()
    return ModelError(
        f"The weights are not those of the module that {reference} makes: {' '.join(lines[:2])[:300]}",
        where=str(weights),
        expected="the same names and shapes",
    )
