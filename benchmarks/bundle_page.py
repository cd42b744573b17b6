"""Measure a browser bundle: bytes transferred, and the time from page ready to the first answer.

    python benchmarks/bundle_page.py BUNDLE [--message TEXT] [--json]

BUNDLE is a folder that `compress bundle --target browser` wrote. It is served on the loopback address, compressed as
by a web server. Every launch starts Chromium with a fresh profile, so that nothing is cached. A chat page receives
`--message` and displays its own speed.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from compress.formats.onnx.runtimes.chromium import Page, open_page
from compress.formats.onnx.runtimes.javascript import largest_renderer, peak_bytes
from compress.utils.environment import environment

TYPES = {".html": "text/html", ".css": "text/css", ".wasm": "application/wasm"}
TYPES |= dict.fromkeys((".js", ".mjs"), "text/javascript")
BROTLI = """
const [zlib, fs, quality] = [require("zlib"), require("fs"), Number(process.argv[1])];
const content = fs.readFileSync(0), c = zlib.constants;
const params = {[c.BROTLI_PARAM_QUALITY]: quality, [c.BROTLI_PARAM_LGWIN]: 24};
process.stdout.write(zlib.brotliCompressSync(content, {params}));
"""
GZIP = 'process.stdout.write(require("zlib").gzipSync(require("fs").readFileSync(0), {level: 9}))'
TIMES = """(() => {
  const shown = performance.getEntriesByType("navigation")[0].domInteractive;
  const answer = performance.getEntriesByName("first answer")[0].startTime;
  return {from_page_ready_ms: answer - shown, from_navigation_ms: answer};
})()"""
SEND = """(() => {
  document.getElementById("text").value = %s;
  document.getElementById("send").click();
})()"""
REPLIED = re.compile(r"(\d+) tokens?: the first after ([\d.]+) s(?:, then ([\d.]+) a second)?")
CHAT = {"first_token_s": "message to first token, s", "tokens_per_second": "tokens per second after the first"}
FLOOR_BYTES, AIM_BYTES = 12_000_000, 6_000_000
FLOOR_MS, AIM_MS = 3_000, 1_000


def main() -> None:
    """Serve the bundle, visit the page and print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--launches", type=int, default=9)
    parser.add_argument("--encoding", choices=("br", "gzip"), default="br")
    parser.add_argument("--quality", type=int, default=11, help="brotli quality, 0 to 11")
    parser.add_argument("--message", help="message to send to a chat page")
    parser.add_argument("--picture", type=Path, help="write a screenshot of the page with its answer as PNG")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with serve(options.bundle, options.encoding, options.quality) as (port, sent):
        runs = [
            visit(port, sent, options.message, options.picture if launch == 0 else None)
            for launch in range(options.launches)
        ]
    timings = summarize(runs, options.encoding)
    sys.stdout.write(json.dumps(timings, indent=1) + "\n" if options.json else table(timings))


