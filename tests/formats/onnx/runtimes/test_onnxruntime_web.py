"""Tests of onnxruntime-web in a page and in Node: outputs match ONNX Runtime, and times are taken in JavaScript."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx_graphs import write_classifier

from compress.data.samples.fetch import cache_root, fetch
from compress.formats.model_file import model_file
from compress.formats.onnx.runtimes import javascript
from compress.formats.onnx.runtimes.javascript import PACKAGES, SCRIPT, WASM
from compress.formats.ort.stage import convert
from compress.formats.runtime import TensorType, TimesItself, get_runtime, prepare_runtime, why_unavailable
from compress.formats.targets import TARGETS
from compress.utils.errors import InputError, ModelError
from compress.utils.progress import SilentProgress

GENERATOR = np.random.default_rng(1)
SHORT, LONG = ({"input_ids": GENERATOR.integers(0, 100, shape)} for shape in ((3, 7), (16, 400)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("web"), width=64, layers=2)


@pytest.fixture(scope="module", params=["node", pytest.param("browser", marks=pytest.mark.browser)])
def web(request: pytest.FixtureRequest, folder: Path) -> Iterator[Any]:
    """Return a session in a browser page with two threads, or in Node."""
    if shutil.which("npm") is None:
        pytest.skip("no npm here to fetch onnxruntime-web with")
    target = TARGETS[request.param]
    assert prepare_runtime(target, SilentProgress()) is None
    return get_runtime(target.runtime).open(folder, target, 2)


def logits_of(path: Path, batch: dict[str, np.ndarray], target: str = "cpu") -> np.ndarray:
    resolved = TARGETS[target]
    return get_runtime(resolved.runtime).open(path, resolved, 1).predict(batch)["logits"]


@pytest.mark.slow
def test_logits_match_onnx_runtime(web: Any, folder: Path) -> None:
    assert web.input_types == {"input_ids": TensorType("int64", ("batch", "length"))}
    assert web.output_types == {"logits": TensorType("float32", ("batch", 2))}
    for batch in (SHORT, LONG):
        np.testing.assert_allclose(
            web.predict({**batch, "unknown": np.zeros(1)})["logits"], logits_of(folder, batch), atol=1e-5
        )


@pytest.mark.slow
def test_invalid_batch_is_refused(web: Any) -> None:
    with pytest.raises(InputError, match="lacks the model's input input_ids"):
        web.predict({"ids": SHORT["input_ids"]})
    with pytest.raises(InputError, match=r"(?s)fails on the batch.*input_ids int64"):
        web.predict({"input_ids": SHORT["input_ids"].astype(np.float32)})
    assert web.predict(SHORT)["logits"].shape == (3, 2)


@pytest.mark.slow
@pytest.mark.alone
def test_latencies_are_measured_in_the_page_or_node(web: Any) -> None:
    assert isinstance(web, TimesItself)
    web.hold([SHORT, LONG])
    web.time([0, 1] * 5)
    began = time.perf_counter()
    latencies = web.time([0, 1] * 10)
    elapsed_ms = 1e3 * (time.perf_counter() - began)
    assert 0 < sum(latencies) < elapsed_ms
    # 300 times the tokens.
    assert 5 * np.median(latencies[::2]) < np.median(latencies[1::2])
    waits = web.queued_latencies([0] * 3, [0, 50, 50])
    assert max(waits) < 50 and min(waits) > 0
    # Of two simultaneous requests, the second waits for the first.
    first, second = web.queued_latencies([1, 1], [0, 0])
    assert second > 1.3 * first
    if web.settings["cross_origin_isolated"] is not None:
        # An isolated page's clock has steps of 5 microseconds, any other's of 100.
        steps = np.array(latencies) / 0.005
        np.testing.assert_allclose(steps, steps.round(), atol=0.01)
        assert any(round(step) % 20 for step in steps)


@pytest.mark.slow
def test_startup_transfer_sizes_are_reported(web: Any, folder: Path) -> None:
    files = fetch(PACKAGES, cache_root(), SilentProgress())
    size, runtime = model_file(folder).stat().st_size, (files / WASM).stat().st_size
    start_up = web.start_up
    assert size < start_up["model_transfer_bytes"] < size + 1000
    if web.settings["cross_origin_isolated"] is not None:
        runtime += (files / SCRIPT).stat().st_size
        assert web.settings["cross_origin_isolated"] is True
        assert web.settings["intra_op_threads"] == 2
    else:
        assert web.settings["intra_op_threads"] == 1
    assert runtime < start_up["transfer_bytes"] - start_up["model_transfer_bytes"] < runtime + 30_000
    assert min(start_up[name] for name in ("runtime_download_ms", "runtime_compile_ms", "model_download_ms")) > 0
    assert web.session_load_ms > 0
    # The runtime's code alone has 14 MB; the process ran, so it took some of the processor.
    assert 14_000_000 < web.runtime_bytes <= web.peak_bytes()
    earlier = web.cpu_seconds()
    web.hold([LONG])
    took_ms = sum(web.time([0] * 5))
    # On a busy machine only a part of the time is spent in the model.
    assert web.cpu_seconds() - earlier > 0.02e-3 * took_ms


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="no npm here to fetch onnxruntime-web with")
def test_external_data_and_ort_files_are_supported(folder: Path, tmp_path: Path) -> None:
    assert prepare_runtime(TARGETS["node"], SilentProgress()) is None
    graph = onnx.load(model_file(folder))
    (tmp_path / "apart").mkdir()
    apart, converted, broken = tmp_path / "apart" / "model.onnx", tmp_path / "model.ort", tmp_path / "model.onnx"
    onnx.save_model(graph, apart, save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    convert(model_file(folder), converted)
    for path in (apart, converted):
        np.testing.assert_allclose(logits_of(path, SHORT, "node"), logits_of(folder, SHORT), atol=1e-5)
    broken.write_bytes(model_file(folder).read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot open the graph"):
        logits_of(broken, SHORT, "node")


def test_missing_programs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no Chromium on PATH" in str(why_unavailable(TARGETS["browser"]))
    assert "no node on PATH" in str(why_unavailable(TARGETS["node"]))
    for name in ("chromium", "node"):
        failing(tmp_path / name)
    assert "is fetched with npm, which is not on PATH" in str(why_unavailable(TARGETS["browser"]))
    failing(tmp_path / "npm")
    assert why_unavailable(TARGETS["browser"]) is None
    assert "cannot be fetched: npm error the network is down" in str(
        prepare_runtime(TARGETS["browser"], SilentProgress())
    )


def test_missing_webgpu_is_reported_before_any_download(monkeypatch: pytest.MonkeyPatch) -> None:
    target = TARGETS["browser-webgpu"]
    assert (target.provider, target.runtime) == ("webgpu", "onnxruntime-web")
    monkeypatch.setattr("compress.formats.onnx.runtimes.javascript._GRAPHICS", ("no-such-device",))
    javascript.lacking_webgpu.cache_clear()
    monkeypatch.setattr("compress.formats.onnx.runtimes.javascript.find_chromium", lambda: "chromium")
    assert "no graphics device" in str(prepare_runtime(target, SilentProgress()))
    other = replace(target, provider="cuda")
    assert "has no cuda (it has wasm, webgpu)" in str(why_unavailable(other))
    javascript.lacking_webgpu.cache_clear()


def failing(program: Path) -> None:
    program.write_text("#!/bin/sh\necho 'npm error the network is down'\nexit 1\n")
    program.chmod(0o755)


OPEN = """
from compress.formats.onnx.runtimes.chromium import open_page
import time
with open_page() as page:
    print(page.browser, flush=True)
    time.sleep(600)
"""


@pytest.mark.browser
@pytest.mark.slow
def test_a_killed_process_leaves_no_browser_and_no_profile(chromium: str) -> None:
    with subprocess.Popen([sys.executable, "-c", OPEN], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        browser = psutil.Process(int(owner.stdout.readline()))
        (profile,) = [Path(word.split("=", 1)[1]) for word in browser.cmdline() if word.startswith("--user-data-dir=")]
        family = [browser, *browser.children(recursive=True)]
        assert len(family) > 3 and profile.is_dir()
        owner.kill()
    until = time.monotonic() + 60
    while time.monotonic() < until and (any(map(alive, family)) or profile.exists()):
        time.sleep(0.1)
    assert not any(map(alive, family))
    assert not profile.exists()


def alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
