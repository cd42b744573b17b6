"""The page of a chat model in a real Chromium: offline it replies what transformers replies, token by token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from serving import assert_asks_nobody, go_offline, serve
from toy_bundles import wanted_of
from toy_chat import LONGEST, Right, write_chat_run

from compress.formats.onnx.runtimes.chromium import Page, open_page
from compress.plugins.apps.build import Bundle, build
from compress.plugins.apps.client import TRANSFORMERS_JS
from compress.utils.errors import BundleError
from compress.utils.progress import SilentProgress

pytestmark = pytest.mark.browser
TOKENS, MESSAGE = 20, " Was sagst  du? 👩‍👩‍👧 写一句  \u09ed"
"""Two spaces before a digit that JavaScript's tokenizers take for none."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_run(tmp_path_factory.mktemp("chat") / "run")


@pytest.fixture(scope="module")
def page(run: Path, chromium: str) -> Bundle:
    if shutil.which("npm") is None:
        pytest.skip("no npm here")
    return build(wanted_of(run, "browser"), run.parent / "out", SilentProgress())


def send(tab: Page, message: str) -> None:
    """Type it, and press Enter."""
    tab.evaluate(f"document.getElementById('text').value = {json.dumps(message)}")
    tab.evaluate("document.getElementById('text').dispatchEvent(new KeyboardEvent('keydown', { key: 'Enter' }))")


def test_the_page_replies_offline_and_asks_nobody(page: Bundle, run: Path, chromium: str) -> None:
    right = Right(run)
    assert page.manifest.runtime.package == "npm: @huggingface/transformers"
    with serve(page.folder) as port, open_page(program=chromium) as tab:
        tab.call("Page.navigate", url=f"http://127.0.0.1:{port}/index.html")
        tab.wait_for("document.body && document.body.dataset.ready")
        go_offline(tab)
        tab.evaluate(
            """(() => {
              window.seen = new Set();
              setInterval(() => window.seen.add(document.getElementById("words").textContent));
            })()"""
        )
        send(tab, MESSAGE)
        found = json.loads(tab.wait_for("document.body.dataset.answer"))
        assert found == right.reply(MESSAGE, TOKENS)
        assert tab.evaluate("document.getElementById('words').textContent") == right.text(found).rstrip("\ufffd")
        assert tab.evaluate("window.seen.size") > 4, "it appears token by token"
        send(tab, "x" * LONGEST)
        tab.wait_for("document.getElementById('status').textContent.includes('has 219 tokens')")
        # One that is stopped when something of it is to be seen.
        tab.evaluate(
            """(() => {
              const clock = setInterval(() => {
                if (!document.getElementById("words").textContent) return;
                clearInterval(clock);
                document.getElementById("send").click();
              });
            })()"""
        )
        send(tab, MESSAGE)
        stopped = json.loads(tab.wait_for("document.body.dataset.answer"))
        assert 0 < len(stopped) < TOKENS
        assert stopped == found[: len(stopped)]
        assert_asks_nobody(tab, port)


def test_a_page_that_replies_otherwise_is_not_bundled(page: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(page.folder, tmp_path / "changed"))
    test = json.loads((folder / "selftest.json").read_text())
    test["cases"][1]["reply"]["logits"][3] += 2 * test["tolerance"]
    (folder / "selftest.json").write_text(json.dumps(test))
    with pytest.raises(BundleError, match=r"(?s)answer otherwise .* the reply to \"Write one"):
        TRANSFORMERS_JS.try_out(folder, SilentProgress())
