"""Smaller vocabularies: a tokenizer and its embedding rows cut down to the tokens that are used."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from compress.models.torch_model import TorchModel
from compress.utils.errors import StageError

_SUPPORTED = ("WordPiece", "BPE", "Unigram")
_ID_FIELDS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "mask_token_id")
_SPACE = "▁"
"""Begins every word of a SentencePiece tokenizer, so it is kept like an ASCII character."""


def trim(model: TorchModel, used: Iterable[int], all_characters: bool = True, multiple_of: int = 1) -> list[int]:
    """Cut ``model`` down to the tokens ``used`` (ids) and those needed to spell anything else, in place.

    Returns the old ids in their new order. See `shrink`, which says what is kept and what it raises.
    """
    told = model.tokenizer.backend_tokenizer.to_str()
    definition, kept = _shrunk(told, frozenset(used), all_characters, multiple_of)
    new_ids = {old: new for new, old in enumerate(kept)}
    _replace_tokenizer(model, definition)
    _cut_embeddings(model.module, torch.tensor(kept))
    for config in (model.module.config, getattr(model.module, "generation_config", None)):
        for name in _ID_FIELDS:
            old = getattr(config, name, None)
            if isinstance(old, int) and old in new_ids:
                setattr(config, name, new_ids[old])
    return list(kept)


@functools.lru_cache(maxsize=16)
def _shrunk(told: str, used: frozenset[int], all_characters: bool, multiple_of: int) -> tuple[str, tuple[int, ...]]:
    """`shrink` of a tokenizer as JSON. A search trims that of one model for hundreds of widths, each time alike."""
    definition = _defined(told)
    kept = shrink(definition, set(used), all_characters, multiple_of)
    return json.dumps(definition), tuple(kept)


def tokenizer_definition(tokenizer: Any) -> dict[str, Any]:
    """What `tokenizer.json` holds of a tokenizer, without what an earlier call left behind: the padding's old id."""
    return _defined(tokenizer.backend_tokenizer.to_str())


def _defined(told: str) -> dict[str, Any]:
    definition: dict[str, Any] = json.loads(told)
    definition["padding"] = definition["truncation"] = None
    return definition


def shrink(
    definition: dict[str, Any],
    used: set[int],
    all_characters: bool = True,
    multiple_of: int = 1,
    next_used: Sequence[int] = (),
) -> list[int]:
    """Cut a tokenizer's ``definition`` down to the tokens ``used`` (ids), in place; the old ids in their new order.

    Special and added tokens and single characters (all bytes, for a byte-level tokenizer or one that falls back to
    bytes) are kept; without ``all_characters`` only used and ASCII ones, and other characters become bytes, or the
    unknown token where there are none. So is whatever a kept token is merged from. Text that uses only kept tokens is
    therefore split as before: what byte pair encoding merges on the way to a kept token is kept too, the merges stay in
    their order, and fewer candidates that still hold the first leave it the first.

    Tokens are added until their number is ``multiple_of`` something: those of ``next_used`` first, then short ones.
    Raises `StageError` for a tokenizer model other than WordPiece, BPE and Unigram.
    """
    keep, parts = _closure(definition, used, all_characters), _parts(definition)
    _add_parts(keep, parts)
    if len(keep) % multiple_of:
        _fill_up(keep, parts, definition, multiple_of, next_used)
    kept = sorted(keep)
    _rewrite(definition, {old: new for new, old in enumerate(kept)})
    return kept


def _fill_up(
    keep: set[int],
    parts: Mapping[int, set[int]],
    definition: Mapping[str, Any],
    multiple_of: int,
    next_used: Sequence[int],
) -> None:
    names = {index: token for token, index in _vocabulary(definition).items()}
    left = sorted(names.keys() - keep, key=lambda index: (len(names[index]), index))
    for index in (*next_used, *left):
        room = -len(keep) % multiple_of
        if not room:
            break
        added = {index}
        _add_parts(added, parts)
        if len(added - keep) <= room:
            keep |= added


def trim_positions(model: TorchModel, length: int) -> None:
    """Cut learned absolute position embeddings to ``length`` tokens, in place; without such a table, do nothing."""
    module = model.module
    for parent in module.modules():
        table = getattr(parent, "position_embeddings", None)
        if not isinstance(table, nn.Embedding):
            continue
        rows = length if table.padding_idx is None else length + table.padding_idx + 1
        if rows >= table.num_embeddings:
            continue
        _keep_rows(table, torch.arange(rows))
        module.config.max_position_embeddings = rows
        for name in ("position_ids", "token_type_ids"):
            buffer = getattr(parent, name, None)
            if isinstance(buffer, torch.Tensor):
                parent.register_buffer(name, buffer[:, :rows].clone(), persistent=False)
    model.tokenizer.model_max_length = min(model.tokenizer.model_max_length, length)


