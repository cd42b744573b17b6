"""transformers.js, and the build of ONNX Runtime for processors that belongs to it, pinned by digest."""

from __future__ import annotations

from compress.samples.sample import Package, Sample

LIBRARY, WASM, WASM_SCRIPT = "transformers.min.js", "ort-wasm-simd-threaded.wasm", "ort-wasm-simd-threaded.mjs"
_RUNTIME = "1.31.0-dev.20260914-8d85527a0"
CLIENT = Sample(
    name="transformers-js",
    kind="runtime",
    description="transformers.js for web pages, with ONNX Runtime as WebAssembly",
    licence="Apache-2.0 (transformers.js); MIT (onnxruntime-web, (c) Microsoft Corporation)",
    packages=(
        Package(
            manager="npm",
            distribution="@huggingface/transformers",
            version="4.3.1",
            filename="huggingface-transformers-4.3.1.tgz",
            sha256="0325441d6bd7bc7697fccb32ee6e5febc7f89691e42402d071adc678237b8015",
            download_bytes=2268123,
            licence_member="package/LICENSE",
            folder="package/dist",
            members=(LIBRARY,),
        ),
        Package(
            manager="npm",
            distribution="onnxruntime-web",
            version=_RUNTIME,
            filename=f"onnxruntime-web-{_RUNTIME}.tgz",
            sha256="0de27582f3e3189dec4a2082513a0af1ea79ae7fd3039bbfe634a526e173cbe0",
            download_bytes=33185781,
            licence_member="package/package.json",  # the package has no other word on it
            folder="package/dist",
            members=(WASM, WASM_SCRIPT),
        ),
    ),
)
