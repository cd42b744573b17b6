from __future__ import annotations

import json
from pathlib import Path

import pytest
from decoder_graphs import TinyDecoder
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from compress.benchmark.generation import encode_text
from compress.utils.errors import InputError, ModelError

WORDS = {"[UNK]": 0, "the": 1, "road": 2, "goes": 3, "on": 4, "and": 5}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A decoder with a tokenizer of six words."""
    path = TinyDecoder().write(tmp_path / "model")
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 50}))
    tokenizer = Tokenizer(WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"})
    )
    return path


def test_a_text_becomes_the_ids_of_its_words(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the road goes on and\non, wherever", encoding="utf-8")
    assert encode_text(folder, text, 6) == [1, 2, 3, 4, 5, 4]
    assert encode_text(folder / "onnx" / "model.onnx", text, 100) == [1, 2, 3, 4, 5, 4, 0, 0]


def test_a_text_that_cannot_be_read_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        encode_text(folder, tmp_path / "nothing.txt", 4)
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        encode_text(folder, tmp_path, 4)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="no text in UTF-8"):
        encode_text(folder, tmp_path / "bytes", 4)


def test_a_folder_without_a_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the road")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="tokenizer"):
        encode_text(folder, text, 2)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="no tokenizer or other processor"):
        encode_text(folder, text, 2)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json beside the model"):
        encode_text(folder, text, 2)
