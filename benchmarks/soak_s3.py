"""A registry's copy on S3 (moto) behind a proxy that fails: every acknowledged push must be readable without it.

    PYTHON benchmarks/soak_s3.py --faults 500 --seed 1 [--write]

PYTHON needs s3fs and moto, such as that of the environment S3 in `tests/support/foreign_environments.py`. The proxy
answers with 500 or 503 before or after the request took effect, waits, cuts connections and answers, and stores half of
an upload, or other bytes, as if it were whole. Prints the findings as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from registry import write_run

from compress.plugins.registry import remote as remote_module
from compress.plugins.registry.promotion import PromotionRequest, promote
from compress.plugins.registry.registry import Registry
from compress.plugins.registry.remote import Remote, fetch, pull_remote, push, verify_remote
from compress.plugins.registry.upkeep import verify
from compress.utils.errors import CompressError

URL = "s3://models/reviews"
FAULTS = ("500 before", "503 before", "500 after", "delay", "cut before", "cut answer", "half an upload", "other bytes")
SHARES = {"PUT": 0.25}
"""Share of requests with a fault by method; of others it is 8%."""
_ERROR = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>injected</Message></Error>"
_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive"}
os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


class FaultyProxy(ThreadingHTTPServer):
    """Proxy in front of a server on this machine. ``counts`` are the faults that it injected."""

    daemon_threads = True

    def __init__(self, port: int, seed: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.chance, self.counts = port, random.Random(seed), Counter[str]()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def next_fault(self, method: str) -> str:
        """Return the fault of a request, or an empty text."""
        if self.chance.random() > SHARES.get(method, 0.08):
            return ""
        fault = self.chance.choice(FAULTS if method == "PUT" else FAULTS[:6])
        self.counts[fault] += 1
        return fault


class _Handler(BaseHTTPRequestHandler):
    """Handler of one connection."""

    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.next_fault(self.command)
        if fault == "cut before":
            self.close_connection = True
            return
        if fault in ("500 before", "503 before"):
            self._answer(int(fault[:3]), {}, _ERROR % (b"SlowDown" if fault[0:3] == "503" else b"InternalError"))
            return
        if fault == "delay":
            time.sleep(self.server.chance.uniform(0, 1))
        if fault == "half an upload":
            body = body[: len(body) // 2]
        if fault == "other bytes" and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
        upstream.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
        reply = upstream.getresponse()
        content, length = reply.read(), reply.headers.get("Content-Length")
        upstream.close()
        if fault == "500 after":
            self._answer(500, {}, _ERROR % b"InternalError")
            return
        fields = {name: value for name, value in reply.getheaders() if name.lower() not in _HOP}
        size = int(length) if self.command == "HEAD" and length else len(content)
        is_cut = fault == "cut answer" and self.command != "HEAD"
        self._answer(reply.status, fields, content[: len(content) // 2] if is_cut else content, size)
        self.close_connection |= is_cut

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on  # noqa: N815, the names of the base class

    def _answer(self, status: int, fields: dict[str, str], content: bytes, size: int | None = None) -> None:
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if size is None else size))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(b"" if self.command == "HEAD" else content)


def endpoint(port: int) -> dict[str, Any]:
    """Return the settings of fsspec for a server on this machine."""
    return {
        "client_kwargs": {"endpoint_url": f"http://127.0.0.1:{port}"},
        "config_kwargs": {
            "retries": {"max_attempts": 1},
            "connect_timeout": 2,
            "request_checksum_calculation": "when_required",
        },
    }


def remote(port: int) -> Remote:
    """Return the remote through a port."""
    from fsspec.config import conf
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    conf["s3"] = endpoint(port)
    return Remote(URL)


def repeat(act: Callable[[Remote], object], port: int, errors: Counter[str]) -> None:
    """Act until it succeeds, as a user who gives the same command again."""
    while True:
        try:
            act(remote(port))
            return
        except CompressError as error:
            errors[f"{type(error).__name__}, {error.what.partition(':')[0][:60]}"] += 1


def run(folder: Path, faults: int, seed: int) -> dict[str, Any]:
    """Register, push, fetch and pull through the proxy until there were so many faults, and return the findings."""
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    remote_module.PIECE_BYTES = 10_000
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    direct = server.get_host_and_port()[1]
    S3FileSystem(**endpoint(direct)).mkdir("models")
    proxy, chance, errors, problems = FaultyProxy(direct, seed), random.Random(seed), Counter[str](), list[str]()
    pulled = folder / "pulled"
    registry, copy, versions = Registry(folder / "registry"), Registry(folder / "copy"), 0
    while proxy.counts.total() < faults and not problems:
        model = chance.randbytes(chance.randint(1, 45_000))
        versions += 1
        registry.register(write_run(folder / f"run-{versions}", model), "reviews")
        promote(registry, PromotionRequest(f"reviews@{versions}"))
        port = proxy.server_address[1]
        repeat(lambda far: push(registry, far), port, errors)
        # What was acknowledged is read without the proxy.
        lines, there = registry.log.lines(), remote(direct).lines()
        problems += [] if there == lines else [f"lost: {len(there)} of {len(lines)} lines after push {versions}"]
        problems += [f"corrupted: {fault}" for fault in verify_remote(remote(direct))]
        repeat(lambda far: fetch(copy, far), port, errors)
        problems += [] if copy.log.lines() == lines else [f"lost: {len(copy.log.lines())} lines fetched"]
        problems += [f"corrupted: {fault}" for fault in verify(copy)]
        repeat(lambda far: pull_remote(far, "reviews@champion", pulled), port, errors)
        if (pulled / "model" / "onnx" / "model.onnx").read_bytes() != model:
            problems.append(f"corrupted: version {versions} as it was pulled")
        shutil.rmtree(pulled)
    server.stop()
    return {"faults": dict(proxy.counts), "versions": versions, "errors": dict(errors), "problems": problems}


def main() -> None:
    """Print the findings, and end with 1 if something was lost or corrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write the table to results/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-s3-") as folder:
        findings = run(Path(folder), options.faults, options.seed)
    sys.stdout.write(json.dumps(findings) + "\n")
    from soak_page import show

    rows = [
        ["faults of requests", str(sum(findings["faults"].values())), ""],
        *([name, str(count), ""] for name, count in findings["faults"].items()),
        ["acknowledged pushes, fetches and pulls", f"{findings['versions']} each", ""],
        ["commands that ended with an error and were repeated", str(sum(findings["errors"].values())), ""],
        ["acknowledged pushes lost or corrupted", str(len(findings["problems"])), "0"],
    ]
    if options.write:
        show("A registry's copy on S3 behind a faulty proxy", f"PYTHON {' '.join(sys.argv)}", rows, True)
    sys.exit(bool(findings["problems"]))


if __name__ == "__main__":
    main()
