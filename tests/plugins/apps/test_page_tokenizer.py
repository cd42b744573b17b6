"""A tokenizer for pages cuts as the one that it was made of does, and JavaScript's engine as Rust's."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from compress.plugins.apps.tokenizer_fallbacks import for_page, written_out

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2009\u2028\u202f\u205f\u3000\ufeff\u180e\u200b"
ODD = [*SPACES, *"  aZß7½\u09ed\u0663Ⅻ①\U0001d7d8-'\u2019_[]\\", "'s", "👍🏽", "映画"]
STEPS: dict[str, Any] = {
    "digits": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "runs of digits": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "qwen": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}
NODE = """
const [pattern, texts] = JSON.parse(require("fs").readFileSync(0, "utf8"));
console.log(JSON.stringify(texts.map((text) => [...text.matchAll(new RegExp(pattern, "gu"))].map(([found]) => found))));
"""


def texts() -> list[str]:
    chance = random.Random(0)
    return ["".join(chance.choices(ODD, k=chance.randrange(1, 12))) for _ in range(2000)]


@pytest.mark.parametrize("name", STEPS)
def test_pieces_are_the_same(name: str) -> None:
    whole = Tokenizer(models.BPE())
    whole.pre_tokenizer = STEPS[name]
    page_tokenizer = for_page(json.loads(whole.to_str()))
    again = Tokenizer.from_str(json.dumps(page_tokenizer))
    assert again.to_str() != whole.to_str()
    for text in texts():
        pieces = [piece for piece, _ in whole.pre_tokenizer.pre_tokenize_str(text)]
        assert [piece for piece, _ in again.pre_tokenizer.pre_tokenize_str(text)] == pieces


def test_javascript_matches_as_rust_does() -> None:
    if shutil.which("node") is None:
        pytest.skip("no node here")
    plain, expanded = r"\p{N}|\s+(?!\S)|[^\s\p{N}]+|\s+", written_out(r"\p{N}|\s+(?!\S)|[^\s\p{N}]+|\s+")
    rust = pre_tokenizers.Split(Regex(plain), behavior="isolated")
    right = [[piece for piece, _ in rust.pre_tokenize_str(text)] for text in texts()]
    matches = {}
    for pattern in (plain, expanded):
        given = json.dumps([pattern, texts()])
        done = subprocess.run(["node", "-e", NODE], input=given, capture_output=True, text=True, check=True)
        matches[pattern] = json.loads(done.stdout)
    assert matches[expanded] == right
    assert matches[plain] != right, "then nothing need be written out"


def test_only_classes_of_spaces_are_written_out() -> None:
    assert written_out(r"a\\s[\\]\[b]") == r"a\\s[\\]\[b]"
    assert re.sub("\t.*?}", "SPACES", written_out(r"\s[^\s\p{L}]\S[\S]")) == r"[SPACES][^SPACES\p{L}][^SPACES][\S]"
    assert for_page({"pre_tokenizer": None, "model": 1}) == {"pre_tokenizer": None, "model": 1}
    bert = {"pre_tokenizer": {"type": "BertPreTokenizer"}}
    assert for_page(bert) == bert
