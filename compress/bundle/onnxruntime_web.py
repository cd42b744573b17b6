"""Pages whose own code prepares inputs and reads answers; onnxruntime-web runs the graph."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from compress.bundle.client import APACHE, MIT, Runs, copy_licence_of_onnxruntime, licence_of
from compress.bundle.manifest import Licence
from compress.errors import BundleError
from compress.formats.onnx.runtimes.web_package import PACKAGES, SCRIPT, TOKENIZERS, WASM
from compress.progress import Progress
from compress.samples.fetch import cache_root, fetch
from compress.targets import WEB_VERSION, AppProfile

_SECONDS = 300


class _OnnxruntimeWeb:
    """Tried in Node, which has the same WebAssembly."""

    shared: tuple[str, ...] = ("answer.mjs", "shown.mjs", "style.css")
    prepares = True

    def runs(self, profile: AppProfile) -> Runs:
        """As the target has it."""
        app = profile.apps[profile.target.format]
        return Runs(app.runtime, app.package, WEB_VERSION)

    def licences(self, tokenizes: bool) -> tuple[Licence, ...]:
        """See `Client`."""
        runtime, tokenizers = PACKAGES.packages
        return (licence_of(runtime, MIT), *([licence_of(tokenizers, APACHE)] if tokenizes else []))

    def copy(self, folder: Path, tokenizes: bool, progress: Progress) -> None:
        """See `Client`."""
        found = fetch(PACKAGES, cache_root(), progress, verify=True)
        for name in (SCRIPT, WASM, *([TOKENIZERS] if tokenizes else [])):
            shutil.copyfile(found / name, folder / name)
        copy_licence_of_onnxruntime(folder)
        if tokenizes:
            shutil.copyfile(found.parent / "LICENSE-tokenizers.txt", folder / "LICENSE-tokenizers.txt")

    def try_out(self, folder: Path, progress: Progress) -> None:
        """See `Client`."""
        program = shutil.which("node")
        if program is None:
            progress.note("the page's code was not tried: there is no node on PATH")
            return
        command = [program, "examples/run.mjs", "--selftest"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise BundleError(
                f"The page's code does not answer within {_SECONDS} s.", where=" ".join(command)
            ) from error
        if done.returncode:
            reasons = [line for line in done.stderr.splitlines() if "Error: " in line]
            reason = " ".join(reasons[:1]) or done.stderr[-300:]
            raise BundleError(
                f"The page would answer otherwise than ONNX Runtime here: {reason}",
                expected="the ids and scores of the self-test",
                mend="a tokenizer or an operator that the web runtime does not have alike; bundle for another target",
            )


ONNXRUNTIME_WEB = _OnnxruntimeWeb()
