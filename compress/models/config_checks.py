"""What a config.json says that no model can be made by, told without transformers; and what else fails in loading."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from compress.models.diffusion_checks import is_pipeline
from compress.models.json_file import read_json
from compress.models.remote_code import MODULE_KEY
from compress.utils.errors import MissingExtraError, ModelError

_MAPPINGS = ("auto_mappings", "configuration_auto")
"""transformers' modules that name every `model_type`; the first is plain data."""


def check_config(folder: Path, trust_remote_code: bool) -> None:
    """Prove that transformers, timm, or code that may run, makes a model of a folder's config.json.

    Raises `ModelError`, and `MissingExtraError` without timm.
    """
    where, config = str(folder / "config.json"), read_json(folder / "config.json")
    kind = config.get("model_type")
    if is_timm(config) and importlib.util.find_spec("timm") is None:
        raise MissingExtraError("timm", "timm", "A model of timm")
    if MODULE_KEY in config or is_timm(config) or is_pipeline(folder):
        return
    if config.get("auto_map") and not trust_remote_code and (not isinstance(kind, str) or not _known(kind)):
        raise ModelError(
            "The model is made by Python files of its own repository, which are not run.",
            where=where,
            expected="an architecture that transformers has itself",
            hint="read its files; if you trust them, write `trust_remote_code: true` into the recipe",
        )
    if config.get("auto_map"):
        return
    if not isinstance(kind, str):
        raise ModelError(
            "The model's config has no model_type.",
            where=where,
            expected="the name of an architecture, such as bert",
            hint="take config.json from where the weights are from",
        )
    if not _known(kind):
        raise ModelError(
            f"transformers {_installed()} has no architecture {kind!r}{_written_by(config)}.",
            where=where,
            expected="a model_type that the installed version knows",
            hint="check the name, or install a transformers that has it (pip install -U transformers)",
        )


def is_timm(config: Mapping[str, Any]) -> bool:
    """Whether a config is one that timm wrote, or transformers for timm."""
    named, how = config.get("architecture"), config.get("pretrained_cfg")
    return isinstance(named, str) and isinstance(how, Mapping) and MODULE_KEY not in config


def positions_of(config: Mapping[str, Any]) -> int | None:
    """The longest text that a config allows; None where it says nothing, or -1, as models without a limit do."""
    nested = config.get("text_config")
    found = {**(nested if isinstance(nested, dict) else {}), **config}
    positions = found.get("max_position_embeddings")
    return positions if isinstance(positions, int) and positions > 0 else None


def to_blame(folder: Path, trust_remote_code: bool) -> ModelError | None:
    """What a folder that failed to load has wrong in its config, or needs code for: the failure alone rarely tells."""
    import transformers

    where, config = folder / "config.json", _fields(folder / "config.json")
    kind = config.get("model_type")
    if isinstance(kind, str) and MODULE_KEY not in config and _known(kind):
        try:
            transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except loading_failures() as error:
            said = " ".join(str(error).split()) or type(error).__name__
            zeros = [name for name, value in config.items() if type(value) is int and not value and name[-3:] != "_id"]
            if isinstance(error, ArithmeticError) and zeros:
                said += f", with 0 for {' and '.join(zeros)}"
            return ModelError(
                f"The model's config cannot be used: {said.rstrip('.')}.",
                where=str(where),
                expected="fields that fit together",
                hint="take config.json from where the weights are from",
            )
    made_by = _fields(folder / "tokenizer_config.json").get("auto_map")
    code = made_by.get("AutoTokenizer") if isinstance(made_by, dict) else made_by  # older files list it bare
    if code and not trust_remote_code and not (folder / "tokenizer.json").is_file():
        named = [one for one in ([code] if isinstance(code, str) else code) if one]
        return ModelError(
            f"The tokenizer is made by Python files of its own repository ({', '.join(named)}), which are not run.",
            where=str(folder / "tokenizer_config.json"),
            expected="a tokenizer.json, or a tokenizer that transformers has itself",
            hint="read its files; if you trust them, write `trust_remote_code: true` into the recipe",
        )
    return None


def _fields(path: Path) -> dict[str, Any]:
    return dict(read_json(path)) if path.is_file() else {}


def loading_failures() -> tuple[type[Exception], ...]:
    """What transformers, and what it calls, raise of files and fields that don't belong together."""
    from huggingface_hub.errors import StrictDataclassError

    own = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError)
    return (*own, TypeError, ValueError, StrictDataclassError)


def _known(kind: str) -> bool:
    """Whether transformers names the type; so it is taken to be where its files can't be read."""
    texts = [text for name in _MAPPINGS if (text := _source(name)) is not None]
    return not texts or any(f'"{kind}"' in text for text in texts)


@functools.cache
def _source(name: str) -> str | None:
    """The text of a module of transformers, which isn't imported: that takes seconds."""
    found = importlib.util.find_spec("transformers")
    folder = Path(found.origin).parent / "models" / "auto" if found is not None and found.origin else None
    file = None if folder is None else folder / f"{name}.py"
    return file.read_text(encoding="utf-8") if file is not None and file.is_file() else None


def _written_by(config: Mapping[str, Any]) -> str:
    written = config.get("transformers_version")
    return f", and its config was written by {written}" if isinstance(written, str) else ""


def _installed() -> str:
    try:
        return version("transformers")
    except PackageNotFoundError:
        return ""
