"""What runs a model in a page goes into the bundle, and the page's own code is tried in Node."""

from __future__ import annotations

import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

from compress.bundle.manifest import Licence
from compress.errors import BundleError
from compress.progress import Progress
from compress.samples.fetch import cache_root, fetch
from compress.samples.onnxruntime_web import PACKAGES, SCRIPT, TOKENIZERS, WASM

FOLDER = "runtime"
_SECONDS = 300
_LICENCES = ("MIT, (c) Microsoft Corporation", "Apache-2.0")


def web_licences(tokenizes: bool) -> tuple[Licence, ...]:
    """Of what `copy_web_runtime` puts into a bundle."""
    parts = zip(PACKAGES.packages, _LICENCES, strict=True)
    found = [Licence(of=f"{FOLDER}: {package.requirement}", licence=licence) for package, licence in parts]
    return tuple(found if tokenizes else found[:1])


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


def copy_web_runtime(folder: Path, tokenizes: bool, progress: Progress) -> None:
    """Put the runtime, with tokenizers or without, and its licences into ``folder``; npm fetches what is not cached.

    Raises `SampleError` where npm can't, or gives another file than the pinned one.
    """
    found = fetch(PACKAGES, cache_root(), progress, verify=True)
    folder.mkdir()
    for name in (SCRIPT, WASM):
        shutil.copyfile(found / name, folder / name)
    licence = (files("compress.bundle") / "web" / "LICENSE-onnxruntime-web.txt").read_bytes()
    (folder / "LICENSE-onnxruntime-web.txt").write_bytes(licence)
    if tokenizes:
        shutil.copyfile(found / TOKENIZERS, folder / TOKENIZERS)
        shutil.copyfile(found.parent / "LICENSE-tokenizers.txt", folder / "LICENSE-tokenizers.txt")
