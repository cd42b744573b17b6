"""The vocabulary of a language or speech model, cut in the files of its folder with one shard in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compress.models.checkpoint import Checkpoint
from compress.models.file_names import TOKENIZER_FILES
from compress.models.folder_checks import INDEX, refuse_quantized
from compress.models.json_file import read_json
from compress.models.meta_model import hollow_model
from compress.models.shards import write_shards
from compress.models.vocabulary import shrink, tokenizer_definition
from compress.utils.errors import StageError

Move = Callable[[int, bool], int | None]
"""From an id, and whether the model cannot do without it, to the new one; None for a token that is gone."""
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja")
_TOKENIZER, _TOKENIZER_CONFIG, _ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
_REWRITTEN = {*TOKENIZER_FILES, "merges.txt", _ADDED, INDEX}
"""What says again in other words what `tokenizer.json` says, and would say what was true before."""
_CONFIGS = ("config.json", "generation_config.json")
_ENDINGS = ("_token_id", "_token_ids", "_token_index")
_SPOKEN = ("lang_to_id", "task_to_id")
_WITHOUT_THE_GONE = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
_PLACED = "forced_decoder_ids"
_SIZE = "vocab_size"


def trim_checkpoint(
    checkpoint: Checkpoint,
    tokenizer: Any,
    folder: Path,
    counts: Mapping[int, int],
    min_count: int = 1,
    all_characters: bool = True,
    multiple_of: int = 1,
    whole_tail: bool = False,
) -> tuple[Checkpoint, int, int]:
    """Write ``checkpoint`` into the new ``folder`` with the tokens counted ``min_count`` times, and those they need.

    Kept beside them is what `shrink` keeps and every token that a config names; rows of the embedding table that no
    token has go, but for ``whole_tail`` with all rows from the first special token on, whose ids a speech model
    counts with. Returns the new checkpoint with the numbers of rows before and after. Raises `StageError` for a model
    with further tables of the vocabulary's height, and as `shrink` does; `ModelError` for a quantized one.
    """
    refuse_quantized(checkpoint.folder)
    cut, height = _vocabulary_tensors(checkpoint)
    configs = {name: read_json(checkpoint.folder / name) for name in _CONFIGS if (checkpoint.folder / name).is_file()}
    configs["config.json"] = _with_defaults(checkpoint, configs["config.json"])
    definition = tokenizer_definition(tokenizer)
    used = {token for token, count in counts.items() if count >= min_count} | _named(configs.values())
    if whole_tail:
        used.update(range(min((token["id"] for token in definition["added_tokens"]), default=height), height))
    rarer = sorted(counts, key=lambda token: (-counts[token], token))
    kept = shrink(definition, {token for token in used if token < height}, all_characters, multiple_of, rarer)
    new_ids = {old: new for new, old in enumerate(kept)}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_shards(folder, _cut_rows(checkpoint, cut, torch.tensor(kept)))
    _write_companions(checkpoint.folder, folder, definition, new_ids)
    for name, config in configs.items():
        changed = _renumbered(config, lambda token, needed: new_ids.get(token), height, len(kept))
        _write_json(folder / name, changed | ({_SIZE: len(kept)} if name == "config.json" and _SIZE in config else {}))
    return Checkpoint(folder), height, len(kept)


def _vocabulary_tensors(checkpoint: Checkpoint) -> tuple[set[str], int]:
    """Stored tensors with a row for each token, and how many rows: the embedding table, and the head if it has any."""
    module = hollow_model(checkpoint.folder)
    table, head = module.get_input_embeddings(), module.get_output_embeddings()
    height = int(table.num_embeddings)
    sizes = [key for key in checkpoint.config if key.startswith(f"{_SIZE}_")]
    if sizes or (head is not None and head.weight.shape[0] != height):
        raise StageError(
            f"The vocabulary cannot be cut: {sizes[0] if sizes else 'the output layer'} is another table of it.",
            where=str(checkpoint.folder / "config.json"),
            expected="one embedding table, and an output layer of the same height",
        )
    names = {
        f"{name}.{leaf}"
        for name, part in module.named_modules(remove_duplicate=False)
        if part is table or part is head
        for leaf, _ in part.named_parameters(recurse=False)
    }
    found = {
        name for name in (*names, *(checkpoint.aliases.get(name, name) for name in names)) if name in checkpoint.files
    }
    if not found:
        raise StageError(
            f"The checkpoint has no {min(names)}, the embedding table.",
            where=str(checkpoint.folder),
            expected="tensors by transformers' names",
        )
    return found, height


def _cut_rows(checkpoint: Checkpoint, cut: set[str], rows: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    for name in checkpoint.files:
        tensor = checkpoint.stored(name)
        yield name, tensor[rows] if name in cut else tensor


def _with_defaults(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the ids that transformers fills in where it names none."""
    from transformers import AutoConfig

    known = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False).to_dict()
    ids = {key: value for key, value in known.items() if key.endswith(_ENDINGS) and isinstance(value, int)}
    return {**ids, **config}


