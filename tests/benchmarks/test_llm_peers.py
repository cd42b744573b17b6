"""The comparison of quantizers: one evaluator for every format, and a row with its reason for a peer that fails."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mergeable import TEXTS, save_mergeable_llama, train_tokenizer
from quantized import quantize_tiny_llama
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from compress.formats.gguf.export import Types, write_gguf
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


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Of the one file of a checkpoint."""
    return load_file(folder / "model.safetensors")


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
    write_gguf(Checkpoint(tmp_path / "model"), tmp_path / "tiny.gguf", Types("f32"))
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


def test_calibration_is_what_the_stage_draws(setting: Any) -> None:
    ids = np.load(setting.calibration)
    assert ids.shape == (3, 48)
    whole = setting.task.encode(setting.dataset.split("train"), train_tokenizer(), None, 48)
    every = np.stack([example["input_ids"] for example in whole.inputs])
    chosen = np.sort(np.random.default_rng(0).choice(len(every), 3, replace=False))
    assert np.array_equal(ids, every[chosen])


def test_a_peer_that_fails_is_a_row_with_its_reason(bench: Any, setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Any) -> Any:
        raise bench.UnavailableError("no such\nversion")

    monkeypatch.setitem(bench.PEERS, "auto-round", fails)
    row, result = bench.quantize("auto-round", setting)
    assert result is None and row.reason == "no such version"
    assert bench.table([row]).splitlines()[-1] == "| auto-round | no such version | | | | | |"


def test_stages_of_ours_run_as_a_peer_one_behind_the_other(setting: Any) -> None:
    peers = importlib.import_module("peers.language_peers")
    tuning = {"kind": "tune_scales", "steps": 2, "batch_size": 1, "sequence_length": 48, "learning_rate": 1e-3}
    first, both = ({"kind": "gptq", "guided": False},), ({"kind": "gptq", "guided": False}, tuning)
    alone = read_tensors(peers.ours(*first)(setting).artifact)
    result = peers.ours(*both)(setting)
    tuned = read_tensors(result.artifact)
    assert all(np.array_equal(tuned[name], alone[name]) for name in alone if name.endswith("qweight"))
    assert any(not np.array_equal(tuned[name], alone[name]) for name in alone if name.endswith("scales"))
    assert result.seconds > 0 and result.bytes > 0


def test_the_table_leaves_out_what_was_not_measured(bench: Any) -> None:
    rows = [
        bench.Row("a", 12.34, 1_790_000_000, 30.666, "transformers", 1_234_567, 170.4),
        bench.Row("b", bytes=8),
    ]
    assert bench.table(rows).splitlines()[2:] == [
        "| a | 12.3 | 1.79 GB | 30.67 | transformers | 1,234,567 | 170 |",
        "| b |  |  |  |  | 8 |  |",
    ]


def test_a_peer_s_process_answers_or_leaves_its_last_words(bench: Any, setting: Any, tmp_path: Path) -> None:
    peers = importlib.import_module("peers.language_peers")
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(BENCHMARKS / 'peers')!r})\n"
        "from quantizing import answer\n"
        "answer(lambda order: {'doubled': 2 * order['value']}, ('numpy',), ())\n"
    )
    python = Path(sys.executable)
    answer = peers._ask(setting, str(script), python, {"value": 21})
    assert answer["doubled"] == 42 and answer["packages"] == {"numpy": np.__version__}
    assert answer["seconds"] >= 0 and answer["peak_bytes"] > 1_000_000
    with pytest.raises(bench.UnavailableError, match="KeyError: 'value'"):
        peers._ask(setting, str(script), python, {})
