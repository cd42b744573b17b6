"""The comparison of quantizers: one evaluator for every format, and a row with its reason for a peer that fails."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mergeable import TEXTS, save_mergeable_llama, train_tokenizer
from quantized import quantize_tiny_llama
from transformers import AutoModelForCausalLM

from compress.formats.gguf.export import GgufTypes, write_gguf
from compress.formats.targets import TARGETS
from compress.models.checkpoint import Checkpoint
from compress.utils.progress import SilentProgress

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return importlib.import_module("llm_peers")


@pytest.fixture
def setting(bench: Any, tmp_path: Path) -> Any:
    """A tiny Llama, and a few sentences over and over."""
    save_mergeable_llama(tmp_path / "model")
    (tmp_path / "text").mkdir()
    for split, shift in (("train", 0), ("validation", 2), ("test", 1)):
        rows = [{"text": f"{split} {row} {TEXTS[(row + shift) % 4]}"} for row in range(40)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "text" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return bench.LanguageSetting(
        *(str(tmp_path / "model"), str(tmp_path / "text"), tmp_path, 1, 4, 32, SilentProgress()),
        samples=3,
        windows=4,
        length=48,
    )


def loss_of(folder: Path, windows: list[np.ndarray]) -> float:
    """transformers' own mean loss over windows."""
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    ids = torch.from_numpy(np.stack(windows))
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


def test_every_format_is_judged_by_the_same_loss(setting: Any, tmp_path: Path) -> None:
    windows = [example["input_ids"] for example in setting.held_out.inputs]
    assert [len(window) for window in windows] == [48] * 4
    expected = np.exp(loss_of(tmp_path / "model", windows))
    assert setting.perplexity_of_checkpoint(tmp_path / "model") == pytest.approx(expected, rel=1e-5)
    write_gguf(Checkpoint(tmp_path / "model"), tmp_path / "tiny.gguf", GgufTypes("f32"))
    # llama.cpp keeps keys and values in float16.
    assert setting.perplexity(tmp_path / "tiny.gguf", TARGETS["llama-cpp"]) == pytest.approx(expected, rel=1e-2)


def test_a_checkpoint_in_gptq_format_is_judged_by_what_its_integers_stand_for(setting: Any, tmp_path: Path) -> None:
    quantized = quantize_tiny_llama(Checkpoint(tmp_path / "model"), tmp_path / "quantized", table_bits=None)
    train_tokenizer().save_pretrained(quantized.folder)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.copy_(quantized.weight(name.removesuffix(".weight")))
    plain.save_pretrained(tmp_path / "plain")
    windows = [example["input_ids"] for example in setting.held_out.inputs]
    expected = np.exp(loss_of(tmp_path / "plain", windows))
    # The checkpoint has its embedding in float16.
    assert setting.perplexity_of_checkpoint(quantized.folder) == pytest.approx(expected, rel=2e-3)