def _named(configs: Any) -> set[int]:
    """The tokens that configs name and the model cannot do without."""
    found: set[int] = set()

    def note(token: int, needed: bool) -> int:
        found.update([token] if needed else [])
        return token

    for config in configs:
        _renumbered(config, note, 0, 0)
    return found


def _renumbered(config: Mapping[str, Any], move: Move, height: int, rows: int) -> dict[str, Any]:
    """A config, and those within it, with ids moved and a `vocab_size` of ``height`` become ``rows``."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in _SPOKEN:
            found[key] = {name: move(token, True) for name, token in (value or {}).items()}
        elif key == _PLACED:
            found[key] = value and [[place, _moved(token, move, True)] for place, token in value]
        elif key in _WITHOUT_THE_GONE or key.endswith(_ENDINGS):
            found[key] = _moved(value, move, key not in _WITHOUT_THE_GONE)
        elif key == _SIZE and value == height:
            found[key] = rows
        else:
            found[key] = _renumbered(value, move, height, rows) if isinstance(value, dict) else value
    return found


def _moved(value: Any, move: Move, needed: bool) -> Any:
    """An id or a list of them, also one of words, without what is gone; what is no id, such as -1, as it is."""
    if isinstance(value, list):
        moved = [_moved(one, move, needed) for one in value]
        # A word of several tokens is one no longer when a part of it is gone.
        if any(isinstance(one, list) for one in value):
            return [new for old, new in zip(value, moved, strict=True) if len(new) == len(old)]
        return [one for one in moved if one is not None]
    return move(value, needed) if isinstance(value, int) and value >= 0 else value


def _write_companions(source: Path, folder: Path, definition: Mapping[str, Any], new_ids: Mapping[int, int]) -> None:
    """What lies beside the weights, the tokenizer's files with the new ids."""
    for path in sorted(path for pattern in _COMPANIONS for path in source.glob(pattern)):
        if path.name not in _REWRITTEN and path.name not in _CONFIGS:
            shutil.copyfile(path, folder / path.name)
    _write_json(folder / _TOKENIZER, definition)
    if (source / _TOKENIZER_CONFIG).is_file():
        about = read_json(source / _TOKENIZER_CONFIG)
        if added := about.get("added_tokens_decoder"):
            about["added_tokens_decoder"] = {str(new_ids[int(token)]): entry for token, entry in added.items()}
        _write_json(folder / _TOKENIZER_CONFIG, about)
    if (source / _ADDED).is_file():
        _write_json(folder / _ADDED, {name: new_ids[token] for name, token in read_json(source / _ADDED).items()})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def spoken_tokens(tokenizer: Any, texts: Sequence[str]) -> Iterator[int]:
    """The tokens of what is said, and of each text's first word at a transcript's very beginning."""
    for text in texts:
        for part in (f" {text.strip()}", *text.split(maxsplit=1)[:1]):
            yield from tokenizer(part, add_special_tokens=False)["input_ids"]


def template_tokens(tokenizer: Any) -> list[int]:
    """The tokens of a chat template, where the tokenizer has one. Raises `StageError` for one that fails."""
    from jinja2.exceptions import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        return []
    talk = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    try:
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError) as error:
        raise StageError(
            f"The chat template fails, so that nobody knows its tokens: {error}",
            expected="one that writes a talk of a user and an assistant",
            hint="fix or remove the tokenizer's chat_template",
        ) from error
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found
