"""Tests of one GPTQ model in four runtimes: perplexity, size and speed of ONNX, GenAI, GGUF and OpenVINO files."""

from __future__ import annotations

from pathlib import Path

import pytest
from mergeable import save_mergeable_llama
from tiny_generation import ONE_LAUNCH, write_recipe, write_texts
from tiny_run import Notes, load

from compress.pipeline.run import run
from compress.report.pages import html_page

pytestmark = pytest.mark.slow

GPTQ = {"gptq": {"bits": 4, "group_size": 32, "samples": 4, "sequence_length": 16, "embedding_bits": 4}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_mergeable_llama(tmp_path / "model")
    write_texts(tmp_path, words=240)
    return tmp_path


def test_one_quantized_model_is_measured_in_every_runtime(folder: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    pytest.importorskip("openvino_tokenizers")
    targets = ("cpu", "genai", "llama-cpp", "openvino")
    recipe = load(write_recipe(folder, stages=[GPTQ], targets=list(targets), benchmark=ONE_LAUNCH))
    report = run(recipe, folder, folder / "artifacts", Notes()).report
    assert report.targets[:4] == targets and not report.skipped
    values = {
        (model, target): row.value
        for model in ("baseline", "final")
        for target in targets
        if (row := report.find(model, "perplexity", target)) is not None
    }
    assert len(values) == 8
    # onnxruntime-genai calls the same ONNX Runtime kernels.
    assert values["baseline", "genai"] == pytest.approx(values["baseline", "cpu"], rel=1e-5)
    assert values["final", "genai"] == pytest.approx(values["final", "cpu"], rel=1e-5)
    # The weights are the same in all runtimes, but each rounds activations differently.
    for other in ("llama-cpp", "openvino"):
        assert values["baseline", other] == pytest.approx(values["baseline", "cpu"], rel=0.02)
        assert values["final", other] == pytest.approx(values["final", "cpu"], rel=0.05)
    for target in targets:
        speed = report.find("final", "tokens_per_second_context_16", target)
        size = report.find("final", "size_bytes", target)
        size_before = report.find("baseline", "size_bytes", target)
        assert speed is not None and speed.value > 0
        assert size is not None and size_before is not None and size.value < size_before.value
    assert "llama-cpp" in html_page(report)
