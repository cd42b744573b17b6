"""Tiny models, tokenizers and data for each test: a toy sentiment task that a tiny encoder can learn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from stage_context import stage_context
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertTokenizer,
    DistilBertConfig,
    ElectraConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaTokenizer,
    XLMRobertaTokenizer,
)

from compress.data.dataset import Dataset
from compress.models.model import TorchModel
from compress.stages.base import Context
from compress.tasks.registry import TASKS

TASK = "text-classification"
LABELS = ("bad", "good")
GOOD = ("great", "lovely", "superb", "moving", "funny", "clever")
BAD = ("awful", "boring", "clumsy", "dreadful", "stale", "noisy")
NEUTRAL = ("the", "film", "was", "a", "plot", "and", "its", "cast", "music", "scene", "very", "quite")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WIDTH, HEADS, LAYERS, NEURONS, POSITIONS = 32, 4, 2, 48, 40
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
SIZES |= {"intermediate_size": NEURONS, "max_position_embeddings": POSITIONS}


def table(count: int, seed: int = 0, longest: int = 12) -> pa.Table:
    """Return ``count`` rows of text and label.

    Each text has two more words of its label's sentiment than of the other.
    """
    generator = np.random.default_rng(seed)
    texts, labels = [], []
    for row in range(count):
        label = row % 2
        length = int(generator.integers(0, longest - 3))
        words = [*generator.choice(NEUTRAL, length), *generator.choice((BAD, GOOD)[label], 2)]
        if length > 2:
            words[0] = str(generator.choice((GOOD, BAD)[label]))
            words.append(str(generator.choice((BAD, GOOD)[label])))
        texts.append(" ".join(generator.permutation(words)))
        labels.append(LABELS[label])
    return pa.table({"text": texts, "label": labels})


def texts(count: int = 64, seed: int = 0) -> list[str]:
    """Return the texts of `table`."""
    values: list[str] = table(count, seed)["text"].to_pylist()
    return values


def dataset(train: int = 64, validation: int = 0, unlabeled: int = 0) -> Dataset:
    """Return splits of the toy task, drawn with different seeds."""
    tables = {"train": table(train, seed=1), "test": table(32, seed=2)}
    if validation:
        tables["validation"] = table(validation, seed=3)
    more = table(unlabeled, seed=4).select(["text"]) if unlabeled else None
    return Dataset(TASKS[TASK].columns, tables, LABELS, more)


def context(data: Dataset | None = None, max_length: int = 24, **changes: Any) -> Context:
    """Return a stage context; ``changes`` are parameters of `stage_context`."""
    return stage_context(TASK, data or dataset(), max_length, **changes)


def label_maps(labels: Sequence[str]) -> dict[str, Any]:
    """Return the class names as fields of a config."""
    return {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}


def two_sides(width: int, layers: int = 2, hidden: int = 48) -> dict[str, int]:
    """Return the sizes of an encoder and a decoder as fields of a config; every layer has two attention heads."""
    sizes = {"layers": layers, "attention_heads": 2, "ffn_dim": hidden}
    return {"d_model": width} | {f"{side}_{name}": sizes[name] for side in ("encoder", "decoder") for name in sizes}


@torch.no_grad()
def shaken(module: Any, spread: float = 0.2) -> Any:
    """Return the module in eval mode, with noise on all parameters but those of its normalisations."""
    for name, parameter in module.named_parameters():
        if "norm" not in name.lower():
            parameter.add_(torch.randn_like(parameter) * spread)
    return module.eval()


def encoder(architecture: str = "bert", seed: int = 0, processor: Any = None, **changes: Any) -> TorchModel:
    """Return a sequence classifier with random weights large enough for outputs to differ between inputs."""
    processor = word_piece() if processor is None else processor
    shape = dict(SIZES)
    if architecture == "distilbert":
        names = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
        shape = {names.get(name, name): value for name, value in shape.items()}
        shape["hidden_dim"] = shape.pop("intermediate_size")
    if architecture == "electra":
        shape["embedding_size"] = WIDTH // 2
    configs = {"bert": BertConfig, "distilbert": DistilBertConfig, "electra": ElectraConfig, "roberta": RobertaConfig}
    ids = {"vocab_size": len(processor), "pad_token_id": processor.pad_token_id, **label_maps(LABELS)}
    config = configs[architecture](**ids, **{**shape, **changes})
    torch.manual_seed(seed)
    return TorchModel(shaken(AutoModelForSequenceClassification.from_config(config)), processor)


@torch.no_grad()
def logits(model: TorchModel, some_texts: list[str]) -> torch.Tensor:
    """Return the logits [n, classes] of one padded batch."""
    batch = model.processor(some_texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    values: torch.Tensor = model.module.eval()(**batch).logits
    return values


def word_piece() -> BertTokenizer:
    """Return a WordPiece tokenizer like BERT's with a fixed vocabulary, because the trainer breaks ties at random."""
    words = (*GOOD, *BAD, *NEUTRAL)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?ß"
    halves = sorted({f"##{word[3:]}" for word in words if len(word) > 4})
    tokens = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *words, *halves]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return BertTokenizer(vocab=vocabulary, model_max_length=POSITIONS)