def _vocabulary(definition: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id of the tokenizer's model, without added tokens."""
    model = definition["model"]
    if model["type"] not in _SUPPORTED:
        raise StageError(
            f"A tokenizer of type {model['type']!r} cannot be trimmed.",
            expected=f"one of {', '.join(_SUPPORTED)}",
        )
    if model["type"] == "Unigram":
        return {token: index for index, (token, _) in enumerate(model["vocab"])}
    vocabulary: dict[str, int] = model["vocab"]
    return vocabulary


def _closure(definition: Mapping[str, Any], used: set[int], all_characters: bool) -> set[int]:
    """Ids to keep, but for what they are merged from: the used, the special and the single characters."""
    model, vocabulary = definition["model"], _vocabulary(definition)
    keep = used | {token["id"] for token in definition.get("added_tokens", [])}
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    byte_level = "ByteLevel" in json.dumps([definition.get("pre_tokenizer"), definition.get("decoder")])
    for token, index in vocabulary.items():
        piece = token.removeprefix(prefix).removesuffix(suffix)
        needed = all_characters or byte_level or piece.isascii() or piece == _SPACE
        if (len(piece) == 1 and needed) or (token.startswith("<0x") and len(token) == 6):
            keep.add(index)
    if isinstance(model.get("unk_token"), str) and model["unk_token"] in vocabulary:
        keep.add(vocabulary[model["unk_token"]])
    if isinstance(model.get("unk_id"), int):
        keep.add(model["unk_id"])
    return keep


def _parts(definition: Mapping[str, Any]) -> dict[int, set[int]]:
    """Of each token that is merged, what it is merged from, by any of the ways that lead to it."""
    model, vocabulary = definition["model"], _vocabulary(definition)
    prefix = model.get("continuing_subword_prefix") or ""
    parts: dict[int, set[int]] = {}
    for left, right in map(_pair, model.get("merges") or ()):
        whole = vocabulary.get(left + right.removeprefix(prefix))
        if whole is not None:
            parts.setdefault(whole, set()).update((vocabulary[left], vocabulary[right]))
    return parts


def _add_parts(keep: set[int], parts: Mapping[int, set[int]]) -> None:
    """Add to ``keep``, in place, whatever its tokens are merged from."""
    pending = list(keep)
    while pending:
        missing = parts.get(pending.pop(), set()) - keep
        keep |= missing
        pending += missing


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _rewrite(definition: dict[str, Any], new_ids: Mapping[int, int]) -> None:
    """Renumber the tokenizer's definition in place."""
    model, vocabulary = definition["model"], _vocabulary(definition)
    if model["type"] == "Unigram":
        model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in new_ids]
        if isinstance(model.get("unk_id"), int):
            model["unk_id"] = new_ids[model["unk_id"]]
    else:
        model["vocab"] = {token: new_ids[index] for token, index in vocabulary.items() if index in new_ids}
    if model["type"] == "BPE":
        prefix = model.get("continuing_subword_prefix") or ""
        alive = model["vocab"]
        model["merges"] = [
            [left, right]
            for left, right in map(_pair, model["merges"])
            if left in alive and right in alive and left + right.removeprefix(prefix) in alive
        ]
    for token in definition.get("added_tokens", []):
        token["id"] = new_ids[token["id"]]
    _renumber_processors(definition.get("post_processor"), new_ids)


def _renumber_processors(processor: Any, new_ids: Mapping[int, int]) -> None:
    if not isinstance(processor, dict):
        return
    if processor["type"] == "Sequence":
        for part in processor["processors"]:
            _renumber_processors(part, new_ids)
    for name in ("sep", "cls"):
        if name in processor:
            processor[name] = [processor[name][0], new_ids[processor[name][1]]]
    special = processor.get("special_tokens")
    for token in special.values() if isinstance(special, dict) else ():
        token["ids"] = [new_ids[index] for index in token["ids"]]


def _replace_tokenizer(model: TorchModel, definition: str) -> None:
    backend = Tokenizer.from_str(definition)
    before = model.tokenizer
    kwargs = {**before.init_kwargs, "model_max_length": before.model_max_length}
    for name in ("vocab", "merges", "vocab_file", "merges_file", "tokenizer_file", "tokenizer_object"):
        kwargs.pop(name, None)
    replaced = type(before)(tokenizer_object=backend, **kwargs)
    replaced._tokenizer = backend
    model.replace_tokenizer(replaced)


def _cut_embeddings(module: Any, kept: torch.Tensor) -> None:
    """Keep the rows ``kept`` of the input embedding and of an output embedding of the same height."""
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    height = embedding.num_embeddings
    _keep_rows(embedding, kept)
    if head is not None and head.weight.shape[0] == height and not tied:
        head.weight = nn.Parameter(head.weight.detach()[kept].clone())
    if head is not None:
        if getattr(head, "bias", None) is not None and head.bias.shape[0] == height:
            _replace_everywhere(module, head.bias, nn.Parameter(head.bias.detach()[kept].clone()))
        head.out_features = len(kept)
        module.tie_weights()
    module.config.vocab_size = len(kept)


def _replace_everywhere(module: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put ``new`` wherever ``module`` holds ``old``; transformers ties a bias that is left behind by cutting it off."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter is old:
                setattr(part, name, new)


def _keep_rows(table: nn.Embedding, rows: torch.Tensor) -> None:
    table.weight = nn.Parameter(table.weight.detach()[rows].clone())
    table.num_embeddings = len(rows)
    if table.padding_idx is not None:
        position = (rows == table.padding_idx).nonzero()
        table.padding_idx = int(position[0, 0]) if len(position) else None


def word_table(module: nn.Module) -> nn.Embedding | None:
    """The table of words; None for a module that reads no ids."""
    find = getattr(module, "get_input_embeddings", None)
    try:
        table = find() if find is not None else None
    except NotImplementedError:
        return None
    return table if isinstance(table, nn.Embedding) else None
