"""What a browser bundle costs a visitor: bytes over the wire, and the time from the page's first sight to its answer.

BUNDLE is a folder that `compress bundle --target browser` wrote. It is served on the loopback address, each file
compressed as a web server would send it; every launch is a Chromium with a fresh profile, so that nothing is cached.
A chat's page is sent ``--message``, and says itself how fast it replied.
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
CHAT = {"first_token_s": "message to first token, s", "tokens_per_second": "then tokens a second"}
FLOOR_BYTES, AIM_BYTES = 12_000_000, 6_000_000
FLOOR_MS, AIM_MS = 3_000, 1_000


def main() -> None:
    """Serve, launch, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--launches", type=int, default=9)
    parser.add_argument("--encoding", choices=("br", "gzip"), default="br")
    parser.add_argument("--quality", type=int, default=11, help="of brotli, 0 to 11")
    parser.add_argument("--message", help="what a chat's page is sent")
    parser.add_argument("--picture", type=Path, help="write the page, answered, as a PNG")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with serve(options.bundle, options.encoding, options.quality) as (port, sent):
        runs = [
            visit(port, sent, options.message, options.picture if launch == 0 else None)
            for launch in range(options.launches)
        ]
    timings = figures(runs, options.encoding)
    sys.stdout.write(json.dumps(timings, indent=1) + "\n" if options.json else words(timings))


@contextmanager
def serve(folder: Path, encoding: str, quality: int) -> Iterator[tuple[int, dict[str, int]]]:
    """The folder on a free port, and the bytes of bodies sent by path, which a visit empties."""
    sent: dict[str, int] = {}
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and "examples" not in path.parts)
    ready = {
        f"/{path.relative_to(folder).as_posix()}": (path.suffix, packed(path, encoding, quality)) for path in paths
    }

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path not in ready or encoding not in self.headers.get("Accept-Encoding", ""):
                self.send_error(404)
                return
            suffix, content = ready[self.path]
            self.send_response(200)
            self.send_header("Content-Type", TYPES.get(suffix, "application/octet-stream"))
            self.send_header("Content-Encoding", encoding)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            sent[self.path] = sent.get(self.path, 0) + len(content)

        def log_message(self, *arguments: Any) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1], sent
        server.shutdown()


def packed(path: Path, encoding: str, quality: int) -> bytes:
    """The file as it goes over the wire."""
    command = ["node", "-e", BROTLI, str(quality)] if encoding == "br" else ["node", "-e", GZIP]
    return subprocess.run(command, input=path.read_bytes(), capture_output=True, check=True).stdout


def visit(port: int, sent: dict[str, int], message: str | None, picture: Path | None) -> dict[str, Any]:
    """One cold visit."""
    sent.clear()
    with open_page() as page:
        page.call("Emulation.setDeviceMetricsOverride", width=900, height=600, deviceScaleFactor=1, mobile=False)
        page.call("Page.navigate", url=f"http://127.0.0.1:{port}/index.html")
        chat = {} if message is None else chatted(page, message)
        page.wait_for("document.body && document.body.dataset.answer")
        times = page.evaluate(TIMES) | chat
        if picture is not None:
            look(page, picture)
    return {**times, "bytes": dict(sent)}


def chatted(page: Page, message: str) -> dict[str, float]:
    """What a chat's page says of its reply, and its memory."""
    page.wait_for("document.body && document.body.dataset.ready")
    page.evaluate(SEND % json.dumps(message))
    page.wait_for("document.body.dataset.answer", seconds=600)
    match = REPLIED.match(page.evaluate("document.getElementById('status').textContent"))
    assert match is not None and match[3] is not None, "a reply of two tokens or more"
    memory = peak_bytes(largest_renderer(psutil.Process(page.browser)))
    return {
        "tokens": int(match[1]),
        "first_token_s": float(match[2]),
        "tokens_per_second": float(match[3]),
        "peak_memory_bytes": memory,
    }


def look(page: Page, picture: Path) -> None:
    """The page as it is seen."""
    picture.write_bytes(base64.b64decode(page.call("Page.captureScreenshot")["data"]))


def figures(runs: list[dict[str, Any]], encoding: str) -> dict[str, Any]:
    """Medians with the raw samples; bytes must be the same in every visit."""
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


def words(found: dict[str, Any]) -> str:
    """The figures as a table, the largest files first."""
    lines = [f"| what | found | floor | aim |\n|---|---|---|---|\n| transfer, {found['encoding']} "]
    lines[-1] += f"| {found['transfer_bytes'] / 1e6:.2f} MB | {FLOOR_BYTES / 1e6:g} MB | {AIM_BYTES / 1e6:g} MB |"
    for name, shown in (
        ("from_page_ready_ms", "page ready to first answer"),
        ("from_navigation_ms", "from navigation"),
    ):
        values = found["samples"][name]
        span = f"{min(values):.0f}-{max(values):.0f} in {len(values)} cold launches"
        floor, aim = ("", "") if "tokens" in found else (f"{FLOOR_MS} ms", f"{AIM_MS} ms")
        lines.append(f"| {shown} | {found[name]:.0f} ms ({span}) | {floor} | {aim} |")
    for name, shown in CHAT.items():
        if name in found:
            values = found["samples"][name]
            lines.append(f"| {shown} | {found[name]:.1f} ({min(values):.1f}-{max(values):.1f}) | | |")
    if "peak_memory_bytes" in found:
        lines.append(f"| peak memory of the page | {found['peak_memory_bytes'] / 1e6:.0f} MB | | |")
    lines.append("")
    sizes = sorted(found["bytes_by_file"].items(), key=lambda item: -item[1])
    lines += [f"{size:10,d}  {name}" for name, size in sizes]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
