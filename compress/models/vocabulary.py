"""Vocabulary trimming: a tokenizer and its embedding rows reduced to the tokens in use."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from torch import nn

from compress.models.model import TorchModel
from compress.utils.errors import StageError

if TYPE_CHECKING:
    from compress.models.model import Processor


_SUPPORTED = ("WordPiece", "BPE", "Unigram")
_ID_FIELDS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "mask_token_id")
_SPACE = "▁"
"""Start of every word in a SentencePiece tokenizer, kept like an ASCII character."""


def trim(model: TorchModel, used: Iterable[int], all_characters: bool = True) -> list[int]:
    """Reduce ``model`` to the tokens ``used`` (ids) and those needed to spell other text, in place.

    Returns the old ids in their new order. `trim_definition` states which tokens are kept and the errors.
    """
    definition_json = model.tokenizer.backend_tokenizer.to_str()
    definition, old_ids = _shrunk(definition_json, frozenset(used), all_characters)
    new_ids = {old: new for new, old in enumerate(old_ids)}
    _replace_tokenizer(model, definition)
    # Keep the same rows of the input embedding and of an output embedding with as many rows.
    module = model.module
    row_ids = torch.tensor(old_ids)
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    height = embedding.num_embeddings
    _keep_rows(embedding, row_ids)
    if head is not None and head.weight.shape[0] == height and not tied:
        head.weight = nn.Parameter(head.weight.detach()[row_ids].clone())
    if head is not None:
        # Some heads share a bias with another module. transformers would truncate a tied bias that was left behind.
        bias = getattr(head, "bias", None)
        if bias is not None and bias.shape[0] == height:
            new_bias = nn.Parameter(bias.detach()[row_ids].clone())
            for part in module.modules():
                for name, parameter in list(part.named_parameters(recurse=False)):
                    if parameter is bias:
                        setattr(part, name, new_bias)
        head.out_features = len(row_ids)
        module.tie_weights()
    module.config.vocab_size = len(row_ids)
    # Special token ids in both configs must follow their tokens.
    for config in (model.module.config, getattr(model.module, "generation_config", None)):
        for name in _ID_FIELDS:
            old = getattr(config, name, None)
            if isinstance(old, int) and old in new_ids:
                setattr(config, name, new_ids[old])
    return list(old_ids)


@functools.lru_cache(maxsize=16)
def _shrunk(definition_json: str, used: frozenset[int], all_characters: bool) -> tuple[str, tuple[int, ...]]:
    """Return the trimmed definition of a tokenizer as JSON; cached, since a search trims the same one many times."""
    definition = json.loads(definition_json)
    # Settings of an earlier call of the tokenizer.
    definition["padding"] = definition["truncation"] = None
    old_ids = trim_definition(definition, set(used), all_characters)
    return json.dumps(definition), tuple(old_ids)


def trim_definition(definition: dict[str, Any], used: set[int], all_characters: bool = True) -> list[int]:
    """Reduce a tokenizer's ``definition`` to the tokens ``used``, in place.

    Special and added tokens, single characters (all bytes of a byte-level tokenizer or one with byte fallback) and the
    parts that a kept token is merged from are kept. Text of kept tokens is therefore tokenized as before: intermediate
    merges of a kept token are kept too, merges keep their order, and removing other candidates does not change which
    one is first.

    Args:
        definition: Parsed `tokenizer.json`.
        used: Ids of the tokens in use.
        all_characters: Keep all single characters. Otherwise only used and ASCII ones stay, and other characters become
            bytes, or the unknown token without byte tokens.

    Returns:
        The old ids in their new order.

    Raises:
        StageError: If the tokenizer model is not WordPiece, BPE or Unigram.
    """
    # Keep the required tokens and everything they are merged from.
    keep = _closure(definition, used, all_characters)
    _add_parts(keep, _parts(definition))
    old_ids = sorted(keep)
    # Renumber the tokenizer's definition in place.
    new_ids = {old: new for new, old in enumerate(old_ids)}
    model, vocabulary = definition["model"], _vocabulary(definition)
    if model["type"] == "Unigram":
        model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in new_ids]
        if isinstance(model.get("unk_id"), int):
            model["unk_id"] = new_ids[model["unk_id"]]
    else:
        model["vocab"] = {token: new_ids[index] for token, index in vocabulary.items() if index in new_ids}
    # A merge is kept if both parts and its result are.
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
    return old_ids


def trim_positions(model: TorchModel, length: int) -> None:
    """Reduce learned absolute position embeddings to ``length`` tokens, in place; do nothing without such a table."""
    module = model.module
    for parent in module.modules():
        table = getattr(parent, "position_embeddings", None)
        if not isinstance(table, nn.Embedding):
            continue
        # RoBERTa's positions start behind the padding index.
        rows = length if table.padding_idx is None else length + table.padding_idx + 1
        if rows >= table.num_embeddings:
            continue
        _keep_rows(table, torch.arange(rows))
        module.config.max_position_embeddings = rows
        # Buffers with one entry per position shrink too.
        for name in ("position_ids", "token_type_ids"):
            buffer = getattr(parent, name, None)
            if isinstance(buffer, torch.Tensor):
                parent.register_buffer(name, buffer[:, :rows].clone(), persistent=False)
    model.tokenizer.model_max_length = min(model.tokenizer.model_max_length, length)


def _vocabulary(definition: Mapping[str, Any]) -> dict[str, int]:
    """Return token -> id of the tokenizer's model, without added tokens."""
    model = definition["model"]
    if model["type"] not in _SUPPORTED:
        fault = f"A tokenizer of type {model['type']!r} cannot be trimmed."
        raise StageError(fault, expected=f"one of {', '.join(_SUPPORTED)}")
    if model["type"] == "Unigram":
        return {token: index for index, (token, _) in enumerate(model["vocab"])}
    vocabulary: dict[str, int] = model["vocab"]
    return vocabulary


