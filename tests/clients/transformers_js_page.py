"""Runners of transformers.js in Node and in a page of headless Chromium that may only contact our local server."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.formats.onnx.runtimes.chromium import open_page
from compress.formats.onnx.runtimes.javascript import Loopback

_PAGE = b"<!doctype html><link rel=icon href=data:,><title>transformers.js</title>"
_SECONDS = 400


def run_node(script: str, *arguments: str | Path) -> Any:
    """Return the JSON output of a script of this folder."""
    command = ["node", str(Path(__file__).with_name(script)), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def ask_page(
    library: Path, chromium: str, model: Path, function: str, *arguments: Any, files: Mapping[str, bytes] | None = None
) -> Any:
    """Return the result of ``function`` of token_by_token.mjs for the folder ``model``; ``files`` are served too.

    ``library`` is the entry file of the package for Node. Fails if the page sends a request to any other server.
    """
    package, modules = library.parent.parent, library.parents[3]
    with Loopback() as server, open_page(program=chromium) as tab:
        server.put("index.html", _PAGE)
        server.put("token_by_token.mjs", Path(__file__).with_name("token_by_token.mjs"))
        server.put("transformers.mjs", package / "dist" / "transformers.min.js")
        for file in (modules / "onnxruntime-web" / "dist").glob("ort-wasm-simd-threaded*"):
            server.put(f"ort/{file.name}", file)
        for file in filter(Path.is_file, model.rglob("*")):
            server.put(f"models/model/{file.relative_to(model).as_posix()}", file)
        for name, content in (files or {}).items():
            server.put(name, content)
        tab.call("Page.navigate", url=f"{server.address}index.html")
        tab.wait_for("document.title === 'transformers.js'")
        given = ", ".join(map(json.dumps, arguments))
        call = f"import('{server.address}token_by_token.mjs').then((page) => page.{function}({given}))"
        answer = tab.evaluate(call, _SECONDS)
        outside = [url for url in tab.requests if not url.startswith((server.address, "data:", "blob:"))]
        assert (tab.errors, outside) == ([], [])
        return answer
