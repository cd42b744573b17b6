"""Checks of config.json without importing transformers, and explanations of failures while loading."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compress.models.json_file import read_json, read_optional_json
from compress.models.pipeline_folder import is_pipeline
from compress.utils.errors import MissingExtraError, ModelError
from compress.utils.read_limits import LIMITS, ReadLimitError

_MAPPINGS = ("auto_mappings", "configuration_auto")
"""transformers' modules that list every `model_type`; the first one is plain data."""


_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def check_config(folder: Path, trust_remote_code: bool) -> None:
    """Check that transformers, timm or allowed code can build the model of a folder's config.json.

    Raises `ModelError`, and `MissingExtraError` without timm.
    """
    where, config = str(folder / "config.json"), read_json(folder / "config.json")
    model_type = config.get("model_type")
    _refuse_downloaded_kernels(config, where)
    _refuse_many_layers(config, where)
    if is_timm(config) and importlib.util.find_spec("timm") is None:
        raise MissingExtraError("timm", "timm", "A model of timm")
    # These are not built by transformers.
    if MODULE_KEY in config or is_timm(config) or is_pipeline(folder):
        return
    if config.get("auto_map") and not trust_remote_code and (not isinstance(model_type, str) or not _known(model_type)):
        raise ModelError(
            "The model needs Python files of its own repository, which are not executed.",
            where=where,
            expected="an architecture that transformers has itself",
            hint="read its files; if you trust them, write `trust_remote_code: true` into the recipe",
        )
    # Remote code is allowed, so anything may be valid.
    if config.get("auto_map"):
        return
    if not isinstance(model_type, str):
        raise ModelError(
            "The model's config has no model_type.",
            where=where,
            expected="the name of an architecture, such as bert",
            hint="use the config.json that belongs to the weights",
        )
    if not _known(model_type):
        written = config.get("transformers_version")
        written_by = f", and its config was written by {written}" if isinstance(written, str) else ""
        raise ModelError(
            f"transformers {version('transformers')} has no architecture {model_type!r}{written_by}.",
            where=where,
            expected="a model_type that the installed version knows",
            hint="check the name, or install a transformers that has it (pip install -U transformers)",
        )


def _refuse_many_layers(config: Mapping[str, Any], where: str) -> None:
    """Raise `ModelError` for a number of layers that would keep the construction of the model from ending."""
    for name, value in _fields(config):
        if "layer" in name and isinstance(value, int) and value > LIMITS.layers:
            raise ReadLimitError(
                f"The config's {name} is {value:,}.", where=where, expected=f"at most {LIMITS.layers:,}"
            )


def _refuse_downloaded_kernels(config: Mapping[str, Any], where: str) -> None:
    """Raise `ModelError` if a config names a repository as its attention, whose code `kernels` would fetch and run."""
    for name, value in _fields(config):
        if name.strip("_").startswith(_IMPLEMENTATIONS) and "/" in str(value):
            raise ModelError(
                f"The config's {name} names the repository {str(value)[:80]!r}, whose code would be fetched and run.",
                where=where,
                expected="an implementation of transformers itself, such as sdpa",
                hint=f"remove {name} from config.json",
            )


