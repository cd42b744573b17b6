"""Weights and processor of a model with a head for its task, which is drawn where there is none. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compress.utils.errors import ModelError

if TYPE_CHECKING:
    from compress.models.torch_model import TorchModel


_OTHER_SHAPES = "its weights have other shapes than its config.json asks for"
"""In place of transformers' pointer to a report that it logs."""


class Origin(NamedTuple):
    """Where a model for ``task`` lies, what reads its processor, and what is expected there, in words.

    ``answers`` is what a plain module's are made, as `plain_module` has it; None for a task that takes none.
    """

    task: str
    directory: Path
    processor: Callable[[Path], Any]
    expected: str
    answers: Callable[[Any, Any, Any], Any] | None = None


def tokenizer_by(trust_remote_code: bool) -> Callable[[Path], Any]:
    """What reads the tokenizer of a folder, for an `Origin`."""
    from transformers import AutoTokenizer

    return partial(AutoTokenizer.from_pretrained, trust_remote_code=trust_remote_code)


def load_with_head(
    origin: Origin, heads: Sequence[str], labels: Sequence[str] | None, trust_remote_code: bool, **config_values: Any
) -> TorchModel:
    """The model in fp32, by `AutoModelFor` the first of ``heads``; a missing head is drawn from torch's generator.

    A model has its head where the name of its class holds one of ``heads``. ``labels`` name a new head's classes, and
    ``config_values`` are for a new head alone. Raises `ModelError` for files that do not load and `DataError` for
    labels that a trained head lacks.
    """
    from compress.tasks.classes import set_labels

    def with_head(config: Any) -> Mapping[str, Any]:
        has_head = any(head in name for name in config.architectures or () for head in heads)
        for name, value in config_values.items() if not has_head else ():
            setattr(config, name, value)
        if labels is not None:
            set_labels(config, labels, has_head)
        return {"ignore_mismatched_sizes": not has_head}

    return load_by(f"AutoModelFor{heads[0]}", origin, trust_remote_code, with_head, labels)


def load_by(
    auto: str, origin: Origin, trust_remote_code: bool, prepare: Callable[[Any], Mapping[str, Any]] | None = None,
    labels: Sequence[str] | None = None, **options: Any,
) -> TorchModel:  # fmt: skip
    """The model in fp32 as the class ``auto`` of transformers opens it with ``options``, cut or whole.

    ``prepare`` changes its config before, and may add options; ``labels`` name the classes of a plain module.

    Raises `ModelError` for files that do not load.
    """
    import transformers

    from compress.models.config_checks import loading_failures, to_blame
    from compress.models.folder_checks import refuse_quantized
    from compress.models.pruned_model import is_cut, load_cut
    from compress.models.torch_model import TorchModel

    directory, cls = origin.directory, getattr(transformers, auto)
    refuse_quantized(directory)
    try:
        plain = None if origin.answers is None else load_plain_for(directory, labels, origin.answers)
        if plain is not None:
            return TorchModel(plain.float().eval(), origin.processor(directory))
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        processor = origin.processor(directory)
        if prepare is not None:
            options |= prepare(config)
        if is_cut(config):
            module = load_cut(cls, directory, config)
        else:
            options |= {"use_safetensors": True, "output_loading_info": True}
            module, told = cls.from_pretrained(directory, config=config, trust_remote_code=trust_remote_code, **options)
            _check_shapes(told["mismatched_keys"], config.num_labels)
    except loading_failures() as error:
        said = _OTHER_SHAPES if "ignore_mismatched_sizes" in str(error) else str(error)
        raise to_blame(directory, trust_remote_code) or ModelError(
            f"The model cannot be loaded for {origin.task}: {said}",
            where=str(directory),
            expected=origin.expected,
        ) from error
    return TorchModel(module.float().eval(), processor)


def _check_shapes(other: Iterable[tuple[str, Sequence[int], Sequence[int]]], classes: int) -> None:
    """Raise `RuntimeError` where weights have other shapes than the model, but for layers as wide as its classes.

    A detector whose queries are chosen by their scores has such layers without its head, which are drawn anew.
    """
    for name, found, wanted in other:
        parts = [pair for pair in zip(found, wanted, strict=len(found) == len(wanted)) if pair[0] != pair[1]]
        if len(found) != len(wanted) or any(part[1] not in (classes, classes + 1) for part in parts):
            raise RuntimeError(f"{_OTHER_SHAPES}: {name} is {list(found)}, and {list(wanted)} by the config")


def load_plain_for(directory: Path, labels: Sequence[str] | None, answers: Callable[[Any, Any, Any], Any]) -> Any:
    """The plain module of a folder whose config says what makes it; None for a model of transformers.

    Of a network of timm without a head one is drawn for ``labels``. Raises `ModelError` where the module may not be
    made, and `DataError` for labels that a trained head lacks.
    """
    from compress.models.json_file import read_json
    from compress.models.remote_code import MODULE_KEY, TIMM_NETWORK

    content = read_json(directory / "config.json")
    if MODULE_KEY not in content:
        return None
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from compress.models.custom_module import load_plain
    from compress.models.timm_models import change_head
    from compress.tasks.classes import set_labels

    known = content.get("model_type") in CONFIG_MAPPING_NAMES
    config = (AutoConfig if known else PreTrainedConfig).from_pretrained(directory)
    if labels is not None:
        set_labels(config, labels, has_head="id2label" in content)
    module = load_plain(directory, config, answers)
    made = content[MODULE_KEY]
    if made["module"] == TIMM_NETWORK and not made["arguments"]["num_classes"] and labels is not None:
        change_head(module, len(labels))
    return module
