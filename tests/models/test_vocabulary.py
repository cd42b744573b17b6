"""Tests of trimmed vocabularies: equal tokens and logits for kept text, valid tokens for other text, smaller tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from compress.models.model import TorchModel
from compress.models.vocabulary import trim, trim_positions
from compress.tasks.registry import TASKS
from compress.utils.errors import StageError

MAKERS = (
    tiny.word_piece,
    tiny.trained_word_piece,
    tiny.byte_level,
    tiny.roberta,
    tiny.byte_fallback,
    tiny.unigram,
    tiny.xlm_roberta,
)
KEPT = ["great film", "the plot was boring", "boring boring", "the film was great"]
OTHER = ["superb cast", "a clumsy scene and dreadful music", "lovely"]
UNSEEN = "Zebra qué 漢字 🙂 3.14!"


@pytest.fixture(params=MAKERS, ids=lambda maker: maker.__name__)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> TorchModel:
    """Return a tiny encoder whose tokenizer was saved and reloaded, like a real one."""
    request.param().save_pretrained(tmp_path / "tokenizer")
    return tiny.encoder(processor=AutoTokenizer.from_pretrained(tmp_path / "tokenizer"))


def ids_of(processor: Any, texts: list[str]) -> set[int]:
    return {index for ids in processor(texts).input_ids for index in ids}


def tokens_of(processor: Any, texts: list[str]) -> list[list[str]]:
    """Return the tokens of each text, including special tokens."""
    return [processor.convert_ids_to_tokens(ids) for ids in processor(texts).input_ids]


def test_kept_text_is_tokenized_as_before(model: TorchModel):
    original, size = tokens_of(model.processor, KEPT), len(model.processor)
    trim(model, ids_of(model.processor, KEPT))
    assert tokens_of(model.processor, KEPT) == original
    assert any(len(token) > 3 for tokens in original for token in tokens[1:-1])
    assert len(model.processor) < size - 10


def test_ids_are_contiguous_and_rows_follow_their_tokens(model: TorchModel):
    old_ids = model.processor.get_vocab()
    table = model.module.get_input_embeddings().weight.detach().clone()
    kept_ids = trim(model, ids_of(model.processor, KEPT))
    vocabulary = model.processor.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(kept_ids))) and model.module.config.vocab_size == len(kept_ids)
    new_table = model.module.get_input_embeddings()
    assert new_table.weight.shape == (len(kept_ids), tiny.WIDTH) and new_table.num_embeddings == len(kept_ids)
    for token, index in vocabulary.items():
        assert torch.equal(new_table.weight[index], table[old_ids[token]]), token


def test_special_tokens_and_padding_keep_their_meaning(model: TorchModel):
    original = dict(model.processor.special_tokens_map)
    encoded = model.processor(KEPT, padding=True)
    expected = [model.processor.convert_ids_to_tokens(ids) for ids in encoded.input_ids]
    trim(model, ids_of(model.processor, KEPT))
    assert dict(model.processor.special_tokens_map) == original
    again = model.processor(KEPT, padding=True)
    assert [model.processor.convert_ids_to_tokens(ids) for ids in again.input_ids] == expected
    assert again.attention_mask == encoded.attention_mask
    pad = model.processor.pad_token_id
    assert model.module.config.pad_token_id == pad == model.processor.get_vocab()[original["pad_token"]]
    assert model.module.get_input_embeddings().padding_idx == pad
    assert model.processor.is_fast and model.processor.model_max_length == tiny.POSITIONS


def test_logits_of_kept_text_are_unchanged(model: TorchModel):
    original = tiny.logits(model, KEPT)
    trim(model, ids_of(model.processor, KEPT))
    torch.testing.assert_close(tiny.logits(model, KEPT), original, rtol=0, atol=0)
    assert original.std(dim=0).min() > 1e-3


def test_a_trimmed_model_saves_and_loads(model: TorchModel, tmp_path: Path):
    trim(model, ids_of(model.processor, KEPT))
    texts = [*KEPT, *OTHER, UNSEEN]
    expected, tokens = tiny.logits(model, texts), tokens_of(model.processor, texts)
    model.save(tmp_path)
    processor = AutoTokenizer.from_pretrained(tmp_path)
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert tokens_of(processor, texts) == tokens and len(processor) == loaded.config.vocab_size
    torch.testing.assert_close(tiny.logits(TorchModel(loaded, processor), texts), expected, rtol=0, atol=0)
    assert processor.special_tokens_map == model.processor.special_tokens_map


def test_a_second_trim_works_on_the_first(model: TorchModel):
    trim(model, ids_of(model.processor, [*KEPT, *OTHER]))
    tokens, expected = tokens_of(model.processor, KEPT), tiny.logits(model, KEPT)
    kept_ids = trim(model, ids_of(model.processor, KEPT))
    assert len(kept_ids) == len(model.processor) and tokens_of(model.processor, KEPT) == tokens
    torch.testing.assert_close(tiny.logits(model, KEPT), expected, rtol=0, atol=0)


@pytest.mark.parametrize("maker", [tiny.byte_level, tiny.byte_fallback])
@pytest.mark.parametrize("all_characters", [True, False])
def test_unseen_text_round_trips_through_bytes(maker: Callable[[], Any], all_characters: bool):
    model = tiny.encoder(processor=maker())
    trim(model, ids_of(model.processor, KEPT), all_characters)
    for text in (UNSEEN, *OTHER):
        ids = model.processor(text).input_ids
        assert model.processor.unk_token_id not in ids
        assert model.processor.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("all_characters", [True, False])
def test_only_unseen_characters_become_unknown_in_word_piece(all_characters: bool):
    model = tiny.encoder(processor=tiny.word_piece())
    assert model.processor.tokenize("ß") == ["ß"]
    trim(model, ids_of(model.processor, KEPT), all_characters)
    # ß is a character of the vocabulary that the kept text lacks; 漢 never was one.
    assert model.processor.tokenize("ß") == (["ß"] if all_characters else ["[UNK]"])
    assert model.processor.tokenize("漢") == ["[UNK]"]
    assert "[UNK]" not in model.processor.tokenize(" ".join(OTHER))
    spelled = "".join(piece.removeprefix("##") for piece in model.processor.tokenize("dreadful"))
    assert spelled == "dreadful"


def test_only_unseen_characters_become_unknown_in_unigram():
    for all_characters, unknown in ((True, False), (False, True)):
        model = tiny.encoder(processor=tiny.unigram())
        trim(model, ids_of(model.processor, KEPT), all_characters)
        assert (model.processor.unk_token_id in model.processor("é").input_ids) is unknown
        assert model.processor.unk_token_id not in model.processor("dreadful music").input_ids
        assert model.processor.unk_token_id in model.processor("漢").input_ids


def test_merge_part_listed_after_its_whole_is_kept():
    # Merges that were converted from SentencePiece are sorted by the whole's score, so a whole may precede a part:
    # "abcd" can be made of "a" and "bcd" although "bcd", made of "bc" and "d", comes after it in the list.
    letters = ["<unk>", "a", "b", "c", "d", "x"]
    vocabulary = {token: index for index, token in enumerate([*letters, "bc", "abcd", "bcd", "xx"])}
    merges = [("x", "x"), ("a", "bcd"), ("b", "c"), ("bc", "d")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    processor = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>")
    assert processor.tokenize("abcd") == ["abcd"]
    model = tiny.encoder(processor=processor)
    trim(model, ids_of(processor, ["abcd"]))
    assert model.processor.tokenize("abcd") == ["abcd"]
    assert "xx" not in model.processor.get_vocab()


def test_a_word_level_tokenizer_is_refused():
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "film": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    processor = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[UNK]")
    with pytest.raises(StageError, match="'WordLevel' cannot be trimmed"):
        trim(tiny.encoder(processor=processor), {1})


def with_special_tokens_last(processor: Any, post_processor: Callable[[int, int], Any]) -> PreTrainedTokenizerFast:
    """Return the same tokenizer with reversed ids, so that trimming moves those of [CLS] and [SEP]."""
    definition = json.loads(processor.backend_tokenizer.to_str())
    last = len(processor) - 1
    definition["model"]["vocab"] = {token: last - index for token, index in definition["model"]["vocab"].items()}
    for token in definition["added_tokens"]:
        token["id"] = last - token["id"]
    definition["added_tokens"].sort(key=lambda token: token["id"])
    definition["post_processor"] = None
    backend = Tokenizer.from_str(json.dumps(definition))
    backend.post_processor = post_processor(backend.token_to_id("[CLS]"), backend.token_to_id("[SEP]"))
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "pad", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def template(cls: int, sep: int) -> processors.TemplateProcessing:
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
    return processors.TemplateProcessing("[CLS] $A [SEP]", pair, [("[CLS]", cls), ("[SEP]", sep)])


@pytest.mark.parametrize(
    "post_processor",
    [
        lambda cls, sep: processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls)),
        template,
        lambda cls, sep: processors.Sequence([processors.ByteLevel(trim_offsets=False), template(cls, sep)]),
    ],
    ids=["bert", "template", "sequence"],
)
def test_post_processors_use_the_new_ids(post_processor: Callable[[int, int], Any], tmp_path: Path):
    model = tiny.encoder(processor=with_special_tokens_last(tiny.word_piece(), post_processor))
    original, old = tokens_of(model.processor, KEPT), model.processor.convert_tokens_to_ids("[SEP]")
    assert original[0] == ["[CLS]", "great", "film", "[SEP]"]
    trim(model, ids_of(model.processor, KEPT))
    assert tokens_of(model.processor, KEPT) == original
    assert model.processor.convert_tokens_to_ids("[SEP]") < old
    assert model.module.config.pad_token_id == model.processor.pad_token_id < old
    assert model.module.get_input_embeddings().padding_idx == model.processor.pad_token_id
    model.processor.save_pretrained(tmp_path)
    assert tokens_of(AutoTokenizer.from_pretrained(tmp_path), KEPT) == original


def test_padding_and_truncation_of_earlier_calls_are_not_saved(tmp_path: Path):
    processor = with_special_tokens_last(tiny.word_piece(), template)
    processor(KEPT, padding=True, truncation=True, max_length=5)
    assert processor.backend_tokenizer.padding and processor.backend_tokenizer.truncation
    model = tiny.encoder(processor=processor)
    trim(model, range(len(processor)))
    model.processor.save_pretrained(tmp_path)
    saved = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert saved.padding is None and saved.truncation is None
    assert "max_length" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def language_model(name: str) -> TorchModel:
    processor = tiny.word_piece() if name == "bert" else tiny.byte_level()
    torch.manual_seed(0)
    shared = {"vocab_size": len(processor), "pad_token_id": processor.pad_token_id, "tie_word_embeddings": True}
    if name == "gpt2":
        ends = {"bos_token_id": processor.bos_token_id, "eos_token_id": processor.eos_token_id}
        module: Any = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=40, **ends, **shared))
    elif name == "llama":
        sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
        module = LlamaForCausalLM(LlamaConfig(hidden_size=32, **sizes, **shared))
    else:
        sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
        module = BertForMaskedLM(BertConfig(hidden_size=32, max_position_embeddings=40, **sizes, **shared))
    if name == "bert":
        torch.nn.init.normal_(module.cls.predictions.bias)
    return TorchModel(module.eval(), processor)


@pytest.mark.parametrize(
    ("name", "auto"), [("gpt2", AutoModelForCausalLM), ("llama", AutoModelForCausalLM), ("bert", AutoModelForMaskedLM)]
)
def test_tied_output_embeddings_stay_tied_and_shrink(name: str, auto: Any, tmp_path: Path):
    model = language_model(name)
    original, parameters = tiny.logits(model, KEPT), model.parameters()
    height = model.module.config.vocab_size
    kept_ids = trim(model, ids_of(model.processor, KEPT))
    head = model.module.get_output_embeddings()
    assert head.weight is model.module.get_input_embeddings().weight and head.out_features == len(kept_ids) < height
    biases = 1 if name == "bert" else 0
    assert parameters - model.parameters() == (height - len(kept_ids)) * (32 + biases)
    torch.testing.assert_close(tiny.logits(model, KEPT), original[..., kept_ids])
    model.save(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    again = TorchModel(loaded, AutoTokenizer.from_pretrained(tmp_path))
    torch.testing.assert_close(tiny.logits(again, KEPT), original[..., kept_ids])


def test_untied_output_embedding_shrinks_too(tmp_path: Path):
    processor = tiny.byte_level()
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    module = LlamaForCausalLM(LlamaConfig(vocab_size=len(processor), tie_word_embeddings=False, **sizes)).eval()
    model = TorchModel(module, processor)
    original = tiny.logits(model, KEPT)
    kept_ids = trim(model, ids_of(processor, KEPT))
    assert module.lm_head.weight is not module.model.embed_tokens.weight
    torch.testing.assert_close(tiny.logits(model, KEPT), original[..., kept_ids])
    model.save(tmp_path)
    again = TorchModel(AutoModelForCausalLM.from_pretrained(tmp_path), model.processor)
    torch.testing.assert_close(tiny.logits(again, KEPT), original[..., kept_ids])


def test_ids_in_the_generation_config_are_remapped():
    model = language_model("gpt2")
    processor = model.processor
    # Ids in reverse order: the last ones are lowered when others are removed.
    model.module.generation_config.eos_token_id = processor.convert_tokens_to_ids("Ġfilm")
    trim(model, ids_of(processor, KEPT))
    assert model.module.generation_config.eos_token_id == model.processor.convert_tokens_to_ids("Ġfilm")
    assert model.module.config.eos_token_id == model.processor.eos_token_id


@pytest.mark.parametrize(("architecture", "rows"), [("bert", 12), ("distilbert", 12), ("electra", 12), ("roberta", 14)])
def test_positions_are_truncated_to_the_length(architecture: str, rows: int, tmp_path: Path):
    # RoBERTa counts positions from the padding id plus one, which is 2: it needs two more rows.
    model = tiny.encoder(architecture, processor=tiny.byte_level() if architecture == "roberta" else tiny.word_piece())
    texts = [text for text in tiny.texts(200) if len(model.processor(text).input_ids) <= 12]
    assert max(len(model.processor(text).input_ids) for text in texts) == 12
    original = tiny.logits(model, texts)
    trim_positions(model, 12)
    table = next(part for name, part in model.module.named_modules() if name.endswith("position_embeddings"))
    assert table.weight.shape == (rows, tiny.WIDTH if architecture != "electra" else tiny.WIDTH // 2)
    assert model.module.config.max_position_embeddings == rows and model.processor.model_max_length == 12
    torch.testing.assert_close(tiny.logits(model, texts), original, rtol=0, atol=0)
    model.save(tmp_path)
    loaded = TorchModel.load(tmp_path, TASKS[tiny.TASK])
    assert loaded.processor.model_max_length == 12
    torch.testing.assert_close(tiny.logits(loaded, texts), original, rtol=0, atol=0)


def test_length_beyond_existing_positions_changes_nothing():
    model = tiny.encoder()
    original = model.module.config.max_position_embeddings
    trim_positions(model, original + 1)
    assert model.module.config.max_position_embeddings == original == tiny.POSITIONS


def test_word_final_characters_are_kept():
    # CLIP marks the end of a word in its last token, so that each letter occurs twice in its vocabulary.
    letters = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary = {token: index for index, token in enumerate(["<unk>", *letters, "film</w>", "fi", "lm</w>"])}
    merges = [("f", "i"), ("l", "m</w>"), ("fi", "lm</w>")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    processor = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>")
    model = tiny.encoder(processor=processor)
    trim(model, ids_of(processor, ["film"]), all_characters=False)
    assert model.processor.tokenize("film plot") == ["film</w>", "p", "l", "o", "t</w>"]