def _closure(definition: Mapping[str, Any], used: set[int], all_characters: bool) -> set[int]:
    """Return the ids to keep except merge parts: used, special and single-character tokens."""
    model, vocabulary = definition["model"], _vocabulary(definition)
    keep = used | {token["id"] for token in definition.get("added_tokens", [])}
    # Markers of WordPiece and of some BPE models are not part of the character.
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    byte_level = "ByteLevel" in json.dumps([definition.get("pre_tokenizer"), definition.get("decoder")])
    for token, index in vocabulary.items():
        piece = token.removeprefix(prefix).removesuffix(suffix)
        needed = all_characters or byte_level or piece.isascii() or piece == _SPACE
        # `<0x0A>` and the like are the byte tokens of SentencePiece's byte fallback.
        if (len(piece) == 1 and needed) or (token.startswith("<0x") and len(token) == 6):
            keep.add(index)
    # Text that cannot be spelled becomes the unknown token.
    if isinstance(model.get("unk_token"), str) and model["unk_token"] in vocabulary:
        keep.add(vocabulary[model["unk_token"]])
    if isinstance(model.get("unk_id"), int):
        keep.add(model["unk_id"])
    return keep


def _parts(definition: Mapping[str, Any]) -> dict[int, set[int]]:
    """Return the parts that each merged token can be merged from."""
    model, vocabulary = definition["model"], _vocabulary(definition)
    prefix = model.get("continuing_subword_prefix") or ""
    parts: dict[int, set[int]] = {}
    for left, right in map(_pair, model.get("merges") or ()):
        merged = vocabulary.get(left + right.removeprefix(prefix))
        if merged is not None:
            parts.setdefault(merged, set()).update((vocabulary[left], vocabulary[right]))
    return parts


def _add_parts(keep: set[int], parts: Mapping[int, set[int]]) -> None:
    """Add the merge parts of all tokens to ``keep``, in place."""
    pending = list(keep)
    while pending:
        missing = parts.get(pending.pop(), set()) - keep
        keep |= missing
        pending += missing


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _renumber_processors(processor: Processor, new_ids: Mapping[int, int]) -> None:
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
    """Replace the model's tokenizer by one with a new definition and the same settings."""
    backend = Tokenizer.from_str(definition)
    tokenizer = model.tokenizer
    kwargs = {**tokenizer.init_kwargs, "model_max_length": tokenizer.model_max_length}
    # Files and objects of the old vocabulary would override the new one.
    for name in ("vocab", "merges", "vocab_file", "merges_file", "tokenizer_file", "tokenizer_object"):
        kwargs.pop(name, None)
    replaced = type(tokenizer)(tokenizer_object=backend, **kwargs)
    replaced._tokenizer = backend
    model.replace_tokenizer(replaced)


def _keep_rows(table: nn.Embedding, rows: torch.Tensor) -> None:
    table.weight = nn.Parameter(table.weight.detach()[rows].clone())
    table.num_embeddings = len(rows)
    if table.padding_idx is not None:
        position = (rows == table.padding_idx).nonzero()
        table.padding_idx = int(position[0, 0]) if len(position) else None


def token_embedding(module: nn.Module) -> nn.Embedding | None:
    """Return the embedding table of tokens; None for a module that reads no ids."""
    getter = getattr(module, "get_input_embeddings", None)
    try:
        table = getter() if getter is not None else None
    except NotImplementedError:
        return None
    return table if isinstance(table, nn.Embedding) else None
