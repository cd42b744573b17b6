"""Vocabularies cut in the files of language and speech models, against transformers and llama.cpp."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from mergeable import SPECIAL, TEXTS, save_mergeable_llama, save_qwen, train_sentence_piece, train_tokenizer
from quantized import quantize_tiny_llama
from tiny_whisper import FRAMES, write_tiny_whisper
from tokenizers import Tokenizer, decoders
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from compress.data.dataset import Dataset
from compress.formats.generation.speech_recognition import read_rules
from compress.formats.gguf.export import write_gguf
from compress.formats.gguf.llama_cpp_library import LlamaModel
from compress.models.checkpoint import Checkpoint
from compress.models.checkpoint_vocabulary import template_tokens, trim_checkpoint
from compress.pipeline.integrity import inspector_of
from compress.stages.base import Context
from compress.stages.trim_vocabulary import TrimVocabulary
from compress.tasks.registry import get_task
from compress.tasks.task import Examples
from compress.utils.errors import ModelError, StageError
from compress.utils.progress import SilentProgress

KEPT = [TEXTS[0], "In 1984 there were cats"]
OTHERS = ("", " ", "cat", "  cat\n\n  mat", "CAT'S they'LL 1234567 1 23", "naïve 東京 ΩΩ 🙂", "<mark>cat<mark>", *TEXTS)
KINDS = ("byte level", "sentence piece", "untied")


def save(folder: Path, kind: str) -> tuple[Checkpoint, Any]:
    """A decoder and its tokenizer; the table has some rows without a token."""
    if kind == "untied":
        return save_qwen(folder, "qwen2"), AutoTokenizer.from_pretrained(folder)
    checkpoint = save_mergeable_llama(folder)
    if kind == "sentence piece":
        tokenizer = train_sentence_piece()
        shown = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.backend_tokenizer.decoder = decoders.Sequence(shown)
        tokenizer.save_pretrained(folder)
    return checkpoint, AutoTokenizer.from_pretrained(folder)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    result: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return result


def pieces(tokenizer: Any, text: str) -> list[str]:
    result: list[str] = tokenizer.convert_ids_to_tokens(ids_of(tokenizer, text))
    return result


def counted(tokenizer: Any, texts: list[str]) -> Counter[int]:
    return Counter(token for text in texts for token in ids_of(tokenizer, text))


@torch.inference_mode()
def logits(folder: Path, ids: list[int]) -> torch.Tensor:
    result: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder).eval()(torch.tensor([ids])).logits
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_kept_text_has_the_same_pieces_and_logits_and_any_text_comes_back(kind: str, tmp_path: Path) -> None:
    source, original_tokenizer = save(tmp_path / "source", kind)
    seen = kind == "sentence piece"
    counts = counted(original_tokenizer, KEPT)
    trimmed, height, rows = trim_checkpoint(
        source, original_tokenizer, tmp_path / "trimmed", counts, all_characters=not seen
    )
    after = AutoTokenizer.from_pretrained(trimmed.folder)
    assert rows == len(after) == trimmed.config["vocab_size"] < len(original_tokenizer) - 12 < height
    for text in KEPT:
        assert pieces(after, text) == pieces(original_tokenizer, text)
        old = [original_tokenizer.convert_tokens_to_ids(token) for token in after.convert_ids_to_tokens(range(rows))]
        expected = logits(source.folder, ids_of(original_tokenizer, text))[..., old]
        torch.testing.assert_close(logits(trimmed.folder, ids_of(after, text)), expected, rtol=0, atol=1e-5)
    for text in OTHERS:
        assert after.decode(ids_of(after, text)) == original_tokenizer.decode(ids_of(original_tokenizer, text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_splits_as_the_trimmed_tokenizer_does(kind: str, tmp_path: Path) -> None:
    source, original_tokenizer = save(tmp_path / "source", kind)
    seen = kind == "sentence piece"
    trimmed, _, _ = trim_checkpoint(
        source, original_tokenizer, tmp_path / "trimmed", counted(original_tokenizer, KEPT), all_characters=not seen
    )
    write_gguf(trimmed, tmp_path / "tiny.gguf")
    model, after = LlamaModel(tmp_path / "tiny.gguf"), AutoTokenizer.from_pretrained(trimmed.folder)
    for text in (*KEPT, *OTHERS[2:]):
        assert model.tokenize(text) == ids_of(after, text), text
    assert any(pieces(after, text) != pieces(original_tokenizer, text) for text in OTHERS)


def test_as_many_are_kept_as_asked_for_the_frequent_first(tmp_path: Path) -> None:
    source, original_tokenizer = save(tmp_path / "source", "byte level")
    counts = counted(original_tokenizer, KEPT)
    (twice,) = (ids_of(original_tokenizer, word)[0] for word in (" there",))
    counts[twice] = 2
    _, _, fewest = trim_checkpoint(source, original_tokenizer, tmp_path / "a", counts, min_count=3)
    trimmed, _, rows = trim_checkpoint(source, original_tokenizer, tmp_path / "b", counts, min_count=3, multiple_of=32)
    assert fewest % 32 and rows == fewest + -fewest % 32
    after = AutoTokenizer.from_pretrained(trimmed.folder)
    assert original_tokenizer.convert_ids_to_tokens(twice) in after.get_vocab()
    assert (
        original_tokenizer.convert_ids_to_tokens(twice) not in AutoTokenizer.from_pretrained(tmp_path / "a").get_vocab()
    )
    # Of a token that was added its parts are there too: each can be reached from text.
    for token in after.get_vocab():
        text = after.convert_tokens_to_string([token])
        if token not in SPECIAL and "�" not in text:
            assert ids_of(after, text) == [after.convert_tokens_to_ids(token)], token


def test_ids_in_configs_follow_their_tokens(tmp_path: Path) -> None:
    source, original_tokenizer = save(tmp_path / "source", "byte level")
    names = {
        name: original_tokenizer.convert_tokens_to_ids(name) for name in ("<mark>", "Ġthe", "Ġcat", "Ġsay", "Ġthey")
    }
    gone, other_id = names["Ġthey"], names["Ġthe"]
    generation_config = {
        "eos_token_id": [2, names["<mark>"]],
        "pad_token_id": names["Ġsay"],
        "suppress_tokens": [names["Ġcat"], gone, -1],
        "bad_words_ids": [[other_id, gone], [other_id, names["Ġcat"]]],
        "forced_decoder_ids": [[1, names["<mark>"]], [2, None]],
        "task_to_id": {"mark": names["<mark>"]},
        "max_length": other_id,
    }
    (source.folder / "generation_config.json").write_text(json.dumps(generation_config))
    config = json.loads((source.folder / "config.json").read_text())
    nested = {"inner": {"image_token_index": names["Ġsay"], "vocab_size": config["vocab_size"], "pad_token_id": None}}
    (source.folder / "config.json").write_text(json.dumps({**config, **nested}))
    source = Checkpoint(source.folder)
    trimmed, _, rows = trim_checkpoint(
        source, original_tokenizer, tmp_path / "trimmed", counted(original_tokenizer, [TEXTS[0]])
    )
    after = AutoTokenizer.from_pretrained(trimmed.folder)
    new = {name: after.get_vocab().get(name) for name in names}
    assert new["Ġthey"] is None and None not in (new["<mark>"], new["Ġsay"], new["Ġthe"])
    assert json.loads((trimmed.folder / "generation_config.json").read_text()) == {
        "eos_token_id": [2, new["<mark>"]],
        "pad_token_id": new["Ġsay"],
        "suppress_tokens": [new["Ġcat"], -1],
        "bad_words_ids": [[new["Ġthe"], new["Ġcat"]]],
        "forced_decoder_ids": [[1, new["<mark>"]], [2, None]],
        "task_to_id": {"mark": new["<mark>"]},
        "max_length": other_id,
    }
    assert trimmed.config["inner"] == {"image_token_index": new["Ġsay"], "vocab_size": rows, "pad_token_id": None}
    about = json.loads((trimmed.folder / "tokenizer_config.json").read_text())
    assert about.get("added_tokens_decoder", {}).keys() <= {
        str(after.convert_tokens_to_ids(t)) for t in (*SPECIAL, "<mark>")
    }
    assert after.tokenize("a<mark>b") == ["a", "<mark>", "b"]


def test_a_chat_is_written_in_the_same_pieces(tmp_path: Path) -> None:
    source, original_tokenizer = save(tmp_path / "source", "byte level")
    original_tokenizer.chat_template = (
        "{% for message in messages %}<s>they'll{{ message['content'] }}</s>{% endfor %}<s> there"
    )
    trimmed, _, _ = trim_checkpoint(
        source, original_tokenizer, tmp_path / "a", Counter(template_tokens(original_tokenizer))
    )
    after = AutoTokenizer.from_pretrained(trimmed.folder)
    text = original_tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert pieces(after, text) == pieces(original_tokenizer, text) and "Ġthere" in pieces(after, text)
    original_tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(StageError, match="chat template fails"):
        template_tokens(original_tokenizer)


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    source, original_tokenizer = save(tmp_path / "source", "byte level")
    quantized = quantize_tiny_llama(source, tmp_path / "quantized")
    with pytest.raises(ModelError, match="quantized already"):
        trim_checkpoint(quantized, original_tokenizer, tmp_path / "trimmed", Counter())
    path = source.folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size_per_layer_input": 352}))
    with pytest.raises(StageError, match="vocab_size_per_layer_input"):
        trim_checkpoint(Checkpoint(source.folder), original_tokenizer, tmp_path / "trimmed", Counter())


TIMES = 12
"""Rows for moments, which no token of a Whisper's tokenizer has."""


