"""Modules after the transformer in a sentence-transformers folder: pooling, dense layers, normalisation.

Importing this module imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.models.json_file import read_json, wrong_fields
from compress.utils.errors import ModelError
from compress.utils.read_limits import parse_json

if TYPE_CHECKING:
    import torch

MODULES = "modules.json"
CONFIGS = ("sentence_bert_config.json", "config_sentence_transformers.json")
"""Files in the folder itself that sentence-transformers reads in addition to ``MODULES``."""
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
_OLD_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Config keys of pooling modes, in the order in which their outputs are concatenated."""
_PACKAGE = "sentence_transformers.models"
"""Module path that every version of sentence-transformers accepts."""
_IDENTITY = "torch.nn.modules.linear.Identity"
_ACTIVATIONS = {_IDENTITY: "", "torch.nn.modules.activation.Tanh": "tanh"}
_LENGTH = 256


@dataclass(frozen=True, eq=False)
class Dense:
    """Linear layer with ``weight`` [out, in], optional ``bias`` [out], and `tanh` or no activation.

    Weights are tensors while they are trained.
    """

    weight: np.ndarray | torch.Tensor
    bias: np.ndarray | torch.Tensor | None = None
    activation: str = ""


@dataclass(frozen=True, eq=False)
class Normalize:
    """Division of each embedding by its length."""


Step = Dense | Normalize


