"""Pages that answer token by token: transformers.js prepares inputs and decodes, by the files in the model's folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from compress.bundle.client import APACHE, MIT, Runs, copy_licence_of_onnxruntime, licence_of
from compress.bundle.manifest import Licence
from compress.errors import BundleError, StageError
from compress.formats.onnx.runtimes.web_package import CLIENT, LIBRARY, WASM, WASM_SCRIPT
from compress.progress import Progress
from compress.runtimes.chromium import NAMES, open_page
from compress.runtimes.loopback import Loopback
from compress.samples.fetch import cache_root, fetch
from compress.targets import AppProfile

_NAME, _PAGE, _LICENCE = "transformers.js", "index.html", "LICENSE-transformers.txt"
_SECONDS = 600


class _TransformersJs:
    """Tried in Chromium, since in Node it takes another runtime than in a page."""

    shared: tuple[str, ...] = ("style.css",)
    prepares = False

    def runs(self, profile: AppProfile) -> Runs:
        """See `Client`."""
        library = CLIENT.packages[0]
        return Runs(_NAME, f"npm: {library.distribution}", library.version)

    def licences(self, tokenizes: bool) -> tuple[Licence, ...]:
        """See `Client`; it has tokenizers in itself."""
        library, runtime = CLIENT.packages
        return licence_of(library, APACHE), licence_of(runtime, MIT)

    def copy(self, folder: Path, tokenizes: bool, progress: Progress) -> None:
        """See `Client`."""
        found = fetch(CLIENT, cache_root(), progress, verify=True)
        for name in (LIBRARY, WASM_SCRIPT, WASM):
            shutil.copyfile(found / name, folder / name)
        copy_licence_of_onnxruntime(folder)
        shutil.copyfile(found.parent / _LICENCE, folder / _LICENCE)

    def try_out(self, folder: Path, progress: Progress) -> None:
        """See `Client`."""
        program = next(filter(None, map(shutil.which, NAMES)), None)
        if program is None:
            progress.note("the page's code was not tried: there is no Chromium on PATH")
            return
        with Loopback() as server, open_page(program=program) as tab:
            for path in filter(Path.is_file, folder.rglob("*")):
                server.put(path.relative_to(folder).as_posix(), path)
            tab.call("Page.navigate", url=f"{server.address}{_PAGE}")
            tab.wait_for("document.body && document.body.dataset.ready", _SECONDS)
            try:
                tab.evaluate(f"import('{server.address}page.mjs').then((page) => page.tryAll())", _SECONDS)
            except StageError as error:
                raise BundleError(
                    f"The page would answer otherwise than ONNX Runtime here: {error}",
                    expected="the self-test's answers",
                ) from error


TRANSFORMERS_JS = _TransformersJs()
