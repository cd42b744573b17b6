"""Loading of weights and processor for a task; a missing head is initialized randomly. Imports no torch.

transformers is imported inside the functions: tasks are listed without loading it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compress.tasks.classes import set_labels
from compress.utils.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from compress.models.model import TorchModel


_OTHER_SHAPES = "its weights have other shapes than its config.json asks for"
"""Replaces transformers' reference to a report in its log."""


class Origin(NamedTuple):
    """Folder of a model for ``task``, with a loader for its processor and a description of valid folders.

    ``answers`` adapts the outputs of a plain torch module (see `compress.models.custom_module`), or is None if the task
    supports none.
    """

    task: str
    directory: Path
    processor: Callable[[Path], Any]
    expected: str
    answers: Callable[[Any, Any, Any], Any] | None = None


def tokenizer_by(trust_remote_code: bool) -> Callable[[Path], Any]:
    """Return a function that loads the tokenizer of a folder, for an `Origin`."""
    from transformers import AutoTokenizer

    return partial(AutoTokenizer.from_pretrained, trust_remote_code=trust_remote_code)


def load_with_head(
    origin: Origin, heads: Sequence[str], labels: Sequence[str] | None, trust_remote_code: bool, **config_values: Any
) -> TorchModel:
    """Return a model in fp32, loaded by `AutoModelFor` plus the first of ``heads``.

    A missing head is initialized randomly.

    Args:
        origin: Folder and task of the model.
        heads: Substrings of class names that have the head; the first one names the auto class.
        labels: Class names for a new head.
        trust_remote_code: Allow code of the repository.
        **config_values: Config values for a new head.

    Raises:
        ModelError: If files do not load.
        DataError: If a trained head lacks a label.
    """

    def with_head(config: PretrainedConfig) -> Mapping[str, Any]:
        has_head = any(head in name for name in config.architectures or () for head in heads)
        for name, value in config_values.items() if not has_head else ():
            setattr(config, name, value)
        if labels is not None:
            set_labels(config, labels, has_head)
        return {"ignore_mismatched_sizes": not has_head}

    return load_by(f"AutoModelFor{heads[0]}", origin, trust_remote_code, with_head, labels)


def load_by(
    auto: str,
    origin: Origin,
    trust_remote_code: bool,
    prepare: Callable[[Any], Mapping[str, Any]] | None = None,
    labels: Sequence[str] | None = None,
    float_only: bool = True,
    **options: object,
) -> TorchModel:
    """Return a model in fp32, pruned or not, loaded by an auto class of transformers.

    Args:
        auto: Name of the auto class.
        origin: Folder and task of the model.
        trust_remote_code: Allow code of the repository.
        prepare: Changes the config before loading and returns further options.
        labels: Class names of a plain torch module.
        float_only: Refuse a quantized checkpoint.
        **options: Options of `from_pretrained`.

    Raises:
        ModelError: If files do not load.
    """
    import transformers

    from compress.models.config_checks import explain_load_failure, load_error_types
    from compress.models.folder_checks import refuse_quantized
    from compress.models.model import TorchModel
    from compress.models.static_model import register_static_models
    from compress.models.transformer_pruning import is_pruned, load_pruned

    register_static_models()
    directory, cls = origin.directory, getattr(transformers, auto)
    if float_only:
        refuse_quantized(directory)
    try:
        plain = None if origin.answers is None else load_plain_for(directory, labels, origin.answers)
        if plain is not None:
            return TorchModel(plain.float().eval(), origin.processor(directory))
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        processor = origin.processor(directory)
        if prepare is not None:
            options |= prepare(config)
        if is_pruned(config):
            module = load_pruned(cls, directory, config)
        else:
            options |= {"use_safetensors": True, "output_loading_info": True}
            module, loading_info = cls.from_pretrained(
                directory, config=config, trust_remote_code=trust_remote_code, **options
            )
            _check_shapes(loading_info["mismatched_keys"], config.num_labels)
    except load_error_types() as error:
        reason = _OTHER_SHAPES if "ignore_mismatched_sizes" in str(error) else str(error)
        raise explain_load_failure(directory, trust_remote_code) or ModelError(
            f"The model cannot be loaded for {origin.task}: {reason}",
            where=str(directory),
            expected=origin.expected,
        ) from error
    return TorchModel(module.float().eval(), processor)


def _check_shapes(mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]], classes: int) -> None:
    """Raise `RuntimeError` for a tensor whose shape differs from the model's in more than the number of classes.

    Layers as wide as the classes are initialized at random. A detector that selects its queries by score has such
    layers outside its head.
    """
    for name, stored_shape, model_shape in mismatched:
        same_rank = len(stored_shape) == len(model_shape)
        differing = [new for old, new in zip(stored_shape, model_shape, strict=same_rank) if old != new]
        if not same_rank or any(size not in (classes, classes + 1) for size in differing):
            raise RuntimeError(
                f"{_OTHER_SHAPES}: {name} is {list(stored_shape)}, and {list(model_shape)} by the config"
            )


def load_plain_for(directory: Path, labels: Sequence[str] | None, answers: Callable[[Any, Any, Any], Any]) -> Any:
    """Return the plain torch module that a folder's config describes, or None for a model of transformers.

    A timm network without a head gets one for ``labels``. Raises `ModelError` if the module may not be built, and
    `DataError` if a trained head lacks a label.
    """
    from compress.models.config_checks import MODULE_KEY, TIMM_NETWORK
    from compress.models.json_file import read_json

    content = read_json(directory / "config.json")
    if MODULE_KEY not in content:
        return None
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from compress.models.custom_module import load_custom_module
    from compress.models.timm_models import change_head

    is_known_type = content.get("model_type") in CONFIG_MAPPING_NAMES
    config = (AutoConfig if is_known_type else PreTrainedConfig).from_pretrained(directory)
    if labels is not None:
        set_labels(config, labels, has_head="id2label" in content)
    module = load_custom_module(directory, config, answers)
    module_entry = content[MODULE_KEY]
    if module_entry["module"] == TIMM_NETWORK and not module_entry["arguments"]["num_classes"] and labels is not None:
        change_head(module, len(labels))
    return module
