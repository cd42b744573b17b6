"""The ONNX format: its stage, runtimes, targets and hooks."""

from __future__ import annotations

from compress.formats.spec import FormatSpec, RuntimeSpec
from compress.formats.target_profile import App, Target, TargetProfile

_RUNTIMES = "compress.formats.onnx.runtimes"
CPU = "CPUExecutionProvider"
APPS = {
    "android": App("onnxruntime-android", "Maven: com.microsoft.onnxruntime:onnxruntime-android"),
    "ios": App("onnxruntime-swift-package-manager", "Swift: microsoft/onnxruntime-swift-package-manager"),
    "linux-arm64": App("onnxruntime", "PyPI: onnxruntime"),
    "desktop": App("onnxruntime", "PyPI: onnxruntime"),
}
"""Package that runs a graph in an app, as ONNX or in ONNX Runtime's own format, by platform."""
FORMAT = FormatSpec(
    name="onnx",
    rank=0,
    suffix=".onnx",
    stage="compress.formats.onnx.stage:Onnx",
    written_by="onnx",
    runtimes={
        "onnxruntime": RuntimeSpec(
            runtime=f"{_RUNTIMES}.onnxruntime:RUNTIME",
            provider=CPU,
            package="onnxruntime",
            on_devices=True,
            gives_values=True,
        ),
        "onnxruntime-web": RuntimeSpec(
            runtime=f"{_RUNTIMES}.web:RUNTIME", provider="wasm", one_batch_at_a_time=True, gives_values=True
        ),
        "onnxruntime-web-node": RuntimeSpec(
            runtime=f"{_RUNTIMES}.web:IN_NODE", provider="wasm", one_batch_at_a_time=True, gives_values=True
        ),
        "onnxruntime-genai": RuntimeSpec(
            runtime=f"{_RUNTIMES}.genai:RUNTIME", provider="cpu", package="onnxruntime-genai", generates_only=True
        ),
    },
    targets=(
        TargetProfile(Target("cpu", "onnxruntime", CPU, "ONNX Runtime on this machine's processor", "onnx")),
        TargetProfile(Target("gpu", "onnxruntime", "CUDAExecutionProvider", "ONNX Runtime on an NVIDIA GPU", "onnx")),
        TargetProfile(
            Target("genai", "onnxruntime-genai", "cpu", "onnxruntime-genai on this machine's processor", "onnx")
        ),
        TargetProfile(
            Target("node", "onnxruntime-web-node", "wasm", "the browser's WebAssembly in Node", "onnx"), threads=1
        ),
        TargetProfile(
            Target("browser-webgpu", "onnxruntime-web", "webgpu", "a web page on a GPU (WebGPU)", "onnx"), threads=1
        ),
    ),
    taken_by={"browser": App("onnxruntime-web", "npm: onnxruntime-web", ("node",)), **APPS},
    find_all="compress.formats.onnx.model:find_graphs",
    inspector="compress.formats.onnx.stored_tensors:INSPECTOR",
    tensors="compress.formats.onnx.stored_tensors:read_tensors",
    signature="compress.formats.onnx.stored_tensors:read_signature",
    value_graph="compress.formats.onnx.intermediate_values:open_value_graph",
    library="onnxruntime",
    check_writable="compress.formats.onnx.decoder.trace:check_writable",
)