def save_whisper(folder: Path) -> int:
    """A Whisper that writes merged pieces, with what starts, ends and times a transcript behind them; the first one."""
    write_tiny_whisper(folder)
    definition = json.loads(train_tokenizer("gpt-2").backend_tokenizer.to_str())
    vocabulary = {token: index - 3 for token, index in definition["model"]["vocab"].items() if index >= 3}
    definition["model"] |= {"vocab": vocabulary, "unk_token": None}
    definition["added_tokens"] = []
    tokenizer, first = Tokenizer.from_str(json.dumps(definition)), len(vocabulary)
    special = [f"<|{name}|>" for name in ("endoftext", "startoftranscript", "en", "transcribe", "notimestamps")]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    module = WhisperForConditionalGeneration.from_pretrained(folder)
    torch.manual_seed(1)
    module.resize_token_embeddings(first + len(special) + TIMES, mean_resizing=False)
    with torch.no_grad():
        module.get_input_embeddings().weight.normal_(0, 0.3)
    ends = dict.fromkeys(("eos_token_id", "pad_token_id", "bos_token_id"), first)
    module.config.update({**ends, "decoder_start_token_id": first + 1})
    module.generation_config = GenerationConfig(
        **ends,
        decoder_start_token_id=first + 1,
        is_multilingual=True,
        lang_to_id={"<|en|>": first + 2},
        task_to_id={"transcribe": first + 3},
        no_timestamps_token_id=first + 4,
        suppress_tokens=[3, 5, first - 1, first + 1],
        begin_suppress_tokens=[7, first],
        max_initial_timestamp_index=5,
        max_length=24,
    )
    module.save_pretrained(folder)
    return first


