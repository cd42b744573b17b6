"""The table of what 4-bit SmolLM2 costs: what each line is made of, and the whole of it on a tiny model."""

from __future__ import annotations

import importlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mergeable import save_mergeable_llama
from tiny_generation import WORDS

from compress.formats.gguf import llama_cpp_library
from compress.recipe.recipe import Benchmark

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("smollm2")


@pytest.mark.slow
def test_the_whole_of_it_on_a_tiny_model(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_mergeable_llama(tmp_path / "model")
    (tmp_path / "text").mkdir()
    chance = np.random.default_rng(0)
    for split, count in {"train": 240, "validation": 4, "test": 40}.items():
        rows = [
            json.dumps({"text": f"{split} {place} " + " ".join(chance.choice(WORDS, 60))}) for place in range(count)
        ]
        (tmp_path / "text" / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    recipe = {
        "name": "tiny",
        "task": "text-generation",
        "model": str(tmp_path / "model"),
        "data": {"source": str(tmp_path / "text"), "max_length": 64},
        "stages": [
            {"gptq": {"group_size": 32, "samples": 4, "sequence_length": 32, "embedding_bits": 4}},
            {"onnx": {"rounding_limit": 0.5}},
        ],
        "evaluation": {"windows": 4, "prompts": 0},
        "benchmark": {"threads": 1, "budget_seconds": 0.1, "contexts": [16], "tokens": 4, "every_stage": False},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    import xllamacpp

    monkeypatch.setattr(bench, "llama_cpp_library", lambda: Path(xllamacpp.xllamacpp.__file__))
    monkeypatch.setenv(llama_cpp_library.VARIABLE, "")
    monkeypatch.setattr(bench, "Benchmark", partial(Benchmark, launches=2))
    bench.main(tmp_path / "tiny.yaml", with_peers=False, seconds=0.1, output=tmp_path / "out.json")
    printed_lines = json.loads((tmp_path / "out.json").read_text())["lines"]
    values = {line["what"]: line["found"] for line in printed_lines}
    assert values["time of the quick GPTQ against Optimum + gptqmodel"] is None
    measured = [value for value in values.values() if value is not None]
    assert len(measured) == 5 and all(np.isfinite(measured)) and values["decode against llama.cpp"] > 0
    assert "| ONNX folder | 82 MB | 75 MB |" in capsys.readouterr().out
