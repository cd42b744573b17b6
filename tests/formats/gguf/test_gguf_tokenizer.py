"""The tokenizer in a GGUF file, as llama.cpp itself reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mergeable import TEXTS, save_mergeable_llama, train_sentence_piece, train_tokenizer
from quantized import tiny_tokenizer

from compress.formats.gguf.export import write_gguf
from compress.formats.gguf.llama_cpp_library import LlamaModel
from compress.formats.gguf.tokenizer import SPLITS, check_tokenizer, split_rule
from compress.utils.errors import ModelError

OTHERS = (
    "",
    " ",
    "cat",
    "  cat\n\n  mat",
    "CAT'S they'LL 1234567 1 23",
    "\tx\r\n\r\ny",
    "naïve 東京 ΩΩ 🙂",
    "<mark>cat<mark>",
)

SCATTERED = {
    "pre_tokenizer": None,
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    "model": {"type": "BPE", "byte_fallback": True, "merges": [["a", "b"], ["ab", "c"], ["b", "c"], ["a", "bc"]]},
}


@pytest.mark.parametrize("rule", ["gpt-2", "smollm", *SPLITS.values()])
def test_llama_cpp_finds_the_same_tokens(rule: str, tmp_path: Path) -> None:
    source = save_mergeable_llama(tmp_path / "source", rule=rule)
    write_gguf(source, tmp_path / "tiny.gguf")
    tokenizer, model = train_tokenizer(rule), LlamaModel(tmp_path / "tiny.gguf")
    assert split_rule(json.loads((source.folder / "tokenizer.json").read_text()), "") == rule
    for text in (*TEXTS, *OTHERS):
        assert model.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text


@pytest.mark.parametrize("prefix", [True, False])
def test_llama_cpp_finds_the_same_tokens_of_a_sentence_piece_like_one(prefix: bool, tmp_path: Path) -> None:
    source = save_mergeable_llama(tmp_path / "source")
    tokenizer = train_sentence_piece(prefix)
    tokenizer.save_pretrained(source.folder)
    write_gguf(source, tmp_path / "tiny.gguf")
    model = LlamaModel(tmp_path / "tiny.gguf")
    for text in (*TEXTS, *OTHERS[2:-1]):
        assert model.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text


def test_an_added_token_may_be_merged_at_several_places(tmp_path: Path) -> None:
    content = SCATTERED | {"added_tokens": [{"content": "abc", "id": 3}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert check_tokenizer(tmp_path) == "default"


def test_names_of_special_tokens_are_read_as_such_on_demand(tmp_path: Path) -> None:
    write_gguf(save_mergeable_llama(tmp_path / "source"), tmp_path / "tiny.gguf")
    assert LlamaModel(tmp_path / "tiny.gguf").tokenize("<s></s>", special=True) == [1, 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, r"splits text as this tokenizer does \(Whitespace\)"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "splits text as this"),
        ({"pre_tokenizer": None}, r"\(none\)"),
        ({"normalizer": {"type": "Lowercase"}}, r"changes its text first \(Lowercase\)"),
        ({"model": {"type": "WordPiece"}}, "model is WordPiece"),
        ({"model": {"type": "BPE", "byte_fallback": True}}, "SentencePiece-like tokenizer does"),
        (SCATTERED, r"merges 'abc' at several places"),
        ({"added_tokens": [{"id": 4000, "content": "<far>"}]}, "'<far>' has the id 4000"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    source = save_mergeable_llama(tmp_path / "source")
    path = source.folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=words) as caught:
        write_gguf(source, tmp_path / "tiny.gguf")
    assert caught.value.where == str(path)


def test_a_vocabulary_without_merges_is_refused(tmp_path: Path) -> None:
    source = save_mergeable_llama(tmp_path / "source")
    tiny_tokenizer().save_pretrained(source.folder)
    with pytest.raises(ModelError, match="no merges"):
        write_gguf(source, tmp_path / "tiny.gguf")
