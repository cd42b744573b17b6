"""Conversion of a BPE tokenizer to the metadata of a GGUF file.

llama.cpp splits the text of a byte-level tokenizer by one of its built-in rules, and the file only names the rule.
The rule is derived from `tokenizer.json` and not from the model's name, so that a tokenizer with another rule is
refused. A SentencePiece-like tokenizer has scores instead of merges: earlier merges have higher scores.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.models.json_file import read_json
from compress.utils.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGUFWriter

TOKENIZER = "tokenizer.json"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES
SPLITS: dict[tuple[str, ...], str] = {
    (_CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _SYMBOLS,): "llama-bpe",
    (_CONTRACTIONS + _WORDS + r"\p{N}" + _SYMBOLS,): "qwen2",
    (f"{_CASES[0]}{_CONTRACTIONS}?|{_CASES[1]}{_CONTRACTIONS}?" + r"|\p{N}{1,3}" + _SLASH,): "gpt-4o",
    (f"{_CASES[0]}|{_CASES[1]}" + r"|\p{N}" + _SLASH,): "tekken",
    (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACES,): "qwen35",
    (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",  # noqa: RUF001
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"| ?[\p{P}\p{S}]+[\r\n]*" + _SPACES,
    ): "deepseek-v3",
    (r" ?[^(\s|.,!?…。，、।۔،)]+",): "bloom",  # noqa: RUF001
}
"""llama.cpp's names of rules by the patterns that split text before it is converted to bytes."""
_SPACE = "▁"
_SENTENCE_PIECE = "default"
_EXPECTED = "a byte-level BPE tokenizer that splits as GPT-2, SmolLM, Llama 3, Qwen2, GPT-4o or DeepSeek-V3 do"


def add_tokenizer(writer: GGUFWriter, folder: Path, rows: int) -> None:
    """Add vocabulary, merges, special tokens and chat template of ``folder``; ``rows`` of the embedding table.

    Rows without a token become unused ones. Raises `ModelError` for a tokenizer of another kind.
    """
    import gguf

    rule, where = check_tokenizer(folder), str(folder / TOKENIZER)
    content = read_json(folder / TOKENIZER)
    tokens, types = _vocabulary(content, rows, where)
    scores = None if rule != _SENTENCE_PIECE else _scores(content, where)
    writer.add_tokenizer_model("gpt2" if scores is None else "llama")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    if scores is not None:
        writer.add_token_scores([scores.get(token, 0.0) for token in tokens])
        # Find out whether the tokenizer adds a space before a text.
        steps = _steps(content.get("pre_tokenizer"))
        schemes = [step.get("prepend_scheme", "always") for step in steps if step.get("type") == "Metaspace"]
        prepends = any(step.get("type") == "Prepend" for step in _normal_steps(content))
        writer.add_add_space_prefix(prepends or schemes not in ([], ["never"]))
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=scores is None, n_vocab=rows)
    # llama.cpp has defaults of its own for each rule; the file says what this tokenizer does.
    special.add_special_token = {"bos": False, "eos": False} | special.add_special_token
    special.add_to_gguf(writer, quiet=True)


