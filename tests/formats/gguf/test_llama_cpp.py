"""Tests of llama.cpp as a runtime: logits, tokens and tokenization are compared with transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mergeable import LLAMA3_ROPE, ROWS, TEXTS, save_mergeable_llama, save_qwen, train_sentence_piece, train_tokenizer
from quantized import tiny_tokenizer
from transformers import AutoModelForCausalLM
from written_decoders import check_refused_batches, greedy_tokens, tokens_of_transformers

from compress.formats.gguf import llama_cpp_library
from compress.formats.gguf.export import GgufTypes, write_gguf
from compress.formats.gguf.llama_cpp_library import LlamaModel
from compress.formats.gguf.runtime import LlamaCppSession
from compress.formats.gguf.tokenizer import SPLITS, check_tokenizer, split_rule
from compress.formats.runtime import get_runtime, why_unavailable
from compress.formats.targets import TARGETS
from compress.models.checkpoint import Checkpoint
from compress.utils.errors import InputError, MissingExtraError, ModelError

TARGET = TARGETS["llama-cpp"]


def session(checkpoint: Checkpoint, folder: Path, threads: int = 1) -> LlamaCppSession:
    write_gguf(checkpoint, folder / "tiny.gguf", GgufTypes("f32"))
    opened = get_runtime("llama-cpp").open(folder / "tiny.gguf", TARGET, threads)
    assert isinstance(opened, LlamaCppSession)
    return opened


def ids(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, ROWS, (rows, length))


def torch_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    with torch.no_grad():
        logits: np.ndarray = model(torch.from_numpy(tokens)).logits.numpy()
    return logits


def test_float_logits_at_every_position_match_transformers(tmp_path: Path) -> None:
    sources = [save_mergeable_llama(tmp_path / "source")]
    sources += [save_qwen(tmp_path / kind, kind, head_size=32) for kind in ("qwen2", "qwen3")]
    sources.append(save_mergeable_llama(tmp_path / "llama", rule="llama-bpe", rope_parameters=LLAMA3_ROPE, head_dim=32))
    tokens = ids(2, 100)
    for source in sources:
        opened, expected = session(source, tmp_path), torch_logits(source.folder, tokens)
        logits = opened.predict({"input_ids": tokens, "attention_mask": np.ones_like(tokens)})["logits"]
        assert logits.shape == (2, 100, ROWS) and logits.dtype == np.float32
        # llama.cpp keeps keys and values in float16.
        bound = 5e-3 if source is sources[0] else 1e-2
        assert np.abs(logits - expected).max() < bound * expected.std(), source.folder.name


def test_greedy_tokens_match_transformers_after_context_grows(tmp_path: Path) -> None:
    source = save_mergeable_llama(tmp_path / "source", max_position_embeddings=1024)
    decoder = session(source, tmp_path).decoder()
    prompt = ids(1, 500)[0].tolist()
    model = AutoModelForCausalLM.from_pretrained(source.folder).float().eval()
    for start in (prompt[:7], prompt):
        assert greedy_tokens(decoder, start, 24) == tokens_of_transformers(model, start, 24)
    assert decoder.cached and decoder.vocabulary == ROWS


def test_rows_are_independent_and_invalid_batches_are_refused(tmp_path: Path) -> None:
    opened = session(save_mergeable_llama(tmp_path / "source"), tmp_path)
    tokens = ids(2, 40)
    alone = opened.predict({"input_ids": tokens[1:]})["logits"]
    assert np.array_equal(opened.predict({"input_ids": tokens})["logits"][1:], alone)
    check_refused_batches(opened, ROWS)
    with pytest.raises(InputError, match="0 threads"):
        get_runtime("llama-cpp").open(tmp_path / "tiny.gguf", TARGET, 0)


def test_files_that_are_no_gguf_model_are_refused(tmp_path: Path) -> None:
    runtime = get_runtime("llama-cpp")
    with pytest.raises(ModelError, match="does not exist"):
        runtime.open(tmp_path / "none", TARGET, 1)
    with pytest.raises(ModelError, match=r"holds 0 \.gguf files"):
        runtime.open(tmp_path, TARGET, 1)
    assert session(save_mergeable_llama(tmp_path / "source"), tmp_path).settings["intra_op_threads"] == 1
    whole = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:-100])
    with pytest.raises(ModelError, match="truncated"):
        runtime.open(tmp_path / "cut.gguf", TARGET, 1)
    (tmp_path / "odd.gguf").write_bytes(whole.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_op.weight"))
    with pytest.raises(ModelError, match=r"llama.cpp cannot open the model: .*ffn_up"):
        runtime.open(tmp_path / "odd.gguf", TARGET, 1)


def test_target_is_unavailable_without_a_matching_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_unavailable(TARGET) is None
    write_gguf(save_mergeable_llama(tmp_path / "source"), tmp_path / "tiny.gguf")
    monkeypatch.setattr(llama_cpp_library, "VERSION", "1.0")
    llama_cpp_library.library.cache_clear()
    assert "is installed, whose C interface" in str(why_unavailable(TARGET))
    monkeypatch.setattr(llama_cpp_library, "PACKAGE", "no-such-package")
    assert "pip install 'compress-models[llama-cpp]'" in str(why_unavailable(TARGET))
    with pytest.raises(MissingExtraError, match="llama-cpp"):
        get_runtime("llama-cpp").open(tmp_path / "tiny.gguf", TARGET, 1)


def test_external_library_is_reported_as_another_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import xllamacpp

    runtime = get_runtime("llama-cpp")
    packaged = runtime.build()
    own_library = tmp_path / "libllama.so"
    own_library.symlink_to(xllamacpp.xllamacpp.__file__)
    monkeypatch.setenv(llama_cpp_library.VARIABLE, str(own_library))
    llama_cpp_library.library.cache_clear()
    try:
        opened = session(save_mergeable_llama(tmp_path / "source"), tmp_path)
        assert opened.settings["runtime"] == "llama.cpp in libllama.so"
        assert opened.predict({"input_ids": ids(1, 4)})["logits"].shape == (1, 4, ROWS)
        alone = runtime.build()
        (tmp_path / "libggml-cpu-some.so").write_bytes(b"a backend")
        assert len({packaged, alone, runtime.build()}) == 3
        for name, words in (("none.so", "names .*none.so, which is no file"), ("text.so", None)):
            (tmp_path / "text.so").write_text("no library")
            monkeypatch.setenv(llama_cpp_library.VARIABLE, str(tmp_path / name))
            llama_cpp_library.library.cache_clear()
            if words is not None:
                assert re.search(words, str(why_unavailable(TARGET)))
            with pytest.raises(InputError, match=r"COMPRESS_LLAMA_CPP names no llama\.cpp"):
                runtime.open(tmp_path / "tiny.gguf", TARGET, 1)
    finally:
        llama_cpp_library.library.cache_clear()


OTHERS = ("", " ", "cat", "  cat\n\n  mat", "CAT'S they'LL 1234567 1 23", "\tx\r\n\r\ny", "naïve 東京 ΩΩ 🙂",
    "<mark>cat<mark>")  # fmt: skip
SCATTERED = {
    "pre_tokenizer": None,
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    "model": {"type": "BPE", "byte_fallback": True, "merges": [["a", "b"], ["ab", "c"], ["b", "c"], ["a", "bc"]]},
}


@pytest.mark.parametrize("rule", ["gpt-2", "smollm", *SPLITS.values()])
def test_llama_cpp_tokenizes_identically(rule: str, tmp_path: Path) -> None:
    source = save_mergeable_llama(tmp_path / "source", rule=rule)
    write_gguf(source, tmp_path / "tiny.gguf")
    tokenizer, model = train_tokenizer(rule), LlamaModel(tmp_path / "tiny.gguf")
    assert split_rule(json.loads((source.folder / "tokenizer.json").read_text()), "") == rule
    for text in (*TEXTS, *OTHERS):
        assert model.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text
    assert model.tokenize("<s></s>", special=True) == [1, 2]


@pytest.mark.parametrize("prefix", [True, False])
def test_llama_cpp_tokenizes_sentencepiece_style_bpe_identically(prefix: bool, tmp_path: Path) -> None:
    source = save_mergeable_llama(tmp_path / "source")
    tokenizer = train_sentence_piece(prefix)
    tokenizer.save_pretrained(source.folder)
    write_gguf(source, tmp_path / "tiny.gguf")
    model = LlamaModel(tmp_path / "tiny.gguf")
    for text in (*TEXTS, *OTHERS[2:-1]):
        assert model.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text


def test_added_token_with_several_possible_merges_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(SCATTERED | {"added_tokens": [{"content": "abc", "id": 3}]}))
    assert check_tokenizer(tmp_path) == "default"


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
def test_tokenizer_unsupported_by_llama_cpp_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    source = save_mergeable_llama(tmp_path / "source")
    path = source.folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=words) as caught:
        write_gguf(source, tmp_path / "tiny.gguf")
    assert caught.value.where == str(path)


def test_a_vocabulary_without_merges_is_refused(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no merges"):
        check_tokenizer(tmp_path)
