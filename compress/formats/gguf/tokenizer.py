"""A byte-level BPE tokenizer as metadata of a GGUF file, as llama.cpp reads it.

llama.cpp splits text by one of the rules that are built into it, and the file only names the rule. Which one it is
follows from `tokenizer.json` alone, not from the model's name, so that a tokenizer whose rule is another is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoints.json_file import read_json
from compress.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGUFWriter

TOKENIZER = "tokenizer.json"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + _WORDS + r"\p{N}" + _REST: "qwen2",
}
_EXPECTED = "a byte-level BPE tokenizer that splits as GPT-2, SmolLM, Llama 3 or Qwen2 do"


def add_tokenizer(writer: GGUFWriter, folder: Path, rows: int) -> None:
    """Add vocabulary, merges, special tokens and chat template of ``folder``; ``rows`` of the embedding table.

    Rows without a token become unused ones. Raises `ModelError` for a tokenizer of another kind.
    """
    import gguf

    rule, place = check_tokenizer(folder), str(folder / TOKENIZER)
    content = read_json(folder / TOKENIZER)
    tokens, types = _vocabulary(content, rows, place)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=rows)
    # llama.cpp has defaults of its own for each rule; the file says what this tokenizer does.
    special.add_special_token = {"bos": False, "eos": False} | special.add_special_token
    special.add_to_gguf(writer, quiet=True)


def check_tokenizer(folder: Path) -> str:
    """llama.cpp's name for the rule by which the tokenizer of ``folder`` splits text. Raises `ModelError` for none."""
    content, place = read_json(folder / TOKENIZER), str(folder / TOKENIZER)
    _check_kind(content, place)
    return split_rule(content, place)


def split_rule(content: dict[str, Any], place: str) -> str:
    """llama.cpp's name for the rule by which a `tokenizer.json` splits text. Raises `ModelError` for another rule."""
    steps = _steps(content.get("pre_tokenizer"))
    kinds = [step.get("type") for step in steps]
    last = steps[-1] if steps else {}
    if kinds and kinds[-1] == "ByteLevel" and not last.get("add_prefix_space"):
        splits_words = last.get("use_regex", True)
        if kinds == ["ByteLevel"] and splits_words:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and splits_words:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not splits_words:
            pattern = (steps[0].get("pattern") or {}).get("Regex", "")
            if pattern in _SPLITS:
                return _SPLITS[pattern]
    raise ModelError(
        f"llama.cpp has no rule that splits text as this tokenizer does ({', '.join(map(str, kinds)) or 'none'}).",
        where=place,
        expected=_EXPECTED,
    )


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    inner = pre_tokenizer.get("pretokenizers")
    return [pre_tokenizer] if inner is None else [step for part in inner for step in _steps(part)]


def _check_kind(content: dict[str, Any], place: str) -> None:
    model = content.get("model") or {}
    normalizer = (content.get("normalizer") or {}).get("type")
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        found = "SentencePiece-like BPE" if model.get("byte_fallback") else f"{model.get('type')}"
        raise ModelError(f"The tokenizer's model is {found}.", where=place, expected=_EXPECTED)
    # Composed characters are the rule in text, and llama.cpp's own converter leaves the step out as well.
    if normalizer not in (None, "NFC"):
        raise ModelError(
            f"The tokenizer changes its text first ({normalizer}), which llama.cpp does not.",
            where=place,
            expected=_EXPECTED,
        )
    if not model.get("merges"):
        raise ModelError(
            "The tokenizer has no merges, and llama.cpp opens no BPE vocabulary without any.",
            where=place,
            expected=_EXPECTED,
        )


def _vocabulary(content: dict[str, Any], rows: int, place: str) -> tuple[list[str], list[int]]:
    from gguf import TokenType

    tokens = [f"[PAD{row}]" for row in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    entries = [(token, row, TokenType.NORMAL) for token, row in content["model"]["vocab"].items()]
    for added in content.get("added_tokens") or ():
        kind = TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED
        entries.append((added["content"], added["id"], kind))
    for token, row, kind in entries:
        if not 0 <= row < rows:
            raise ModelError(
                f"The token {token!r} has the id {row}, and the model has {rows} rows of embeddings.",
                where=place,
                expected="a tokenizer that fits the model",
            )
        tokens[row], types[row] = token, int(kind)
    return tokens, types
