"""Vocabulary trimming of a language or speech model in its files, with one shard in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.models.checkpoint import Checkpoint, write_shards
from compress.models.folder_checks import INDEX, TOKENIZER_FILES, refuse_quantized
from compress.models.json_file import read_json
from compress.models.meta_model import build_on_meta
from compress.models.vocabulary import tokenizer_definition, trim_definition
from compress.utils.errors import StageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Move = Callable[[int, bool], int | None]
"""Maps an id, and whether the model requires it, to the new id; None for a removed token."""
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja")
_TOKENIZER, _TOKENIZER_CONFIG, _ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
_REWRITTEN = {*TOKENIZER_FILES, "merges.txt", _ADDED, INDEX}
"""Files that repeat content of `tokenizer.json` and would be outdated."""
_CONFIGS = ("config.json", "generation_config.json")
_ENDINGS = ("_token_id", "_token_ids", "_token_index")
_SPOKEN = ("lang_to_id", "task_to_id")
_WITHOUT_THE_GONE = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
_PLACED = "forced_decoder_ids"
_SIZE = "vocab_size"


def trim_checkpoint(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    counts: Mapping[int, int],
    min_count: int = 1,
    all_characters: bool = True,
    multiple_of: int = 1,
    whole_tail: bool = False,
) -> tuple[Checkpoint, int, int]:
    """Write a copy of ``checkpoint`` with only the tokens that occur often enough, and those they need.

    `trim_definition` states which other tokens are kept. Tokens named in a config are kept too. Rows of the embedding
    table without a token are removed.

    Args:
        checkpoint: Float checkpoint to trim.
        tokenizer: Its tokenizer.
        folder: New folder.
        counts: Number of occurrences of each token id.
        min_count: Minimum number of occurrences.
        all_characters: Keep all single characters; see `trim_definition`.
        multiple_of: Make the number of tokens a multiple of this.
        whole_tail: Keep all rows from the first special token on, since a speech model computes with their ids.

    Returns:
        The new checkpoint, and the numbers of rows before and after.

    Raises:
        StageError: If another table depends on the vocabulary, or the tokenizer is not supported.
        ModelError: If the checkpoint is quantized.
    """
    refuse_quantized(checkpoint.folder)
    from transformers import AutoConfig

    # Rows of these tensors correspond to token ids.
    tensor_names, height = _vocabulary_tensors(checkpoint)
    configs = {name: read_json(checkpoint.folder / name) for name in _CONFIGS if (checkpoint.folder / name).is_file()}
    # Add the token ids that transformers sets by default to the config, so that they are renumbered too.
    defaults = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False).to_dict()
    ids = {key: value for key, value in defaults.items() if key.endswith(_ENDINGS) and isinstance(value, int)}
    configs["config.json"] = {**ids, **configs["config.json"]}
    definition = tokenizer_definition(tokenizer)
    used = {token for token, count in counts.items() if count >= min_count} | _named(configs.values())
    if whole_tail:
        used.update(range(min((token["id"] for token in definition["added_tokens"]), default=height), height))
    # Fill up to a multiple with the most frequent of the remaining tokens.
    rarer = sorted(counts, key=lambda token: (-counts[token], token))
    token_ids = trim_definition(
        definition, {token for token in used if token < height}, all_characters, multiple_of, rarer
    )
    new_ids = {old: new for new, old in enumerate(token_ids)}
    # An interrupted run may have left a partial folder.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows, tensors = torch.tensor(token_ids), ((name, checkpoint.stored(name)) for name in checkpoint.files)
    write_shards(folder, ((name, tensor[rows] if name in tensor_names else tensor) for name, tensor in tensors))
    _write_companions(checkpoint.folder, folder, definition, new_ids)
    for name, config in configs.items():
        changed = _renumbered(config, lambda token, needed: new_ids.get(token), height, len(token_ids))
        _write_json(
            folder / name, changed | ({_SIZE: len(token_ids)} if name == "config.json" and _SIZE in config else {})
        )
    return Checkpoint(folder), height, len(token_ids)


def _write_companions(source: Path, folder: Path, definition: Mapping[str, object], new_ids: Mapping[int, int]) -> None:
    """Write all files except weights and configs, with new ids in the tokenizer's files."""
    for path in sorted(path for pattern in _COMPANIONS for path in source.glob(pattern)):
        if path.name not in _REWRITTEN and path.name not in _CONFIGS:
            shutil.copyfile(path, folder / path.name)
    _write_json(folder / _TOKENIZER, definition)
    if (source / _TOKENIZER_CONFIG).is_file():
        tokenizer_config = read_json(source / _TOKENIZER_CONFIG)
        if added := tokenizer_config.get("added_tokens_decoder"):
            tokenizer_config["added_tokens_decoder"] = {
                str(new_ids[int(token)]): entry for token, entry in added.items()
            }
        _write_json(folder / _TOKENIZER_CONFIG, tokenizer_config)
    if (source / _ADDED).is_file():
        _write_json(folder / _ADDED, {name: new_ids[token] for name, token in read_json(source / _ADDED).items()})


