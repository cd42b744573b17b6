"""torch modules outside transformers: built by a function that the recipe names, stored in Hugging Face layout.

A folder holds the module's state dict as `model.safetensors`; its `config.json` names the function under
`compress_module`. Loading runs that function, so only functions named by this process's recipe are imported.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import ImageClassifierOutput, ModelOutput

from compress.models.config_checks import MODULE_KEY, allowed_module
from compress.models.folder_checks import WEIGHTS
from compress.models.pruned_layer_sizes import resize_to_recorded
from compress.utils.errors import ModelError, first_line

Answers = Callable[[Any, Any, PreTrainedConfig], ModelOutput]
"""Converts a network's output, targets (or None) and the config to outputs with transformers' names and a loss."""


def logits(output: object, targets: object, config: PreTrainedConfig) -> ImageClassifierOutput:
    """Wrap logits [batch, classes] as a classifier's output."""
    return ImageClassifierOutput(logits=output)


class CustomModule(nn.Module):
    """Vision module that takes ``pixel_values`` [batch, channels, height, width] and returns its task's outputs.

    It provides the parts of transformers' interface that this package uses: a config and saving.
    """

    def __init__(self, network: nn.Module, config: PreTrainedConfig, answers: Answers = logits) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self._answers = answers

    def forward(self, pixel_values: torch.Tensor, labels: object = None) -> ModelOutput:
        """Return the network's output under transformers' names."""
        return self._answers(self.network(pixel_values), labels, self.config)

    def save_pretrained(self, directory: Path, max_shard_size: str = "") -> None:
        """Write `config.json` and the network's state dict as one `model.safetensors`."""
        self.config.save_pretrained(directory)
        save_model(self.network, str(Path(directory) / WEIGHTS), metadata={"format": "pt"})


def load_custom_module(directory: Path, config: PreTrainedConfig, answers: Answers = logits) -> CustomModule:
    """Load the module of ``directory``. Raises `ModelError` if its code is not allowed or its weights do not fit."""
    builder = getattr(config, MODULE_KEY)
    network = make_network(builder["module"], builder["arguments"], str(directory))
    # Pruned layers must have their final sizes before weights are loaded.
    resize_to_recorded(network, config, str(directory / "config.json"))
    try:
        load_model(network, str(directory / WEIGHTS), strict=True)
    except (RuntimeError, OSError) as error:
        raise misfit(builder["module"], directory / WEIGHTS, error) from error
    return CustomModule(network, config, answers)


def make_network(reference: str, arguments: Mapping[str, object], where: str) -> nn.Module:
    """Call the function ``reference``. Raises `ModelError` if no recipe names it or it returns no module."""
    consent = allowed_module(reference)
    # A config may come from anywhere, so its code and the arguments need the consent of the user's recipe.
    if consent is None or (consent.arguments is not None and dict(arguments) not in consent.arguments):
        subject = "the code" if consent is None else "other arguments of the code"
        raise ModelError(
            f"The model's config asks for {subject} {reference!r}, which no recipe that you named gives.",
            where=where,
            expected="a recipe that names all code which it runs, with its arguments",
            hint=f"if you trust that code, name a recipe of your own (--recipe) with `module: {reference}` and its "
            "`module_arguments`",
        )
    function = _function(reference, consent.folder)
    _check_builds_module(function, reference)
    try:
        network = function(**arguments)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        shown = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        fault = f"{reference}({shown}) fails: {error}"
        raise ModelError(fault, where="module", hint="correct `module_arguments`") from error
    if not isinstance(network, nn.Module):
        raise ModelError(f"{reference} gives {type(network).__name__}.", where="module", expected="a torch.nn.Module")
    return network


def code_digest(reference: str) -> str:
    """Return an identifier of the code's version: the file's SHA-256, or the package's version."""
    source = reference.partition(":")[0]
    if source.endswith(".py"):
        consent = allowed_module(reference)
        assert consent is not None, "the recipe that names the file allows it"
        return f"sha256:{hashlib.sha256(_file(source, consent.folder).read_bytes()).hexdigest()}"
    package = source.partition(".")[0]
    # A module may belong to a distribution of another name.
    names = packages_distributions().get(package, [])
    return " ".join(f"{name}=={version(name)}" for name in sorted(set(names))) or package


def load_state(network: nn.Module, weights: Path, reference: str) -> None:
    """Load the state dict of a `.pth`, `.pt` or `.bin` file, which may hold tensors only, into ``network``.

    torch reads it with ``weights_only``, so that no code in it runs. Raises `ModelError`.
    """
    import pickle

    try:
        content = torch.load(weights, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
        raise ModelError(
            f"{weights.name} cannot be read as weights: {first_line(error)}",
            where=str(weights),
            expected="a state dict, tensors by name, as torch.save(module.state_dict()) writes it",
        ) from error
    # Training scripts often nest the state dict in a checkpoint.
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(f"{weights.name} holds no state dict.", where=str(weights), expected="tensors by name")
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise misfit(reference, weights, error) from error


def _function(reference: str, folder: Path) -> Callable[..., object]:
    source, _, name = reference.partition(":")
    try:
        if source.endswith(".py"):
            path = _file(source, folder)
            spec = importlib.util.spec_from_file_location(f"compress_module_{path.stem}", path)
            assert spec is not None and spec.loader is not None, "its name ends in .py"
            function: Any = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(function)
        else:
            function = importlib.import_module(source)
        for part in name.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ModelError(
            f"{reference} cannot be imported: {error}.",
            where="module",
            expected="`package.module:function` of an installed package, or `file.py:function` beside the recipe",
            hint=f"pip install the package that has {source}" if isinstance(error, ModuleNotFoundError) else None,
        ) from error
    return function  # type: ignore[no-any-return]


def _check_builds_module(function: Callable[..., object], reference: str) -> None:
    """Raise `ModelError` before a callable runs that is not known to build a module.

    Allowed are classes of modules with their class methods, functions of a package whose return annotation is a
    module, and whatever a file beside the recipe defines.
    """
    if reference.partition(":")[0].endswith(".py"):
        return
    built: object = getattr(function, "__self__", function)
    if inspect.isfunction(function):
        try:
            built = get_type_hints(function).get("return")
        except (NameError, TypeError):  # an annotation that cannot be evaluated
            built = None
    if not (isinstance(built, type) and issubclass(built, nn.Module)):
        raise ModelError(
            f"{reference} is not known to build a torch module, so that it is not called.",
            where="module",
            expected="a class of torch.nn.Module, its class method, or a function annotated to return one",
            hint="write a function that returns the module into a file beside the recipe, and name `file.py:function`",
        )


def _file(name: str, folder: Path) -> Path:
    path = folder / name
    # The file must be in the recipe's folder itself, also after links are resolved.
    if not path.is_file() or path.resolve().parent != folder.resolve():
        fault = f"There is no file {name!r} beside the recipe."
        raise ModelError(fault, where="module", expected=f"a file in {folder.resolve()}")
    return path


def misfit(reference: str, weights: Path, error: Exception) -> ModelError:
    """Return the error for weights with other names or shapes than the module has."""
    # torch lists every missing tensor; two lines are enough.
    lines = str(error).strip().splitlines()
    return ModelError(
        f"The weights are not those of the module that {reference} makes: {' '.join(lines[:2])[:300]}",
        where=str(weights),
        expected="the same names and shapes",
    )
