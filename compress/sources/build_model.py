"""Building of starting models: from a custom torch module, or with random weights from a config."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.models.config_checks import MODULE_KEY, allow_module, load_error_types
from compress.models.folder_checks import INDEX, PROCESSOR_FILES, WEIGHTS
from compress.models.json_file import read_json, read_optional_json
from compress.utils.errors import ModelError, StorageError, first_line
from compress.utils.progress import Progress
from compress.utils.storage import cache_key, digest_file

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

PICKLED_STATE = (".pth", ".pt", ".bin")
_CHAT = "chat_template.jinja"
_MORE_SPACE = "free some space or name another folder with --artifacts"
_REVISION = 1
"""Increase it when the same files should be converted into another folder."""


@dataclass(frozen=True)
class ModelOrigin:
    """Description of a starting model or student that has to be built.

    ``module`` builds the network from ``arguments``; random weights use ``seed``. Code files are looked up in
    ``recipe_folder``.
    """

    module: str | None
    random_weights: bool
    seed: int
    recipe_folder: Path
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def make(self, source: Path, cache: Path, progress: Progress) -> Path:
        """Return the complete model folder below ``cache``, built from ``source`` on the first call.

        ``source`` holds a processor's files, a config.json (optional for a custom module) and, unless weights are
        random, safetensors or one state dict as `.pth`. It may also be that file. Raises `ModelError`.
        """
        from compress.models.custom_module import code_digest

        weights, folder = (source, source.parent) if source.is_file() else (None, source)
        if not self.random_weights and weights is None:
            weights = _weights(folder)
        if self.module is not None:
            allow_module(self.module, self.recipe_folder, self.arguments)
        # The folder's name contains the key of everything that affects its content.
        companions, config = _beside(folder), folder / "config.json"
        identity = {
            "revision": _REVISION,
            "files": {path.name: digest_file(path) for path in (*companions, config) if path.is_file()},
            "weights": None if weights is None else digest_file(weights),
            "module": self.module,
            "arguments": dict(self.arguments),
            "code": None if self.module is None else code_digest(self.module),
            "seed": self.seed if self.random_weights else None,
        }
        target = cache / f"made-{cache_key(identity)[:32]}"

        def write(output: Path) -> None:
            progress.note(f"creating the model in {target}")
            output.mkdir()
            for path in companions:
                shutil.copyfile(path, output / path.name)
            self._write(folder, weights, output)

        return write_once(target, write)

    def _write(self, folder: Path, weights: Path | None, output: Path) -> None:
        import torch

        # The seed must not affect later random numbers of the process.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            if self.module is None:
                _random_model(folder).save_pretrained(output)
            else:
                module = self.module
                from safetensors.torch import load_model, save_model

                from compress.models.custom_module import code_digest, load_state, make_network, misfit

                network: nn.Module = make_network(module, self.arguments, str(folder))
                # Safetensors and state dicts are loaded by different functions.
                if weights is not None and weights.suffix == ".safetensors":
                    try:
                        load_model(network, str(weights), strict=True)
                    except RuntimeError as error:
                        raise misfit(module, weights, error) from error
                elif weights is not None:
                    load_state(network, weights, module)
                save_model(network, str(output / WEIGHTS), metadata={"format": "pt"})
                config = read_optional_json(folder / "config.json")
                config[MODULE_KEY] = {"module": module, "arguments": dict(self.arguments), "code": code_digest(module)}
                (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_once(target: Path, write: Callable[[Path], None], hint: str = _MORE_SPACE) -> Path:
    """Write the model folder ``target``, unless it exists, to a temporary name and rename it.

    If two processes race, the first one wins. Raises `StorageError`.
    """
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".made-") as scratch:
            model_folder = Path(scratch) / "model"
            write(model_folder)
            try:
                model_folder.rename(target)
            # Another process may have finished first; its folder has the same content.
            except OSError:
                if not target.is_dir():
                    raise
    except OSError as error:
        fault = f"The model cannot be written: {error.strerror or error}."
        raise StorageError(fault, where=str(target.parent), hint=hint) from error
    return target


def random_shapes(folder: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Return the names and shapes of the tensors that a model with random weights has. Allocates no weights.

    Raises `ModelError` for a config that no model can be built from.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = _random_model(folder)
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


def _random_model(folder: Path) -> PreTrainedModel:
    """Build the architecture of `config.json` with random weights, without a head (added when labels are known).

    An image-text-to-text model is built with its head, which is its embedding table.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

    read_json(folder / "config.json")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        # A vision-language model's head is its embedding table, so it is built whole.
        reads_both = type(config) in AutoModelForImageTextToText._model_mapping
        return (AutoModelForImageTextToText if reads_both else AutoModel).from_config(config)
    except load_error_types() as error:
        raise ModelError(
            f"No model can be built from this config: {first_line(error)}",
            where=str(folder / "config.json"),
            expected="the config of an architecture that transformers knows, with its model_type",
        ) from error


def _beside(folder: Path) -> list[Path]:
    """Return the processor's files, including the chat template. Raises `ModelError` if there are none."""
    files = [folder / name for name in PROCESSOR_FILES if (folder / name).is_file()]
    if not files:
        raise ModelError(
            "The folder has no preprocessing config for the model's inputs.",
            where=str(folder),
            expected="a preprocessor_config.json of an image processor, or a tokenizer's files",
            hint='write one, e.g. {"image_processor_type": "ViTImageProcessor", "size": {"height": 224, "width": 224}, '
            '"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}',
        )
    return [*files, *(path for path in [folder / _CHAT] if path.is_file())]


def _weights(folder: Path) -> Path:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLED_STATE)
    # Several state dicts are ambiguous, and sharded checkpoints are not supported here.
    if len(pickles) != 1 or (folder / INDEX).is_file():
        raise ModelError(
            f"The folder holds {len(pickles)} files of weights for the module.",
            where=str(folder),
            expected=f"{WEIGHTS}, or one state dict ending in {', '.join(PICKLED_STATE)}",
            hint="name the file itself as `model`, or set random_weights: true to start without any",
        )
    return pickles[0]
