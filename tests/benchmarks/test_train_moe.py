"""The tiny mixture of experts that a recipe starts from: trained here on a pattern, and opened by others."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from typer.testing import CliRunner

from compress.data.dataset import Dataset
from compress.formats.gguf.tokenizer import split_rule
from compress.models.json_file import read_json
from compress.tasks.registry import get_task
from compress.utils.progress import SilentProgress

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
PATTERN = "one two three four five six seven eight nine ten " * 60


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("train_moe")
    tables = {split: pa.table({"text": [PATTERN, PATTERN[7:]]}) for split in ("train", "validation")}
    data = Dataset(get_task("text-generation").columns, tables, ())
    monkeypatch.setattr(module, "load_dataset", lambda *_: data)
    monkeypatch.setattr(module, "VOCABULARY", 300)
    monkeypatch.setattr(module, "LENGTH", 16)
    monkeypatch.setattr(module, "SHAPE", {**module.SHAPE, **SMALL})
    return module


def test_a_model_is_trained_and_written_for_others(bench: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    bench.train(tmp_path / "made", 60, 1e-2, 0, SilentProgress())
    assert (tmp_path / "made" / "model.safetensors").is_file()
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "made").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert type(module).__name__ == "MixtralForCausalLM" and not module.config.output_router_logits
    assert split_rule(read_json(tmp_path / "made" / "tokenizer.json"), "") == "gpt-2"
    ids = bench.encoded(tokenizer, [PATTERN])
    alone = bench.unigram_perplexity(ids, ids)
    assert 5 < alone < 20
    assert bench.perplexity(module, bench.windows(ids)) < 0.5 * alone


def test_the_same_seed_gives_the_same_model(bench: Any, tmp_path: Path) -> None:
    for name in ("one", "other"):
        bench.train(tmp_path / name, 3, 1e-2, 5, SilentProgress())
    digests = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other")]
    assert digests[0] == digests[1]


def test_a_folder_that_holds_something_is_refused(bench: Any, tmp_path: Path) -> None:
    import typer

    (tmp_path / "mine").write_text("x")
    app = typer.Typer()
    app.command()(bench.main)
    result = CliRunner().invoke(app, [str(tmp_path)])
    assert result.exit_code == 2
    assert "is not empty" in result.stderr and "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_unigram_model_by_hand(bench: Any) -> None:
    # 300 tokens counted once, and four of the text: 3 x token 7, 1 x token 8.
    likelihoods = [4 / 304, 2 / 304, 1 / 304]
    expected = math.exp(-sum(map(math.log, likelihoods)) / 3)
    found = bench.unigram_perplexity(np.array([7, 7, 7, 8]), np.array([7, 8, 9]))
    assert found == pytest.approx(expected)


def test_perplexity_of_a_model_that_knows_nothing(bench: Any) -> None:
    module = bench.build(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    text = torch.arange(64).view(4, 16)
    assert bench.perplexity(module, text) == pytest.approx(300)
