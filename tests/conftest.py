"""Order and selection of the tests, and fixtures that several folders use."""

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
from rotation import slow_part

import compress  # noqa: F401, it disables the telemetry of libraries, so it comes before them
from compress.formats.target_profile import find_processor

HERE = Path(__file__).parent
MAKEFILE = (HERE.parent / "Makefile").read_text()
"""It lists the files with tests marked `alone`, since collecting all files to find them would take half a minute."""
DURATIONS = HERE / "durations.json"
"""Seconds of each test file that takes at least 10: the longest start first. `make durations` records them."""
_GARBAGE_THRESHOLD = 50_000
"""New objects after which Python collects garbage."""
_CACHED_TRACES = 64
"""Traced decoders that are cached."""
# Workers inherit the environment of the process that starts them.
os.environ.setdefault("COMPRESS_TESTS_BEGAN", str(time.time()))
# pytest enables every logger, and torch would log each step of its tracing.
logging.getLogger("torch.__trace").disabled = True


def pytest_configure(config: pytest.Config) -> None:
    """Rotate slow tests if all files are run: workers read the part from the environment."""
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if everything and not hasattr(config, "workerinput") and not os.environ.get("ROTATION"):
        os.environ["COMPRESS_SLOW_PART"] = str(int(float(os.environ["COMPRESS_TESTS_BEGAN"]) // 3600))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put long files first and select this run's slow tests; refuse `alone` tests that `make test` would miss."""
    recorded: dict[str, float] = json.loads(DURATIONS.read_text())
    items.sort(key=lambda item: -recorded.get(item.path.relative_to(HERE).as_posix(), 0.0))
    if hour := os.environ.get("COMPRESS_SLOW_PART"):
        is_slow = {item: any(map(item.get_closest_marker, ("slow", "browser"))) for item in items}
        files = {item.path.relative_to(HERE).as_posix() for item in items if is_slow[item]}
        part = slow_part({file: recorded.get(file, 0.0) for file in files}, int(hour))
        selected = [item for item in items if not is_slow[item] or item.path.relative_to(HERE).as_posix() in part]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(selected)])
        items[:] = selected
    saturates = pytest.mark.skip(reason="8-bit products of full range saturate on this processor, which has no VNNI")
    for item in items:
        marker = item.get_closest_marker("full_range")
        if marker and marker.kwargs.get("own_kernels") and not find_processor("cpu").sums_in_32_bits:
            item.add_marker(saturates)
        if item.get_closest_marker("alone") and item.path.relative_to(HERE).as_posix() not in MAKEFILE:
            raise pytest.UsageError(f"{item.nodeid} is marked alone, and its file is not in ALONE of the Makefile")


@pytest.fixture(autouse=True)
def _summed_in_32_bits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use ONNX Runtime's slower kernels, which do not saturate, for `full_range` tests on processors without VNNI."""
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
    """Add up the durations of each file's tests."""
    _seconds[report.nodeid.split("::")[0].removeprefix(f"{HERE.name}/")] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write `durations.json` if all tests have passed and COMPRESS_RECORD_DURATIONS is set."""
    requested = os.environ.get("COMPRESS_RECORD_DURATIONS") and not hasattr(session.config, "workerinput")
    if requested and session.exitstatus == 0:
        long = {name: round(seconds) for name, seconds in _seconds.most_common() if seconds >= 10}
        DURATIONS.write_text(json.dumps(long, indent=1) + "\n")


def pytest_collection_finish() -> None:
    """Exclude imported modules from garbage collection, a sixth of an export's time, and collect less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GARBAGE_THRESHOLD)
    # Many test files build decoders of the same few configs.
    if trace := sys.modules.get("compress.formats.onnx.decoder.trace"):
        vars(trace)["_MOST_KEPT"] = _CACHED_TRACES


@pytest.fixture(scope="module")
def quick_limits() -> Iterator[None]:
    """Let profiles measure the machine's limits less often and in a small buffer, which saves seconds for each profile.

    The tests of `machine` measure the limits in full.
    """
    from compress.benchmark import operators

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "memory_buffer_bytes", lambda: 1 << 23)
        patch.setattr(operators, "_LIMITS_EVERY", 1000)
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that all workers share, for artifacts that are expensive to build."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def smollm2(shared: Path) -> Path:
    """Return the sample `smollm2`, converted to a checkpoint folder."""
    from compress.sources.resolve import resolve_model

    with FileLock(shared / "smollm2.lock"):
        return resolve_model("sample:smollm2", cache=shared / "smollm2")


@pytest.fixture(scope="session")
def whisper(shared: Path) -> dict[str, Path]:
    """Return folders with the graphs of Whisper tiny.en: in float, and with an INT8 encoder and a 4-bit decoder."""
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
    """Return the folder of a finished `compress run tiny.yaml --json`, whose output is `said.json`.

    Tests that change files work on a copy.
    """
    import tiny_run

    folder = shared / "tiny ran"
    with FileLock(shared / "tiny ran.lock"):
        if not folder.exists():
            # The exported model is the baseline, since another one would have to be exported for its measurement.
            stages = [tiny_run.STAGES[0], {"onnx": {}}, {"onnx_int8": {}}]
            tiny_run.write_all(folder, stages=stages, baseline="onnx")
            done = tiny_run.compress("run", "tiny.yaml", "--json", folder=folder)
            assert done.returncode == 0, done.stderr
            (folder / "said.json").write_text(done.stdout)
    return folder


@pytest.fixture(scope="session")
def executorch_program(shared: Path) -> Path:
    """Return the folder of an fp32 ExecuTorch program of a tiny one-layer encoder for up to 16 tokens."""
    import tiny

    from compress.formats.executorch.stage import ExecuTorch

    folder = shared / "executorch"
    with FileLock(shared / "executorch.lock"):
        if not folder.exists():
            program = ExecuTorch(precision="fp32").run(tiny.encoder(num_hidden_layers=1), tiny.context(max_length=16))
            folder.mkdir()
            program.save(folder)
    return folder


@pytest.fixture(scope="session")
def chromium() -> str:
    """Return the path of Chromium, which CI must have."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None and os.environ.get("CI"):
        pytest.fail("no Chromium on PATH, and CI must have one")
    if path is None:
        pytest.skip("no Chromium on PATH")
    return path


@pytest.fixture(scope="module")
def browser(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Open a browser tab."""
    with open_browser(chromium, tmp_path_factory.mktemp("pages")) as tab:
        yield tab
