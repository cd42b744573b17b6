"""The page of the real Whisper in integers, in Chromium: it hears what ONNX Runtime hears here, and asks nobody."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from serving import assert_asks_nobody, go_offline, serve
from toy_bundles import RECIPE, wanted_of

from compress.data.samples.fetch import sample_directory
from compress.formats.onnx.runtimes.chromium import open_page
from compress.plugins.apps.build import Bundle, build
from compress.utils.progress import SilentProgress

pytestmark = [pytest.mark.slow, pytest.mark.browser]
SECONDS = 300


@pytest.fixture(scope="module")
def page(whisper: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    if shutil.which("npm") is None:
        pytest.skip("no npm here")
    run = tmp_path_factory.mktemp("speech")
    shutil.copytree(whisper["integers"], run / "model")
    (run / "recipe.yaml").write_text(RECIPE.replace("text-classification", "automatic-speech-recognition"))
    rows = pq.read_table(sample_directory("librivox") / "test.parquet").to_pylist()
    samples = [run / f"{number}.flac" for number in (1, 4)]
    for path in samples:
        path.write_bytes(rows[int(path.stem)]["audio"]["bytes"])
    return build(wanted_of(run, "browser", samples=tuple(map(str, samples))), run / "out", SilentProgress())


def test_the_page_hears_offline_and_asks_nobody(page: Bundle, chromium: str) -> None:
    assert page.manifest.runtime.package == "npm: @huggingface/transformers"
    cases = json.loads((Path(page.folder) / "selftest.json").read_text())["cases"]
    assert cases[1]["transcript"] == "He might even have been made amiable himself."
    with serve(page.folder) as port, open_page(program=chromium) as tab:
        tab.call("Page.navigate", url=f"http://127.0.0.1:{port}/index.html")
        tab.wait_for("document.body && document.body.dataset.ready", SECONDS)
        # The recordings come from the page's own server; what is dropped needs none.
        tab.evaluate("(async () => { window.kept = await (await fetch('samples/2.wav')).blob(); })()")
        go_offline(tab)
        tab.evaluate(
            """(() => {
              const given = new DataTransfer();
              given.items.add(new File([window.kept], "speech.wav", { type: "audio/wav" }));
              dispatchEvent(new DragEvent("drop", { dataTransfer: given, bubbles: true, cancelable: true }));
            })()"""
        )
        assert tab.wait_for("document.body.dataset.answer", SECONDS) == cases[1]["transcript"]
        assert tab.evaluate("document.getElementById('words').textContent") == cases[1]["transcript"]
        tab.evaluate(
            "dispatchEvent(Object.assign(new Event('drop'), { dataTransfer: { files: [new Blob(['no sound'])] } }))"
        )
        tab.wait_for("document.getElementById('status').textContent.includes('no recording')")
        assert_asks_nobody(tab, port)
