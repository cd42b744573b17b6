"""A model's files don't say how its tokenizer was read, so that the same key gives the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_run
from transformers import AutoTokenizer

from compress.models.torch_model import TorchModel
from compress.tasks.registry import get_task
from compress.utils.digests import digest_directory


def test_a_model_that_was_read_offline_is_saved_as_any_other(tmp_path: Path) -> None:
    tiny_run.write_model(tmp_path / "model", tiny_run.LABELS)
    model = get_task("text-classification").load(tmp_path / "model", None, False)
    saved = []
    for offline in (True, False):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model", local_files_only=offline)
        TorchModel(model.module, tokenizer).save(tmp_path / str(offline))
        saved.append(digest_directory(tmp_path / str(offline)))
        read = AutoTokenizer.from_pretrained(tmp_path / str(offline))
        assert read("a great film")["input_ids"] == tokenizer("a great film")["input_ids"]
    assert saved[0] == saved[1]


@pytest.mark.parametrize("words", ["naïve", "日本"])
def test_other_fields_stay_as_transformers_writes_them(tmp_path: Path, words: str) -> None:
    tiny_run.write_model(tmp_path / "model", tiny_run.LABELS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": [words]})
    tokenizer.save_pretrained(tmp_path / "theirs")
    model = get_task("text-classification").load(tmp_path / "model", None, False)
    TorchModel(model.module, tokenizer).save(tmp_path / "ours")
    theirs = (tmp_path / "theirs" / "tokenizer_config.json").read_text().splitlines()
    ours = (tmp_path / "ours" / "tokenizer_config.json").read_text().splitlines()
    assert ours == [line for line in theirs if "is_local" not in line and "local_files_only" not in line]
