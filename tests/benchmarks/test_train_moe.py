"""The tiny mixture of experts that a recipe starts from: trained here on a pattern, and opened by others."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

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
