"""What runs a model in a page: ONNX Runtime as WebAssembly and Hugging Face's tokenizers, pinned by digest.

This is onnxruntime-web's plain build for processors, half as large as the one with WebGPU that transformers.js takes.
"""

from __future__ import annotations

import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

from compress.bundle.manifest import Licence
from compress.errors import BundleError
from compress.progress import Progress
from compress.samples.fetch import cache_root, fetch
from compress.samples.sample import Package, Sample
from compress.targets import WEB_VERSION

FOLDER = "runtime"
WASM = "ort-wasm-simd-threaded.wasm"
_SECONDS = 300
_SCRIPT, _TOKENIZERS = "ort.wasm.bundle.min.mjs", "tokenizers.min.mjs"
PACKAGES = Sample(
    name="onnxruntime-web",
    kind="runtime",
    description="ONNX Runtime for web pages, and the tokenizers of transformers.js",
    licence="MIT (onnxruntime-web, (c) Microsoft Corporation); Apache-2.0 (@huggingface/tokenizers)",
    packages=(
        Package(
            manager="npm",
            distribution="onnxruntime-web",
            version=WEB_VERSION,
            filename=f"onnxruntime-web-{WEB_VERSION}.tgz",
            sha256="d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71",
            download_bytes=33106585,
            licence_member="package/package.json",  # the package has no other word on it
            folder="package/dist",
            members=(_SCRIPT, WASM),
        ),
        Package(
            manager="npm",
            distribution="@huggingface/tokenizers",
            version="0.2.0",
            filename="huggingface-tokenizers-0.2.0.tgz",
            sha256="2800014c83b8186b2e4210c20672f1fb65a12cef85d7e95e0f2003e022611b4a",
            download_bytes=87011,
            licence_member="package/LICENSE",
            folder="package/dist",
            members=(_TOKENIZERS,),
        ),
    ),
)
LICENCES = tuple(
    Licence(of=f"{FOLDER}: {package.requirement}", licence=licence)
    for package, licence in zip(PACKAGES.packages, ("MIT, (c) Microsoft Corporation", "Apache-2.0"), strict=True)
)


def try_in_node(folder: Path, progress: Progress) -> None:
    """Run the self-test of a bundle that was just made by the page's own code, where there is a Node.

    Raises `BundleError` where its ids or scores are others than those of ONNX Runtime here.
    """
    program = shutil.which("node")
    if program is None:
        progress.note("the page's code was not tried: there is no node on PATH")
        return
    command = [program, "examples/run.mjs", "--selftest"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise BundleError(f"The page's code does not answer within {_SECONDS} s.", where=" ".join(command)) from error
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if "Error: " in line]
        raise BundleError(
            f"The page would answer otherwise than ONNX Runtime here: {' '.join(reasons[:1]) or done.stderr[-300:]}",
            expected="the ids and scores of the self-test",
            mend="a tokenizer or an operator that the web runtime does not have alike; bundle for another target",
        )


def copy_web_runtime(folder: Path, progress: Progress) -> None:
    """Put the runtime and its licences into ``folder``; fetched with npm if the cache has not got it.

    Raises `SampleError` where npm can't, or gives another file than the pinned one.
    """
    found = fetch(PACKAGES, cache_root(), progress, verify=True)
    folder.mkdir()
    for name in (_SCRIPT, WASM, _TOKENIZERS):
        shutil.copyfile(found / name, folder / name)
    shutil.copyfile(found.parent / "LICENSE-tokenizers.txt", folder / "LICENSE-tokenizers.txt")
    licence = (files("compress.bundle") / "web" / "LICENSE-onnxruntime-web.txt").read_bytes()
    (folder / "LICENSE-onnxruntime-web.txt").write_bytes(licence)
