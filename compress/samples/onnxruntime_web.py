"""ONNX Runtime as WebAssembly and Hugging Face's tokenizers for JavaScript, pinned by digest.

`PACKAGES` has onnxruntime-web's plain build for processors, half as large as the one with WebGPU, which transformers.js
takes.
"""

from __future__ import annotations

from compress.samples.sample import Package, Sample
from compress.targets import WEB_VERSION

SCRIPT, WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
WEBGPU_SCRIPT, WEBGPU_WASM = "ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm"
TOKENIZERS = "tokenizers.min.mjs"
_LICENCE = "MIT (onnxruntime-web, (c) Microsoft Corporation)"


def _runtime(*members: str) -> Package:
    return Package(
        manager="npm",
        distribution="onnxruntime-web",
        version=WEB_VERSION,
        filename=f"onnxruntime-web-{WEB_VERSION}.tgz",
        sha256="d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71",
        download_bytes=33106585,
        licence_member="package/package.json",  # the package has no other word on it
        folder="package/dist",
        members=members,
    )


WEBGPU_PACKAGES = Sample(
    name="onnxruntime-web-webgpu",
    kind="runtime",
    description="ONNX Runtime for web pages, with WebGPU",
    licence=_LICENCE,
    packages=(_runtime(WEBGPU_SCRIPT, WEBGPU_WASM),),
)
PACKAGES = Sample(
    name="onnxruntime-web",
    kind="runtime",
    description="ONNX Runtime for web pages, and the tokenizers of transformers.js",
    licence=f"{_LICENCE}; Apache-2.0 (@huggingface/tokenizers)",
    packages=(
        _runtime(SCRIPT, WASM),
        Package(
            manager="npm",
            distribution="@huggingface/tokenizers",
            version="0.2.0",
            filename="huggingface-tokenizers-0.2.0.tgz",
            sha256="2800014c83b8186b2e4210c20672f1fb65a12cef85d7e95e0f2003e022611b4a",
            download_bytes=87011,
            licence_member="package/LICENSE",
            folder="package/dist",
            members=(TOKENIZERS,),
        ),
    ),
)