def _fields(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield names and values of a config and of the configs in it, such as `text_config`."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _fields(value)
        else:
            yield name, value


def is_timm(config: Mapping[str, Any]) -> bool:
    """Return True if timm wrote the config, or transformers for a timm model."""
    architecture, pretrained_cfg = config.get("architecture"), config.get("pretrained_cfg")
    return isinstance(architecture, str) and isinstance(pretrained_cfg, Mapping) and MODULE_KEY not in config


def max_positions(config: Mapping[str, Any]) -> int | None:
    """Return the maximum length of a text; None if the config gives none or -1, as models without a limit do."""
    nested = config.get("text_config")
    # Vision-language models nest the language model's config.
    merged = {**(nested if isinstance(nested, dict) else {}), **config}
    positions = merged.get("max_position_embeddings")
    return positions if isinstance(positions, int) and positions > 0 else None


def explain_load_failure(folder: Path, trust_remote_code: bool) -> ModelError | None:
    """Return the error for a faulty config or disallowed code in a folder that failed to load, or None.

    The original exception rarely names the cause.
    """
    import transformers

    where, config = folder / "config.json", read_optional_json(folder / "config.json")
    model_type = config.get("model_type")
    if isinstance(model_type, str) and MODULE_KEY not in config and _known(model_type):
        try:
            transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except load_error_types() as error:
            message = " ".join(str(error).split()) or type(error).__name__
            # Divisions by zero in transformers come from sizes of 0 in the config.
            zeros = [name for name, value in config.items() if type(value) is int and not value and name[-3:] != "_id"]
            if isinstance(error, ArithmeticError) and zeros:
                message += f", with 0 for {' and '.join(zeros)}"
            return ModelError(
                f"The model's config cannot be used: {message.rstrip('.')}.",
                where=str(where),
                expected="fields that fit together",
                hint="use the config.json that belongs to the weights",
            )
    # A tokenizer may need remote code although the model does not.
    auto_map = read_optional_json(folder / "tokenizer_config.json").get("auto_map")
    code = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map  # older files list it bare
    if code and not trust_remote_code and not (folder / "tokenizer.json").is_file():
        files = list(filter(None, [code] if isinstance(code, str) else code))
        return ModelError(
            f"The tokenizer needs Python files of its own repository ({', '.join(files)}), which are not executed.",
            where=str(folder / "tokenizer_config.json"),
            expected="a tokenizer.json, or a tokenizer that transformers has itself",
            hint="read its files; if you trust them, write `trust_remote_code: true` into the recipe",
        )
    return None


def load_error_types() -> tuple[type[Exception], ...]:
    """Return the exception types that transformers and its dependencies raise for inconsistent files and fields."""
    from huggingface_hub.errors import StrictDataclassError

    # transformers validates little, so that wrong fields fail anywhere in its code.
    builtin = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError)
    return (*builtin, TypeError, ValueError, StrictDataclassError)


@functools.cache
def _known(kind: str) -> bool:
    """Return True if transformers lists the model type, or if its list cannot be read.

    The source text of its modules is read without importing them, which would take seconds.
    """
    if kind == STATIC_MODEL_TYPE:
        return True
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin, "this package requires it"
    folder = Path(spec.origin).parent / "models" / "auto"
    files = [file for name in _MAPPINGS if (file := folder / f"{name}.py").is_file()]
    return not files or any(f'"{kind}"' in file.read_text(encoding="utf-8") for file in files)


STATIC_MODEL_TYPE = "model2vec"
"""Type of the models in `static_model`, which transformers does not have itself."""
MODULE_KEY = "compress_module"
"""Key in config.json with the function that builds the model; see `custom_module`."""
TIMM_NETWORK = "compress.models.timm_models:build"
"""Function that builds networks of timm; as a part of this package it is always allowed."""


@dataclass
class AllowedCode:
    """Code that may run: its folder, and the arguments that it may be called with (None: any)."""

    folder: Path
    arguments: list[dict[str, Any]] | None = None


_allowed: dict[str, AllowedCode] = {TIMM_NETWORK: AllowedCode(Path())}


def allow_module(reference: str, folder: Path, arguments: Mapping[str, Any]) -> None:
    """Allow the call of ``reference``, `package.module:function` or `file.py:function` in ``folder``.

    Only a recipe that the user named may give the reference and the arguments, never a model's config or a recipe
    that lies beside a model.
    """
    entry = _allowed.setdefault(reference, AllowedCode(folder, []))
    entry.folder = folder
    if entry.arguments is not None and dict(arguments) not in entry.arguments:
        entry.arguments.append(dict(arguments))


def allow_repository_code(folder: Path) -> None:
    """Allow the Python files of a model's folder, to which the recipe's ``trust_remote_code`` consents."""
    _allowed[str(folder.resolve())] = AllowedCode(folder)


def allows_repository_code(folder: Path) -> bool:
    """Return True if a recipe consents to the Python files of the model's folder."""
    return str(folder.resolve()) in _allowed


def allowed_module(reference: str) -> AllowedCode | None:
    """Return the consent to call ``reference``, or None if no recipe of this process names it."""
    return _allowed.get(reference)


def allowed_code() -> dict[str, dict[str, Any]]:
    """Return all consents of this process as JSON values, for its workers."""
    return {
        name: {"folder": str(code.folder.absolute()), "arguments": code.arguments} for name, code in _allowed.items()
    }


def allow_as(code: Mapping[str, Mapping[str, Any]]) -> None:
    """Allow what the process that started this one allows, as its `allowed_code` returned it."""
    _allowed.update({name: AllowedCode(Path(entry["folder"]), entry["arguments"]) for name, entry in code.items()})