@contextmanager
def serve(folder: Path, encoding: str, quality: int) -> Iterator[tuple[int, dict[str, int]]]:
    """Serve the folder on a free port. Yield the port and the bytes sent per path, which every visit resets."""
    sent: dict[str, int] = {}
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and "examples" not in path.parts)
    files = {
        f"/{path.relative_to(folder).as_posix()}": (path.suffix, encode(path, encoding, quality)) for path in paths
    }

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path not in files or encoding not in self.headers.get("Accept-Encoding", ""):
                self.send_error(404)
                return
            suffix, content = files[self.path]
            self.send_response(200)
            self.send_header("Content-Type", TYPES.get(suffix, "application/octet-stream"))
            self.send_header("Content-Encoding", encoding)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            sent[self.path] = sent.get(self.path, 0) + len(content)

        def log_message(self, *arguments: Any) -> None:
            """Keep standard error free of requests."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1], sent
        server.shutdown()


def encode(path: Path, encoding: str, quality: int) -> bytes:
    """Return the compressed file."""
    command = ["node", "-e", BROTLI, str(quality)] if encoding == "br" else ["node", "-e", GZIP]
    return subprocess.run(command, input=path.read_bytes(), capture_output=True, check=True).stdout


def visit(port: int, sent: dict[str, int], message: str | None, screenshot: Path | None) -> dict[str, Any]:
    """Visit the page with an empty cache, and return times, bytes and what a chat page displays."""
    sent.clear()
    with open_page() as page:
        page.call("Emulation.setDeviceMetricsOverride", width=900, height=600, deviceScaleFactor=1, mobile=False)
        page.call("Page.navigate", url=f"http://127.0.0.1:{port}/index.html")
        chat = {} if message is None else send_message(page, message)
        page.wait_for("document.body && document.body.dataset.answer")
        times = page.evaluate(TIMES) | chat
        if screenshot is not None:
            screenshot.write_bytes(base64.b64decode(page.call("Page.captureScreenshot")["data"]))
    return {**times, "bytes": dict(sent)}


def send_message(page: Page, message: str) -> dict[str, float]:
    """Send a message to a chat page. Return the speed that it displays and its peak memory."""
    page.wait_for("document.body && document.body.dataset.ready")
    page.evaluate(SEND % json.dumps(message))
    page.wait_for("document.body.dataset.answer", seconds=600)
    match = REPLIED.match(page.evaluate("document.getElementById('status').textContent"))
    assert match is not None and match[3] is not None, "the reply has less than two tokens"
    memory = peak_bytes(largest_renderer(psutil.Process(page.browser)))
    return {
        "tokens": int(match[1]),
        "first_token_s": float(match[2]),
        "tokens_per_second": float(match[3]),
        "peak_memory_bytes": memory,
    }


def summarize(runs: list[dict[str, Any]], encoding: str) -> dict[str, Any]:
    """Return medians and raw samples. The bytes must be identical in every visit."""
    (transfer,) = {json.dumps(run["bytes"], sort_keys=True) for run in runs}
    sizes = json.loads(transfer)
    samples = {name: [run[name] for run in runs] for name in runs[0] if name != "bytes"}
    return {
        "encoding": encoding,
        "transfer_bytes": sum(sizes.values()),
        "bytes_by_file": sizes,
        **{name: median(values) for name, values in samples.items()},
        "samples": samples,
        "environment": environment(),
    }


def table(results: dict[str, Any]) -> str:
    """Return a Markdown table, and the sizes of the files in descending order."""
    lines = [f"| quantity | measured | required | aim |\n|---|---|---|---|\n| transfer, {results['encoding']} "]
    lines[-1] += f"| {results['transfer_bytes'] / 1e6:.2f} MB | {FLOOR_BYTES / 1e6:g} MB | {AIM_BYTES / 1e6:g} MB |"
    for name, label in (
        ("from_page_ready_ms", "page ready to first answer"),
        ("from_navigation_ms", "from navigation"),
    ):
        values = results["samples"][name]
        span = f"{min(values):.0f}-{max(values):.0f} in {len(values)} cold launches"
        floor, aim = ("", "") if "tokens" in results else (f"{FLOOR_MS} ms", f"{AIM_MS} ms")
        lines.append(f"| {label} | {results[name]:.0f} ms ({span}) | {floor} | {aim} |")
    for name, label in CHAT.items():
        if name in results:
            values = results["samples"][name]
            lines.append(f"| {label} | {results[name]:.1f} ({min(values):.1f}-{max(values):.1f}) | | |")
    if "peak_memory_bytes" in results:
        lines.append(f"| peak memory of the page | {results['peak_memory_bytes'] / 1e6:.0f} MB | | |")
    lines.append("")
    sizes = sorted(results["bytes_by_file"].items(), key=lambda item: -item[1])
    lines += [f"{size:10,d}  {name}" for name, size in sizes]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
