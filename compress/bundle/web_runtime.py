"""What runs a model in a page goes into the bundle, and the page's own code is tried in Node."""

from __future__ import annotations

import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

from compress.bundle.kind import Kind
from compress.bundle.manifest import Licence
from compress.errors import BundleError, StageError
from compress.progress import Progress
from compress.runtimes.chromium import NAMES, open_page
from compress.runtimes.loopback import Loopback
from compress.samples.fetch import cache_root, fetch
from compress.samples.onnxruntime_web import PACKAGES, SCRIPT, TOKENIZERS, WASM
from compress.samples.transformers_js import CLIENT, LIBRARY, WASM_SCRIPT
from compress.targets import WEB_VERSION, AppProfile

FOLDER, PAGE = "runtime", "index.html"
_SECONDS = 300
_MIT, _APACHE = "MIT, (c) Microsoft Corporation", "Apache-2.0"


def web_licences(kind: Kind) -> tuple[Licence, ...]:
    """Of what `copy_web_runtime` puts into a bundle."""
    if kind.client == "transformers.js":
        parts = [*zip(CLIENT.packages, (_APACHE, _MIT), strict=True)]
    else:
        parts = [*zip(PACKAGES.packages, (_MIT, _APACHE), strict=True)][: 1 + kind.inputs.tokenizes]
    return tuple(Licence(of=f"{FOLDER}: {package.requirement}", licence=licence) for package, licence in parts)


def web_runtime(kind: Kind, profile: AppProfile) -> tuple[str, str, str]:
    """Name, package and version of what a page of that kind runs on."""
    if kind.client == "transformers.js":
        library = CLIENT.packages[0]
        return kind.client, f"npm: {library.distribution}", library.version
    app = profile.apps["onnx"]
    return app.runtime, app.package, WEB_VERSION


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


def try_in_page(folder: Path, progress: Progress) -> None:
    """Run the self-test of a bundle that was just made in its own page, where there is a Chromium.

    Raises `BundleError` where it answers otherwise than ONNX Runtime here.
    """
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        progress.note("the page's code was not tried: there is no Chromium on PATH")
        return
    with Loopback() as server, open_page(program=program) as tab:
        for path in filter(Path.is_file, folder.rglob("*")):
            server.put(path.relative_to(folder).as_posix(), path)
        tab.call("Page.navigate", url=f"{server.address}{PAGE}")
        tab.wait_for("document.body && document.body.dataset.ready", _SECONDS)
        try:
            tab.evaluate(f"import('{server.address}page.mjs').then((page) => page.tryAll())", _SECONDS)
        except StageError as error:
            raise BundleError(
                f"The page would answer otherwise than ONNX Runtime here: {error}", expected="the self-test's answers"
            ) from error


def copy_web_runtime(folder: Path, kind: Kind, progress: Progress) -> None:
    """Put what a page of that kind runs on, and its licences, into ``folder``; npm fetches what is not cached.

    Raises `SampleError` where npm can't, or gives another file than the pinned one.
    """
    library = kind.client == "transformers.js"
    found = fetch(CLIENT if library else PACKAGES, cache_root(), progress, verify=True)
    folder.mkdir()
    for name in (LIBRARY, WASM_SCRIPT, WASM) if library else (SCRIPT, WASM):
        shutil.copyfile(found / name, folder / name)
    licence = (files("compress.bundle") / "web" / "LICENSE-onnxruntime-web.txt").read_bytes()
    (folder / "LICENSE-onnxruntime-web.txt").write_bytes(licence)
    if library:
        shutil.copyfile(found.parent / "LICENSE-transformers.txt", folder / "LICENSE-transformers.txt")
    elif kind.inputs.tokenizes:
        shutil.copyfile(found / TOKENIZERS, folder / TOKENIZERS)
        shutil.copyfile(found.parent / "LICENSE-tokenizers.txt", folder / "LICENSE-tokenizers.txt")