def trained_word_piece() -> BertTokenizer:
    """Return a WordPiece tokenizer from the trainer; its vocabulary differs between processes."""
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizers.BertNormalizer(lowercase=True)
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=180, special_tokens=list(SPECIAL), show_progress=False)
    trained.train_from_iterator([*texts(), "zebra quartz ß 3.14"], trainer)
    return BertTokenizer(vocab=trained.get_vocab(), model_max_length=POSITIONS)


def byte_level() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer like RoBERTa's, with ``<pad>`` at id 1."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(texts(), trainer)
    ends = [(token, trained.token_to_id(token)) for token in ("</s>", "<s>")]
    trained.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=False)
    return _fast(trained, mask_token="<mask>", cls_token="<s>", sep_token="</s>")


def roberta() -> RobertaTokenizer:
    """Return the tokenizer of `byte_level` as RoBERTa's own class."""
    model = json.loads(byte_level().backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return RobertaTokenizer(vocab=model["vocab"], merges=merges, model_max_length=POSITIONS)


def byte_fallback() -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer like Llama's: ``▁`` for spaces, and byte tokens for characters outside the vocabulary."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    trained.train_from_iterator((word for text in texts() for word in text.split()), trainer)
    trained = _with_byte_tokens(trained, first=len(special))
    trained.post_processor = _bracketed(trained)
    return _fast(trained)


def _with_byte_tokens(trained: Tokenizer, first: int) -> Tokenizer:
    """Return the tokenizer with ``<0x00>`` to ``<0xFF>`` as ordinary tokens from id ``first`` on."""
    definition = json.loads(trained.to_str())
    vocabulary = definition["model"]["vocab"]
    for token, index in vocabulary.items():
        vocabulary[token] = index + 256 if index >= first else index
    vocabulary.update({f"<0x{value:02X}>": first + value for value in range(256)})
    return Tokenizer.from_str(json.dumps(definition))


def unigram() -> PreTrainedTokenizerFast:
    """Return a Unigram tokenizer like XLM-RoBERTa's with a fixed vocabulary, because its trainer needs more words."""
    words = [f"▁{word}" for word in (*GOOD, *BAD, *NEUTRAL)]
    pieces = [(word, -4.0 - index / 16) for index, word in enumerate(words)]
    pieces += [(half, -7.0) for half in sorted({word[3:] for word in words if len(word) > 4})]
    pieces += [(letter, -10.0) for letter in "▁abcdefghijklmnopqrstuvwxyzéß"]
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    trained = Tokenizer(models.Unigram(special + pieces, unk_id=3, byte_fallback=False))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.decoder = decoders.Metaspace()
    trained.post_processor = _bracketed(trained)
    return _fast(trained)


def xlm_roberta() -> XLMRobertaTokenizer:
    """Return the tokenizer of `unigram` as XLM-RoBERTa's own class."""
    vocabulary = json.loads(unigram().backend_tokenizer.to_str())["model"]["vocab"]
    pieces = [(token, score) for token, score in [*vocabulary, ("<mask>", 0.0)]]
    return XLMRobertaTokenizer(vocab=pieces, model_max_length=POSITIONS)


def _bracketed(trained: Tokenizer) -> processors.TemplateProcessing:
    ends = [(token, trained.token_to_id(token)) for token in ("<s>", "</s>")]
    return processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)


def _fast(trained: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        model_max_length=POSITIONS,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        **special,
    )
