"""A server with the part of the Hugging Face Hub's API that a push needs, which keeps the uploaded files.

Endpoints and fields are those that `huggingface_hub` 2.4 calls (`hf_api.py`, `_commit_api.py`, `lfs.py`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from huggingface_hub import ModelCard

TOKEN = "hf_a_token_that_nobody_may_see"
COMMIT = "a" * 40


class Hub(ThreadingHTTPServer):
    """A fake Hub. ``repository``: path -> content after the commit; with ``refuses`` commits are forbidden."""

    def __init__(self, refuses: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.refuses = refuses
        self.calls: list[str] = []
        self.created: dict[str, Any] = {}
        self.objects: dict[str, bytes] = {}
        self.repository: dict[str, bytes] = {}
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Discard log messages."""

    def do_HEAD(self) -> None:
        self._file(whole=False)

    def do_GET(self) -> None:
        self._file(whole=True)

    def _file(self, whole: bool) -> None:
        """Send the file of `/OWNER/NAME/resolve/main/PATH`; only its headers unless ``whole``."""
        self.server.calls.append(self.path)
        content = self.server.repository.get(self.path.partition("/resolve/main/")[2])
        self.send_response(404 if content is None else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if whole:
            self.wfile.write(content or b"")

    def do_PUT(self) -> None:
        content = self._body()
        self.server.objects[hashlib.sha256(content).hexdigest()] = content
        self._answer({})

    def do_POST(self) -> None:
        hub, body = self.server, self._body()
        hub.calls.append(self.path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            hub.created = json.loads(body)
            self._answer({"url": f"{hub.address}/{hub.created['organization']}/{hub.created['name']}"})
        elif self.path == "/api/validate-yaml":
            ModelCard(json.loads(body)["content"])
            self._answer({"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(".onnx") else "regular" for path in paths}
            self._answer(
                {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]}
            )
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for entry in objects:
                entry["actions"] = {"upload": {"href": f"{hub.address}/objects/{entry['oid']}"}}
            self._answer({"transfer": "basic", "objects": objects})
        elif self.path.endswith("/commit/main") and hub.refuses:
            self._answer({"error": "You may not write here"}, 403)
        elif self.path.endswith("/commit/main"):
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._answer({"error": "Not found"}, 404)

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines[1:]:
            value = line["value"]
            content = base64.b64decode(value["content"]) if line["key"] == "file" else self.server.objects[value["oid"]]
            self.server.repository[value["path"]] = content
        repository = "{organization}/{name}".format(**self.server.created)
        address = f"{self.server.address}/{repository}/commit/{COMMIT}"
        self._answer({"success": True, "commitOid": COMMIT, "commitUrl": address})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        written = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(written)))
        self.end_headers()
        self.wfile.write(written)


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve the hub while the context is open."""
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
