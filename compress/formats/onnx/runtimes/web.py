"""ONNX Runtime as WebAssembly: a graph in a page of headless Chromium, or in Node, with timing there."""

from __future__ import annotations

import re
import shutil
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from compress.data.samples.fetch import cache_root, damage, entry_name, fetch
from compress.formats.generation.image_text import open_together
from compress.formats.model_file import model_files
from compress.formats.onnx.runtimes.chromium import find_chromium
from compress.formats.onnx.runtimes.javascript import (
    PACKAGES,
    SCRIPT,
    WASM,
    WEBGPU_PACKAGES,
    WEBGPU_SCRIPT,
    WEBGPU_WASM,
    Chromium,
    FailedError,
    Host,
    Loopback,
    NodeProcess,
    lacking_chromium,
    lacking_node,
    lacking_webgpu,
    peak_bytes,
    processor_seconds,
    version_of,
)
from compress.formats.onnx.runtimes.onnxruntime import cannot_open
from compress.formats.runtime import Batch, Session, TensorType, check_inputs, check_target
from compress.formats.target_profile import WEB_VERSION, Target
from compress.models.pipeline_folder import is_pipeline
from compress.utils.errors import InputError, ModelError, StageError
from compress.utils.progress import Progress, SilentProgress

WEIGHTS = ("_data", ".data")
"""Suffixes of external weights' file names, as transformers.js and torch write them."""
_WEBGPU = "webgpu"
_BUILDS = {"wasm": (PACKAGES, SCRIPT, WASM), _WEBGPU: (WEBGPU_PACKAGES, WEBGPU_SCRIPT, WEBGPU_WASM)}
"""Packages, script and WebAssembly by provider."""
_BATCH = "batch"
_INVALID_ARGUMENT = re.compile(r"ERROR_CODE: 2\b")
_WORDS = re.compile(r".*?ERROR_MESSAGE: ")


class WebSession:
    """A graph that was opened in a JavaScript process; see `TimesItself`."""

    def __init__(self, server: Loopback, host: Host, graph: Path, provider: str, threads: int) -> None:
        self._server, self._host, self._where = server, host, str(graph)
        packages, script, wasm = _BUILDS[provider]
        folder = fetch(packages, cache_root(), SilentProgress())
        server.put(wasm, folder / wasm)
        order = {"address": server.address, "script": host.module(folder / script), "wasm": wasm}
        started = self._ask("start", {**order, "threads": threads, "device": provider})
        # Memory is read before the model is loaded, to tell the runtime's share.
        self.runtime_bytes = self._peak = peak_bytes(host.process)
        opened = self._open(graph)
        self.session_load_ms = float(opened["session_create_ms"])
        self.start_up = {name: float(value) for name, value in started.items() if name.endswith("_ms")}
        self.start_up["model_download_ms"] = float(opened["model_download_ms"])
        # The transferred bytes by the Performance API; nothing is compressed in transit.
        sizes = {str(name).removeprefix(self._server.address): float(size) for name, size in self._ask("transfers", {})}
        model = sum(size for name, size in sizes.items() if name.startswith("model/"))
        self.start_up |= {"transfer_bytes": sum(sizes.values()), "model_transfer_bytes": model}
        self.input_types: Mapping[str, TensorType] = {entry["name"]: _type(entry) for entry in opened["inputs"]}
        self.output_types: Mapping[str, TensorType] = {entry["name"]: _type(entry) for entry in opened["outputs"]}
        self.inputs = tuple(self.input_types)
        self.provider = provider
        self.settings: dict[str, Any] = {
            "runtime": f"onnxruntime-web {started['version']}",
            "provider": provider,
            "intra_op_threads": threads,
            "execution": "sequential",
            "graph_optimization": "all",
            "script": script,
            "wasm": wasm,
            "cross_origin_isolated": started["isolated"],
        }

    def _ask(self, name: str, given: dict[str, Any]) -> Any:
        """Call a function of the page. Raises `StageError` if it fails."""
        try:
            return self._host.call(name, given)
        except FailedError as error:
            raise StageError(f"onnxruntime-web fails: {_reason(error)}", where=self._where) from error

    def _open(self, graph: Path) -> dict[str, Any]:
        """Open the graph with its external weights. Raises `ModelError`."""
        others = [graph.with_name(graph.name + suffix) for suffix in WEIGHTS]
        files = [graph, *(path for path in others if path.is_file())]
        for file in files:
            self._server.put(f"model/{file.name}", file)
        model, *weights = [f"model/{file.name}" for file in files]
        try:
            opened: dict[str, Any] = self._host.call("open", {"model": model, "others": weights})
        except FailedError as error:
            raise cannot_open(graph, ModelError(_reason(error))) from error
        return opened

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """See `Session.predict`."""
        from safetensors.numpy import load, save

        # Batches are exchanged as safetensors files over the local server.
        self._server.put(_BATCH, save(self._fed(batch)))
        try:
            self._host.call("predict", {"path": _BATCH})
        except FailedError as error:
            kind = InputError if _INVALID_ARGUMENT.search(str(error)) else StageError
            accepted = [f"{name} {dtype} {list(shape)}" for name, (dtype, shape) in self.input_types.items()]
            message = f"The model fails on the batch: {_reason(error)}"
            raise kind(message, where=self._where, expected=", ".join(accepted)) from error
        outputs: dict[str, np.ndarray] = load(self._server.taken(_BATCH))
        return outputs

    def _fed(self, batch: Batch) -> dict[str, np.ndarray]:
        """Return the batch's inputs as contiguous arrays."""
        check_inputs(self.inputs, batch, self._where)
        return {name: np.asarray(batch[name], order="C") for name in self.inputs}

    def hold(self, batches: Sequence[Batch]) -> None:
        """See `TimesItself.hold`."""
        from safetensors.numpy import save

        fed = [self._fed(batch) for batch in batches]
        named = {f"{index}/{name}": array for index, arrays in enumerate(fed) for name, array in arrays.items()}
        self._server.put(_BATCH, save(named))
        self._ask("hold", {"path": _BATCH})

    def time(self, calls: Sequence[int]) -> list[float]:
        """See `TimesItself.time`."""
        latencies: list[float] = self._ask("time", {"calls": list(calls)})
        return latencies

    def queued_latencies(self, calls: Sequence[int], gaps_ms: Sequence[float]) -> list[float]:
        """See `TimesItself.queued_latencies`."""
        latencies: list[float] = self._ask("queued_latencies", {"calls": list(calls), "gaps": list(gaps_ms)})
        return latencies

    def cpu_seconds(self) -> float:
        """See `TimesItself.cpu_seconds`."""
        return processor_seconds(self._host.process)

    def peak_bytes(self) -> int:
        """See `TimesItself.peak_bytes`."""
        # The system takes back pages that were freed lazily without a note in its peak, so that this may fall.
        self._peak = max(self._peak, peak_bytes(self._host.process))
        return self._peak


