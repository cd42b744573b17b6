"""transformers.js, and the build of ONNX Runtime for processors that belongs to it, pinned by digest."""

from __future__ import annotations

from compress.formats.onnx.runtimes.web_package import LICENCE, WASM, web_runtime
from compress.samples.sample import Package, Sample

LIBRARY, WASM_SCRIPT = "transformers.min.js", "ort-wasm-simd-threaded.mjs"
CLIENT = Sample(
    name="transformers-js",
    kind="runtime",
    description="transformers.js for web pages, with ONNX Runtime as WebAssembly",
    licence=f"Apache-2.0 (transformers.js); {LICENCE}",
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
        web_runtime(
            "1.31.0-dev.20260914-8d85527a0",
            "0de27582f3e3189dec4a2082513a0af1ea79ae7fd3039bbfe634a526e173cbe0",
            33185781,
            (WASM, WASM_SCRIPT),
        ),
    ),
)