def check_tokenizer(folder: Path) -> str:
    """Return llama.cpp's name for the splitting rule of a folder's tokenizer; raise `ModelError` if it has none."""
    content, where = read_json(folder / TOKENIZER), str(folder / TOKENIZER)
    model = content.get("model") or {}
    if model.get("byte_fallback"):
        # Raise `ModelError` for a SentencePiece-like tokenizer that does more than make spaces visible.
        steps = [*_normal_steps(content), *_steps(content.get("pre_tokenizer"))]
        odd = next((step for step in steps if not _shows_spaces(step)), None)
        if odd is not None or not steps:
            kind = (odd or {}).get("type")
            raise ModelError(
                f"llama.cpp does not prepare text as this SentencePiece-like tokenizer does ({kind}).",
                where=where,
                expected="one that makes spaces visible, and nothing else",
            )
        _scores(content, where)
        return _SENTENCE_PIECE
    normalizer, problem = (content.get("normalizer") or {}).get("type"), None
    if model.get("type") != "BPE":
        problem = f"The tokenizer's model is {model.get('type')}."
    # Composed characters are the rule in text, and llama.cpp's own converter leaves the step out as well.
    elif normalizer not in (None, "NFC"):
        problem = f"The tokenizer changes its text first ({normalizer}), which llama.cpp does not."
    elif not model.get("merges"):
        problem = "The tokenizer has no merges, and llama.cpp opens no BPE vocabulary without any."
    if problem is not None:
        raise ModelError(problem, where=where, expected=_EXPECTED)
    return split_rule(content, where)


def split_rule(content: dict[str, Any], place: str) -> str:
    """Return llama.cpp's name for the splitting rule of a `tokenizer.json`; raise `ModelError` for another rule."""
    steps = _steps(content.get("pre_tokenizer"))
    kinds = [step.get("type") for step in steps]
    last = steps[-1] if steps else {}
    # All byte-level rules end with the conversion to bytes.
    if kinds and kinds[-1] == "ByteLevel" and not last.get("add_prefix_space"):
        splits_words = last.get("use_regex", True)
        if kinds == ["ByteLevel"] and splits_words:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and splits_words:
            return "smollm"
        if set(kinds[:-1]) == {"Split"} and not splits_words:
            patterns = tuple((step.get("pattern") or {}).get("Regex", "") for step in steps[:-1])
            if patterns in SPLITS:
                return SPLITS[patterns]
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


def _normal_steps(content: dict[str, Any]) -> list[dict[str, Any]]:
    normalizer = content.get("normalizer") or {}
    steps: list[dict[str, Any]] = normalizer.get("normalizers", [normalizer] if normalizer else [])
    return steps


def _shows_spaces(step: dict[str, Any]) -> bool:
    kind, of_space = step.get("type"), step.get("pattern") == {"String": " "}
    if kind == "Metaspace":
        return step.get("replacement") == _SPACE and not step.get("split", True)
    return (
        (kind == "Prepend" and step.get("prepend") == _SPACE)
        or (kind == "Replace" and of_space and step.get("content") == _SPACE)
        or (kind == "Split" and of_space)
    )


def _scores(content: dict[str, Any], place: str) -> dict[str, float]:
    """Return a score per token, which is higher for earlier merges; single characters and unmerged tokens have 0.

    Added tokens are matched before anything is merged, so they need no score. Raises `ModelError` if merges of one
    token
    are separated by merges of others, because scores cannot express that.
    """
    scores: dict[str, float] = {}
    added, last = {token["content"] for token in content.get("added_tokens") or ()}, None
    for merge in content["model"].get("merges") or ():
        token = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        if token in added:
            continue
        if token != last and token in scores:
            raise ModelError(
                f"The tokenizer merges {token!r} at several places, which token scores cannot express.",
                where=place,
                expected="merges that follow from scores, as SentencePiece's do",
            )
        scores.setdefault(token, -float(len(scores) + 1))
        last = token
    return scores


def _vocabulary(content: dict[str, Any], rows: int, place: str) -> tuple[list[str], list[int]]:
    from gguf import TokenType

    # Rows without a token are marked as unused.
    tokens = [f"[PAD{row}]" for row in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    letters = {content["model"].get("unk_token"): TokenType.UNKNOWN} if content["model"].get("byte_fallback") else {}
    letters |= {f"<0x{byte:02X}>": TokenType.BYTE for byte in range(256)} if letters else {}
    entries = [(token, row, letters.get(token, TokenType.NORMAL)) for token, row in content["model"]["vocab"].items()]
    for added in content.get("added_tokens") or ():
        kind = TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED
        kind = letters.get(added["content"], kind)
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