def spoken(folder: Path, features: torch.Tensor, **options: Any) -> list[list[int]]:
    module = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    result: torch.Tensor = module.generate(features, language="en", task="transcribe", do_sample=False, **options)
    return result.tolist()


def test_a_whisper_says_the_same_with_the_tokens_that_it_says(tmp_path: Path) -> None:
    first = save_whisper(tmp_path / "source")
    features = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (3, 8, FRAMES)).astype(np.float32))
    original_tokenizer = spoken(tmp_path / "source", features)
    timed = spoken(tmp_path / "source", features, return_timestamps=True)
    assert len({tuple(row) for row in original_tokenizer}) == 3 and max(map(max, timed)) > first + 4
    counts = Counter(token for row in (*original_tokenizer, *timed) for token in row)
    tokenizer = WhisperTokenizer.from_pretrained(tmp_path / "source")
    trimmed, height, rows = trim_checkpoint(
        Checkpoint(tmp_path / "source"), tokenizer, tmp_path / "trimmed", counts, whole_tail=True
    )

    after = WhisperTokenizer.from_pretrained(trimmed.folder)
    kept_ids = [tokenizer.convert_tokens_to_ids(after.convert_ids_to_tokens(token)) for token in range(rows - TIMES)]
    kept_ids += range(height - TIMES, height)
    assert rows < height - 10 and kept_ids[-TIMES - 5 :] == list(range(first, height))
    for old, options in ((original_tokenizer, {}), (timed, {"return_timestamps": True})):
        assert [[kept_ids[token] for token in row] for row in spoken(trimmed.folder, features, **options)] == old
    rules, was = read_rules(trimmed.folder), read_rules(tmp_path / "source")
    assert [kept_ids[token] for token in rules.prompt] == list(was.prompt)
    assert {kept_ids[token] for token in rules.never} == set(was.never.tolist()) & set(kept_ids)
    assert {kept_ids[token] for token in rules.not_first} == {7, first}
    heard = Examples(
        [{"input_features": features_of_text} for features_of_text in features.numpy()], {"input_features": None}
    )
    answers = [inspector_of(Checkpoint(tmp_path / name)).logits(lambda _: heard) for name in ("source", "trimmed")]
    np.testing.assert_allclose(answers[1], answers[0][:, kept_ids], atol=1e-5)


def test_the_stage_counts_what_is_said_in_transcripts(tmp_path: Path) -> None:
    first = save_whisper(tmp_path / "source")
    task, texts = get_task("automatic-speech-recognition"), ["they'll the mat", "the cat"]
    data = Dataset(task.columns, {"train": pa.table({"text": texts})}, ())
    scratch = tmp_path / "scratch"
    context = Context(task, data, 24, 0, SilentProgress(), lambda _: pytest.fail(), Path, scratch)
    stage = TrimVocabulary(min_count=2)
    assert stage.preferred_input(task.capabilities) is Checkpoint
    trimmed = stage.run(Checkpoint(tmp_path / "source"), context)
    vocabulary = WhisperTokenizer.from_pretrained(trimmed.folder).get_vocab()
    assert {"Ġthe", "Ġcat", "Ġmat", "Ġthey"} & vocabulary.keys() == {"Ġthe"}
    assert context.notes == [f"trim_vocabulary: {len(vocabulary) + TIMES} of {first + 5 + TIMES} tokens kept"]
