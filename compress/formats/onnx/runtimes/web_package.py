"""ONNX Runtime as WebAssembly and Hugging Face's tokenizers for JavaScript, pinned by digest.

`PACKAGES` has onnxruntime-web's build for processors, which is half as large as the one with WebGPU that
transformers.js uses. `CLIENT` contains that one with transformers.js.
"""

from __future__ import annotations

from compress.data.samples.sample import Package, Sample
from compress.formats.target_profile import WEB_VERSION

SCRIPT, WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
WEBGPU_SCRIPT, WEBGPU_WASM = "ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm"
TOKENIZERS = "tokenizers.min.mjs"
LIBRARY, WASM_SCRIPT = "transformers.min.js", "ort-wasm-simd-threaded.mjs"
_LICENCE = "MIT (onnxruntime-web, (c) Microsoft Corporation)"


def _web_runtime(version: str, sha256: str, download_bytes: int, members: tuple[str, ...]) -> Package:
    """Return onnxruntime-web at a version.

    Args:
        version: The version.
        sha256: Digest of the package.
        download_bytes: Size of the package.
        members: Files to extract.
    """
    return Package(
        manager="npm",
        distribution="onnxruntime-web",
        version=version,
        filename=f"onnxruntime-web-{version}.tgz",
        sha256=sha256,
        download_bytes=download_bytes,
        licence_member="package/package.json",  # the package has no other word on it
        folder="package/dist",
        members=members,
    )


def _pinned(*members: str) -> Package:
    """Return files of onnxruntime-web's pinned version."""
    return _web_runtime(
        WEB_VERSION, "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71", 33106585, members
    )


WEBGPU_PACKAGES = Sample(
    name="onnxruntime-web-webgpu",
    kind="runtime",
    description="ONNX Runtime for web pages, with WebGPU",
    licence=_LICENCE,
    packages=(_pinned(WEBGPU_SCRIPT, WEBGPU_WASM),),
)
PACKAGES = Sample(
    name="onnxruntime-web",
    kind="runtime",
    description="ONNX Runtime for web pages, and the tokenizers of transformers.js",
    licence=f"{_LICENCE}; Apache-2.0 (@huggingface/tokenizers)",
    packages=(
        _pinned(SCRIPT, WASM),
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
CLIENT = Sample(
    name="transformers-js",
    kind="runtime",
    description="transformers.js for web pages, with ONNX Runtime as WebAssembly",
    licence=f"Apache-2.0 (transformers.js); {_LICENCE}",
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
        _web_runtime(
            "1.31.0-dev.20260914-8d85527a0",
            "0de27582f3e3189dec4a2082513a0af1ea79ae7fd3039bbfe634a526e173cbe0",
            33185781,
            (WASM, WASM_SCRIPT),
        ),
    ),
)