@dataclass(frozen=True, eq=False)
class SentenceModules:
    """Pooling by ``modes``, followed by ``steps``. ``configs`` are the unchanged files of ``CONFIGS``.

    A ``static`` model has one vector per token, and sentence-transformers pools them in the same module.
    """

    width: int
    modes: tuple[str, ...] = ("mean",)
    steps: tuple[Step, ...] = ()
    configs: Mapping[str, bytes] = field(default_factory=dict)
    static: bool = False

    @property
    def dimensions(self) -> int:
        """Return the size of an embedding."""
        sizes = [len(step.weight) for step in self.steps if isinstance(step, Dense)]
        return sizes[-1] if sizes else self.width * len(self.modes)

    def embed(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Pool token embeddings [B, L, H] under a mask [B, L] into text embeddings [B, dimensions]."""
        import torch

        from compress.numerics.pooling import pool

        embeddings = pool(hidden, mask, self.modes)
        for step in self.steps:
            if isinstance(step, Normalize):
                embeddings = torch.nn.functional.normalize(embeddings, dim=-1)
                continue
            weight = torch.as_tensor(step.weight).to(embeddings)
            bias = None if step.bias is None else torch.as_tensor(step.bias).to(embeddings)
            embeddings = torch.nn.functional.linear(embeddings, weight, bias)
            embeddings = torch.tanh(embeddings) if step.activation else embeddings
        return embeddings

    def followed_by(self, dense: Dense) -> SentenceModules:
        """Return a copy with another linear layer at the end, but before a final normalisation."""
        position = len(self.steps) - bool(self.steps and isinstance(self.steps[-1], Normalize))
        return replace(self, steps=(*self.steps[:position], dense, *self.steps[position:]))

    def weights(self) -> dict[str, np.ndarray]:
        """Return the arrays of every linear layer, named like `2_Dense.linear.weight`."""
        arrays: dict[str, np.ndarray] = {}
        for index, step in enumerate(self.steps, start=2):
            if isinstance(step, Dense):
                arrays |= {f"{index}_Dense.{name}": array for name, array in _tensors(step).items()}
        return arrays

    def files(self, longest: int) -> dict[str, bytes]:
        """Return the files that sentence-transformers reads, by path; the model reads at most ``longest`` tokens."""
        from safetensors.numpy import save

        # The maximum text length is the folder's own, limited to the model's positions.
        content = self.configs.get(CONFIGS[0])
        config = {"max_seq_length": _LENGTH, "do_lower_case": False} if content is None else json.loads(content)
        if config.get("max_seq_length") is None or config["max_seq_length"] > longest:
            config["max_seq_length"] = longest
        files = {**self.configs, CONFIGS[0]: _json(config)}
        first = ["StaticEmbedding"] if self.static else ["Transformer", "Pooling"]
        kinds = [*first, *(type(step).__name__ for step in self.steps)]
        paths = ["", *(f"{index}_{kind}" for index, kind in enumerate(kinds[1:], start=1))]
        # Module 0 is the model in the folder itself; the others have folders of their own.
        modules = enumerate(zip(kinds, paths, strict=True))
        files[MODULES] = _json(
            [{"idx": i, "name": str(i), "path": path, "type": f"{_PACKAGE}.{kind}"} for i, (kind, path) in modules]
        )
        if not self.static:
            # Older versions of sentence-transformers only read the boolean keys.
            pooling_modes = {old: mode in self.modes for old, mode in _OLD_MODES.items()}
            files[f"{paths[1]}/config.json"] = _json({"word_embedding_dimension": self.width, **pooling_modes})
        for step, path in zip(self.steps, paths[len(first) :], strict=True):
            if isinstance(step, Dense):
                names = {word: path for path, word in _ACTIVATIONS.items()}
                out_features, in_features = step.weight.shape
                layer = {"in_features": in_features, "out_features": out_features, "bias": step.bias is not None}
                files[f"{path}/config.json"] = _json({**layer, "activation_function": names[step.activation]})
                files[f"{path}/model.safetensors"] = save(_tensors(step))
            else:
                files[f"{path}/config.json"] = _json({})
        return files


def has_modules(folder: Path) -> bool:
    """Return True if a folder is in the format of sentence-transformers."""
    return (folder / MODULES).is_file()


def read_modules(folder: Path) -> SentenceModules:
    """Read the modules of a folder. Raises `ModelError` for modules that are not supported."""
    with wrong_fields(folder / MODULES):
        return _read_modules(folder)


def _read_modules(folder: Path) -> SentenceModules:
    try:
        content = parse_json((folder / MODULES).read_text(encoding="utf-8"))
        entries = sorted(content, key=lambda entry: int(entry["idx"]))
        if not all(isinstance(entry["path"], str) and isinstance(entry["type"], str) for entry in entries):
            raise TypeError("a path or type is no text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{MODULES} cannot be read: {error}",
            where=str(folder / MODULES),
            expected="a list of modules: idx, name, path, type",
        ) from error
    kinds = [str(entry["type"]).rpartition(".")[2] for entry in entries]
    # Everything after pooling is optional.
    static = kinds[:1] == ["StaticEmbedding"]
    if not static and kinds[:2] != ["Transformer", "Pooling"]:
        expected = "Transformer and Pooling, or StaticEmbedding, then any others"
        raise _unknown(folder / MODULES, f"modules {', '.join(kinds)}", expected)
    modes, width = (
        (("mean",), _static_width(folder)) if static else _pooling(_below(folder, entries[1]) / "config.json")
    )
    later = 1 if static else 2
    steps = [
        _read_step(kind, _below(folder, entry)) for kind, entry in zip(kinds[later:], entries[later:], strict=True)
    ]
    # Each dense layer must accept the size that the previous module returns.
    dimensions = width * len(modes)
    for step in steps:
        if isinstance(step, Dense):
            if step.weight.shape[1] != dimensions:
                fault = f"a dense layer for {step.weight.shape[1]} dimensions"
                raise _unknown(folder / MODULES, fault, f"{dimensions}, which come before it")
            dimensions = len(step.weight)
    configs = {name: (folder / name).read_bytes() for name in CONFIGS if (folder / name).is_file()}
    for name in configs:
        length = read_json(folder / name).get("max_seq_length")
        if length is not None and not isinstance(length, int):
            raise ModelError(
                f"The max_seq_length of {name} is {length!r:.40}.", where=str(folder / name), expected="a number"
            )
    return SentenceModules(width, modes, tuple(steps), configs, static)


def _below(folder: Path, entry: Mapping[str, Any]) -> Path:
    # modules.json comes from a download and must not lead out of the folder.
    path = PurePosixPath(entry["path"])
    if path.is_absolute() or ".." in path.parts:
        raise _unknown(folder / MODULES, f"a module at {entry['path']!r}", "a path below the model's folder")
    return folder / path


def _pooling(path: Path) -> tuple[tuple[str, ...], int]:
    """Return the modes of pooling and the size of a token's embedding."""
    config = read_json(path)
    configured = config.get("pooling_mode")
    # Older folders have one boolean key per mode.
    if configured is None:
        unknown = sorted(name for name in config if name.startswith("pooling_mode") and name not in _OLD_MODES)
        if any(config[name] for name in unknown):
            raise _unknown(path, f"pooling {', '.join(unknown)}", f"one of {', '.join(_OLD_MODES)}")
        modes = tuple(mode for name, mode in _OLD_MODES.items() if config.get(name)) or ("mean",)
    else:
        modes = tuple(configured) if isinstance(configured, list) else (configured,)
    wrong = [mode for mode in modes if mode not in MODES]
    if wrong:
        raise _unknown(path, f"pooling {', '.join(map(str, wrong))}", f"one of {', '.join(MODES)}")
    width = config.get("word_embedding_dimension", config.get("embedding_dimension"))
    if not isinstance(width, int) or width < 1:
        fault = f"The pooling's word_embedding_dimension is {width!r}."
        raise ModelError(fault, where=str(path), expected="the model's hidden size")
    return modes, width


def _read_step(kind: str, folder: Path) -> Step:
    if kind == "Normalize":
        return Normalize()
    if kind != "Dense":
        raise _unknown(folder, f"a module {kind}", "Dense and Normalize after Pooling")
    config = read_json(folder / "config.json")
    # sentence-transformers uses tanh by default.
    activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    if activation not in _ACTIVATIONS:
        raise _unknown(folder / "config.json", f"the activation {activation}", f"one of {', '.join(_ACTIVATIONS)}")
    if config.get("use_residual") or config.get("module_input_name", "sentence_embedding") != "sentence_embedding":
        raise _unknown(folder / "config.json", "a dense layer with a residual or another input", "a plain one")
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / "model.safetensors"
    try:
        arrays = {name: array.astype(np.float32) for name, array in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"The weights of a dense layer cannot be read: {error}",
            where=str(path),
            expected="model.safetensors; a pytorch_model.bin is a pickle and isn't opened",
            hint="save the model anew with sentence-transformers, safe_serialization=True",
        ) from error
    if "linear.weight" not in arrays:
        raise ModelError(f"A dense layer has no linear.weight, only {', '.join(arrays)}.", where=str(path))
    bias = arrays.get("linear.bias") if config.get("bias", True) else None
    if arrays["linear.weight"].ndim != 2 or (bias is not None and bias.shape != arrays["linear.weight"].shape[:1]):
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise ModelError(f"The tensors of a dense layer do not fit together: {shapes}.", where=str(path))
    return Dense(arrays["linear.weight"], bias, _ACTIVATIONS[activation])


def _unknown(where: Path, found: str, expected: str) -> ModelError:
    return ModelError(f"The model has {found}, which can't be computed here.", where=str(where), expected=expected)


def _static_width(folder: Path) -> int:
    """Return the dimensions of a static model, which model2vec's own configs name `hidden_dim`."""
    config = read_json(folder / "config.json")
    width: int = config["hidden_size" if "hidden_size" in config else "hidden_dim"]
    return width


def _tensors(step: Dense) -> dict[str, np.ndarray]:
    arrays = {"linear.weight": step.weight, "linear.bias": step.bias}
    return {name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None}


def _json(value: dict[str, Any] | Sequence[object]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
