"""What all tests share: their order, fixtures of pages that are looked at in a browser, silence while torch traces."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, open_browser
from filelock import FileLock

import compress  # noqa: F401, before any test imports a library that would report to its makers
from compress.formats.target_profile import find_processor

HERE = Path(__file__).parent
MAKEFILE = (HERE.parent / "Makefile").read_text()
"""It names the files with tests that are marked alone: to look for them in all would take half a minute."""
DURATIONS = HERE / "durations.json"
"""Seconds of each file of tests that takes ten or more: the longest begin first. `make durations` records them."""
_OBJECTS = 50_000
"""New ones after which Python looks for garbage."""
_TRACES = 64
"""Of decoders, which are kept."""
# Workers have it from the process that starts them.
os.environ.setdefault("COMPRESS_TESTS_BEGAN", str(time.time()))
# pytest listens to every logger, so that torch would write down each step of its tracing.
logging.getLogger("torch.__trace").disabled = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; refuse a test that is to run alone where `make test` would not find it."""
    recorded: dict[str, float] = json.loads(DURATIONS.read_text())
    items.sort(key=lambda item: -recorded.get(item.path.relative_to(HERE).as_posix(), 0.0))
    saturates = pytest.mark.skip(reason="8-bit products of full range saturate on this processor, which has no VNNI")
    for item in items:
        marker = item.get_closest_marker("full_range")
        if marker and marker.kwargs.get("own_kernels") and not find_processor("cpu").sums_in_32_bits:
            item.add_marker(saturates)
        if item.get_closest_marker("alone") and item.path.relative_to(HERE).as_posix() not in MAKEFILE:
            raise pytest.UsageError(f"{item.nodeid} is marked alone, and its file is not in ALONE of the Makefile")


@pytest.fixture(autouse=True)
def _summed_in_32_bits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's slower kernels that don't saturate, for tests that say so, on processors whose own ones may."""
    if not request.node.get_closest_marker("full_range") or find_processor("cpu").sums_in_32_bits:
        return
    import onnxruntime

    opened = onnxruntime.InferenceSession.__init__

    def open_exact(self: Any, path: Any, sess_options: Any = None, *given: Any, **named: Any) -> None:
        sess_options = sess_options or onnxruntime.SessionOptions()
        sess_options.add_session_config_entry("session.x64quantprecision", "1")
        opened(self, path, sess_options, *given, **named)

    monkeypatch.setattr(onnxruntime.InferenceSession, "__init__", open_exact)


_seconds: Counter[str] = Counter()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up what a file's tests take."""
    _seconds[report.nodeid.split("::")[0].removeprefix(f"{HERE.name}/")] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Record what took long, where that is asked for and all tests have passed."""
    asked = os.environ.get("COMPRESS_RECORD_DURATIONS") and not hasattr(session.config, "workerinput")
    if asked and session.exitstatus == 0:
        long = {name: round(seconds) for name, seconds in _seconds.most_common() if seconds >= 10}
        DURATIONS.write_text(json.dumps(long, indent=1) + "\n")


def pytest_collection_finish() -> None:
    """What is imported by now stays: to look through all of it for garbage is a sixth of the time of an export.

    And what comes is looked through less often than after each 700 new objects.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_OBJECTS)
    # Files of tests make decoders of the same few configs.
    if trace := sys.modules.get("compress.formats.onnx.decoder.trace"):
        vars(trace)["_MOST_KEPT"] = _TRACES


@pytest.fixture(scope="module")
def quick_limits() -> Iterator[None]:
    """Profiles measure the machine's limits at the beginning and the end, and memory in a small buffer.

    Whole limits take seconds a profile; the tests of `machine` see to those.
    """
    from compress.benchmark import operators

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "memory_buffer_bytes", lambda: 1 << 23)
        patch.setattr(operators, "_LIMITS_EVERY", 1000)
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all workers, for what takes a while to make."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def smollm2(shared: Path) -> Path:
    """The sample `smollm2` as a folder of weights, made of its file."""
    from compress.sources.resolve import resolve_model

    with FileLock(shared / "smollm2.lock"):
        return resolve_model("sample:smollm2", cache=shared / "smollm2")


@pytest.fixture(scope="session")
def whisper(shared: Path) -> dict[str, Path]:
    """Folders of graphs of the real Whisper: whole, and with its encoder in INT8 and its decoder in 4 bits."""
    from compress.data.samples.fetch import sample_directory
    from compress.formats.onnx.decoder import export_encoder_decoder
    from compress.formats.onnx.int8.dynamic import quantize_products
    from compress.formats.onnx.model import quantized_name, weight_only_name
    from compress.formats.onnx.weight_only_quantization import WeightOnlySettings, quantize_matrices
    from compress.models.checkpoint import Checkpoint

    folders = {name: shared / "whisper" / name for name in ("whole", "integers")}
    with FileLock(shared / "whisper.lock"):
        if not (shared / "whisper").exists():
            whole = export_encoder_decoder(Checkpoint(sample_directory("whisper-tiny-en")))
            (encoder, first), (decoder, second) = whole.graphs.items()
            integers = {
                quantized_name(encoder): quantize_products(first, per_channel=True, reduce_range=False),
                weight_only_name(decoder, 4): quantize_matrices(second, WeightOnlySettings(4, 32))[0],
            }
            for name, model in {"whole": whole, "integers": whole.with_graphs(integers)}.items():
                folders[name].mkdir(parents=True)
                model.save(folders[name])
    return folders


@pytest.fixture(scope="session")
def tiny_ran(shared: Path) -> Path:
    """A folder in which `compress run tiny.yaml --json` trained, exported and quantized; `said.json` is its output.

    Whoever changes something takes a copy.
    """
    import tiny_run

    folder = shared / "tiny ran"
    with FileLock(shared / "tiny ran.lock"):
        if not folder.exists():
            # The exported model as the baseline: any other would be exported once more, to be measured.
            stages = [tiny_run.STAGES[0], {"onnx": {}}, {"onnx_int8": {}}]
            tiny_run.write_all(folder, stages=stages, baseline="onnx")
            done = tiny_run.compress("run", "tiny.yaml", "--json", folder=folder)
            assert done.returncode == 0, done.stderr
            (folder / "said.json").write_text(done.stdout)
    return folder


@pytest.fixture(scope="session")
def executorch_program(shared: Path) -> Path:
    """The folder of a tiny encoder of one layer as an ExecuTorch program in fp32, for up to 16 tokens."""
    import tiny

    from compress.formats.executorch.stage import ExecuTorch

    folder = shared / "executorch"
    with FileLock(shared / "executorch.lock"):
        if not folder.exists():
            made = ExecuTorch(precision="fp32").run(tiny.encoder(num_hidden_layers=1), tiny.context(max_length=16))
            folder.mkdir()
            made.save(folder)
    return folder


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the browser; in CI there must be one."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None and os.environ.get("CI"):
        pytest.fail("no Chromium on PATH, and CI must have one")
    if found is None:
        pytest.skip("no Chromium on PATH")
    return found


@pytest.fixture(scope="module")
def browser(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A tab to look at pages in."""
    with open_browser(chromium, tmp_path_factory.mktemp("pages")) as found:
        yield found