class OnnxRuntimeWeb:
    """Runtime that opens graphs in a page or in Node."""

    def __init__(self, name: str, host: type[Chromium] | type[NodeProcess], lacking: Callable[[], str | None]) -> None:
        """Choose the host. ``lacking`` returns why the program that ``host`` starts is missing."""
        self.name = name
        self._host, self._lacking = host, lacking

    def open(self, artifact: Path, target: Target, threads: int) -> Session:
        """Open the graph of ``artifact``, a folder or the file, in either of ONNX Runtime's formats.

        Each part of a diffusion model has its own page. Pages live as long as the session, at most as long as this
        process.
        """
        graphs = model_files(artifact, self.name)
        if len(graphs) > 1 and not is_pipeline(artifact):
            several = f"The model has {len(graphs)} graphs."
            raise ModelError(several, where=str(artifact), expected=f"one, on the target {target.name}")
        check_target(self, target, threads)
        return open_together([self._open(graph, target, threads) for graph in graphs], artifact)

    def _open(self, graph: Path, target: Target, threads: int) -> WebSession:
        """Open one graph in a new host."""
        with ExitStack() as stack:
            server = stack.enter_context(Loopback())
            host: Host = self._host(server, webgpu=target.provider == _WEBGPU)
            stack.callback(host.close)
            session = WebSession(server, host, graph, target.provider, min(threads, self._host.most_threads))
            # The host ends when the session is garbage collected.
            weakref.finalize(session, stack.pop_all().close)
        return session

    def unavailable(self, target: Target) -> str | None:
        """Return why this machine lacks the target: no browser, no Node, or no npm to fetch onnxruntime-web with."""
        if not Path("/proc/self/status").exists():
            return "what it takes of memory and processor is read from Linux's /proc, which this system hasn't"
        if target.provider not in _BUILDS:
            return f"onnxruntime-web has no {target.provider} (it has {', '.join(_BUILDS)})"
        lacking = self._lacking() or (lacking_webgpu() if target.provider == _WEBGPU else None)
        entry = cache_root() / entry_name(_BUILDS[target.provider][0])
        if lacking is not None or shutil.which("npm") or not damage(entry):
            return lacking
        return f"onnxruntime-web {WEB_VERSION} is fetched with npm, which is not on PATH (Debian: apt-get install npm)"

    def fetch(self, target: Target, progress: Progress) -> None:
        """See `Fetches.fetch`."""
        fetch(_BUILDS[target.provider][0], cache_root(), progress)

    def shipped_files(self) -> tuple[Path, ...]:
        """See `Ships.shipped_files`."""
        folder = fetch(PACKAGES, cache_root(), SilentProgress())
        return folder / SCRIPT, folder / WASM

    def build(self) -> str:
        """Return the version of onnxruntime-web, and of the program that runs its WebAssembly."""
        program = find_chromium() if self._host is Chromium else shutil.which("node")
        return f"{WEB_VERSION}, {version_of(program) if program else 'nothing to run it'}"


def _type(entry: Mapping[str, Any]) -> TensorType:
    """Return type and shape of an input or output."""
    return TensorType(entry["dtype"], tuple(entry["shape"]))


def _reason(error: FailedError) -> str:
    """Return ONNX Runtime's message on one line."""
    return _WORDS.sub("", " ".join(str(error).split()), count=1)


RUNTIME = OnnxRuntimeWeb("onnxruntime-web", Chromium, lacking_chromium)
IN_NODE = OnnxRuntimeWeb("onnxruntime-web-node", NodeProcess, lacking_node)