def _vocabulary_tensors(checkpoint: Checkpoint) -> tuple[set[str], int]:
    """Return the stored tensors with a row per token (embedding table, head) and the number of rows."""
    module = build_on_meta(checkpoint.folder)
    table, head = module.get_input_embeddings(), module.get_output_embeddings()
    height = int(table.num_embeddings)
    # Some architectures have a second vocabulary size.
    sizes = [key for key in checkpoint.config if key.startswith(f"{_SIZE}_")]
    if sizes or (head is not None and head.weight.shape[0] != height):
        raise StageError(
            f"The vocabulary cannot be trimmed: {sizes[0] if sizes else 'the output layer'} is another table of it.",
            where=str(checkpoint.folder / "config.json"),
            expected="one embedding table, and an output layer of the same height",
        )
    names = {
        f"{name}.{leaf}"
        for name, part in module.named_modules(remove_duplicate=False)
        if part is table or part is head
        for leaf, _ in part.named_parameters(recurse=False)
    }
    stored = {*names, *(checkpoint.aliases.get(name, name) for name in names)} & checkpoint.files.keys()
    if not stored:
        raise StageError(
            f"The checkpoint has no {min(names)}, the embedding table.",
            where=str(checkpoint.folder),
            expected="tensors by transformers' names",
        )
    return stored, height


def _named(configs: Any) -> set[int]:
    """Return the tokens that configs name and the model requires."""
    tokens: set[int] = set()

    def note(token: int, needed: bool) -> int:
        tokens.update([token] if needed else [])
        return token

    for config in configs:
        _renumbered(config, note, 0, 0)
    return tokens


def _renumbered(config: Mapping[str, Any], move: Move, height: int, rows: int) -> dict[str, Any]:
    """Return a config, and those nested in it, with new ids and a `vocab_size` of ``rows`` in place of ``height``.

    Args:
        config: Config to renumber.
        move: Maps old ids to new ones.
        height: Rows before trimming.
        rows: Rows after trimming.
    """
    result: dict[str, Any] = {}
    for key, value in config.items():
        # Whisper maps languages and tasks to tokens.
        if key in _SPOKEN:
            result[key] = {name: move(token, True) for name, token in (value or {}).items()}
        # Whisper forces tokens at positions: pairs of position and token.
        elif key == _PLACED:
            result[key] = value and [[position, _moved(token, move, True)] for position, token in value]
        elif key in _WITHOUT_THE_GONE or key.endswith(_ENDINGS):
            result[key] = _moved(value, move, key not in _WITHOUT_THE_GONE)
        elif key == _SIZE and value == height:
            result[key] = rows
        else:
            result[key] = _renumbered(value, move, height, rows) if isinstance(value, dict) else value
    return result


def _moved(value: object, move: Move, needed: bool) -> Any:
    """Return an id or a nested list of ids with new values, without removed tokens; negative values stay."""
    if isinstance(value, list):
        # Lists may be nested: a bad word is a list of tokens.
        moved = [_moved(entry, move, needed) for entry in value]
        # A word of several tokens is one no longer when a part of it is gone.
        if any(isinstance(entry, list) for entry in value):
            return [new for old, new in zip(value, moved, strict=True) if len(new) == len(old)]
        return [entry for entry in moved if entry is not None]
    return move(value, needed) if isinstance(value, int) and value >= 0 else value


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def transcript_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[int]:
    """Yield the tokens of each text within a transcript, and of its first word at the start of one."""
    for text in texts:
        # A word is tokenized differently at the start of a text.
        for part in (f" {text.strip()}", *text.split(maxsplit=1)[:1]):
            yield from tokenizer(part, add_special_tokens=False)["input_ids"]


def template_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of the tokenizer's chat template, if any. Raises `StageError` for one that fails."""
    from jinja2.exceptions import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        return []
    # Three turns cover the tokens between turns of both roles.
    conversation = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError) as error:
        raise StageError(
            f"The chat template fails, so its tokens cannot be determined: {error}",
            expected="a template for a conversation of a user and an assistant",
            hint="fix or remove the tokenizer's chat_template",
        ) from error
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens
