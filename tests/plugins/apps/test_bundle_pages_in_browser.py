"""Tests of bundle pages in Chromium and Node: predictions against transformers, and no external requests."""

from __future__ import annotations

import base64
import functools
import io
import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
from many_lines import LINES, lines
from PIL import Image, ImageCms
from serving import SHOWN, assert_asks_nobody, go_offline, open_bundle, serve
from toy_bundles import (
    EMBEDDINGS,
    IMAGE_MATRIX,
    LABELS,
    RECIPE,
    WIDTH,
    changed_json,
    graph,
    tokenizer,
    wanted_of,
    write_encoder_run,
    write_image_run,
    write_run,
)
from toy_chat import LONGEST, Right, write_chat_run
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from compress.data.samples.fetch import sample_directory
from compress.formats.onnx.runtimes.chromium import Page, open_page
from compress.models.sentence_modules import Normalize, SentenceModules
from compress.plugins.apps.build import Bundle, build
from compress.plugins.apps.client import ONNXRUNTIME_WEB, TRANSFORMERS_JS
from compress.plugins.apps.image import noise, synthetic_images
from compress.utils.errors import BundleError
from compress.utils.progress import SilentProgress

LENGTH = 100


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, npm: None) -> Bundle:
    """Build a browser bundle with MiniLM's tokenizer and random embeddings [30522, 256]."""
    folder = tmp_path_factory.mktemp("page")
    run = write_run(folder / "run")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(sample_directory("minilm") / name, run / "model" / name)
    model = graph()
    table = next(tensor for tensor in model.graph.initializer if tensor.name == "table")
    drawn = np.random.default_rng(1).normal(size=(30522, 256)).astype(np.float32)
    table.CopyFrom(onnx.numpy_helper.from_array(drawn, "table"))
    onnx.save(model, run / "model" / "onnx" / "model.onnx")
    wishes = wanted_of(run, "browser")
    data = wishes.recipe.data.model_copy(update={"max_length": LENGTH})
    recipe = wishes.recipe.model_copy(update={"data": data})
    return build(replace(wishes, recipe=recipe), folder / "bundle", SilentProgress())


def expected(page: Bundle, text: str) -> dict[str, float]:
    """Return the probability of each label in percent, from ONNX Runtime and transformers' tokenizer."""
    import onnxruntime
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(page.folder / "model")(text, truncation=True, max_length=LENGTH)["input_ids"]
    session = onnxruntime.InferenceSession(page.folder / page.manifest.model, providers=["CPUExecutionProvider"])
    row = np.array([ids], dtype=np.int64)
    logits = session.run(None, {"input_ids": row, "attention_mask": np.ones_like(row)})[0][0]
    shares = 100 * np.exp(logits) / np.exp(logits).sum()
    return dict(zip(LABELS, shares.tolist(), strict=True))


@pytest.fixture(scope="module")
def port(page: Bundle) -> Iterator[int]:
    with serve(page.folder) as served_port:
        yield served_port


@pytest.mark.browser
@pytest.mark.slow
def test_page_classifies_offline_without_external_requests(page: Bundle, port: int, chromium: str) -> None:
    with open_page(program=chromium) as tab:
        tab.call("Page.navigate", url=f"http://127.0.0.1:{port}/index.html")
        tab.wait_for("document.body && document.body.dataset.answer")
        go_offline(tab)
        for text in ("dull and far too long", "ein Film über 映画 👍🏽, " * 20):
            tab.evaluate(
                f"document.getElementById('text').value = {json.dumps(text)}; document.body.dataset.answer = ''"
            )
            tab.evaluate("document.getElementById('text').dispatchEvent(new Event('input'))")
            answer = tab.wait_for("document.body.dataset.answer")
            right = expected(page, text)
            assert answer == max(right, key=lambda label: right[label])
            assert tab.evaluate(SHOWN) == pytest.approx(right, abs=0.06)
        assert_asks_nobody(tab, port)


@pytest.mark.slow
def test_page_with_different_token_ids_is_refused(page: Bundle) -> None:
    folder = page.folder.parent / "changed"
    shutil.copytree(page.folder, folder)
    with changed_json(folder / "selftest.json") as test:
        test["cases"][2]["input_ids"][1] += 1
    with pytest.raises(BundleError, match=r"answer otherwise .* other ids of \"I don't know what"):
        ONNXRUNTIME_WEB.try_out(folder, SilentProgress())


@pytest.mark.slow
def test_node_token_ids_equal_transformers_on_ten_thousand_lines(page: Bundle, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    output = subprocess.run(
        ["node", str(page.folder / "examples" / "run.mjs"), "--selftest"], capture_output=True, text=True, check=True
    ).stdout
    assert output.startswith("passed")
    asked = lines()
    (tmp_path / "lines.json").write_text(json.dumps(asked))
    done = subprocess.run(
        ["node", str(Path(__file__).parent / "ids.mjs"), str(page.folder), str(tmp_path / "lines.json")],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    processor = AutoTokenizer.from_pretrained(page.folder / "model")
    right = processor(asked, truncation=True, max_length=LENGTH)["input_ids"]
    answer = json.loads(done.stdout)
    wrong = [line for line, ours, theirs in zip(asked, right, answer, strict=True) if ours != theirs]
    assert (len(answer), wrong[:3]) == (LINES, [])


TOKENS, MESSAGE = 20, " Was sagst  du? 👩‍👩‍👧 写一句  \u09ed"
"""The message has two spaces before a digit that JavaScript tokenizers do not treat as one."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_run(tmp_path_factory.mktemp("chat") / "run")


@pytest.fixture(scope="module")
def chat_page(run: Path, chromium: str, npm: None) -> Bundle:
    return build(wanted_of(run, "browser"), run.parent / "out", SilentProgress())


def send(tab: Page, message: str) -> None:
    """Type the message into the page and press Enter."""
    tab.evaluate(f"document.getElementById('text').value = {json.dumps(message)}")
    tab.evaluate("document.getElementById('text').dispatchEvent(new KeyboardEvent('keydown', { key: 'Enter' }))")


@pytest.mark.browser
def test_page_replies_offline_without_external_requests(chat_page: Bundle, run: Path, chromium: str) -> None:
    right = Right(run)
    assert chat_page.manifest.runtime.package == "npm: @huggingface/transformers"
    with open_bundle(chat_page.folder, chromium) as (tab, port):
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
        # A reply that is stopped when its first tokens are visible.
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


@pytest.mark.browser
def test_page_with_different_reply_logits_is_refused(chat_page: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(chat_page.folder, tmp_path / "changed"))
    with changed_json(folder / "selftest.json") as test:
        test["cases"][1]["reply"]["logits"][3] += 2 * test["tolerance"]
    with pytest.raises(BundleError, match=r"(?s)answer otherwise .* the reply to \"Write one"):
        TRANSFORMERS_JS.try_out(folder, SilentProgress())


@pytest.fixture(scope="module")
def picture_page(tmp_path_factory: pytest.TempPathFactory, npm: None) -> Bundle:
    folder = tmp_path_factory.mktemp("pictures")
    return build(wanted_of(write_image_run(folder / "run"), "browser"), folder / "bundle", SilentProgress())


@pytest.fixture(scope="module")
def tab(picture_page: Bundle, chromium: str) -> Iterator[tuple[Page, int]]:
    """Open the image page, wait for its first prediction, cut the network, and yield the tab and the port."""
    with open_bundle(picture_page.folder, chromium, "answer") as (opened, port):
        go_offline(opened)
        yield opened, port


@functools.cache
def photo() -> Image.Image:
    """Return a smooth 400x300 landscape image."""
    return Image.open(io.BytesIO(synthetic_images()[0])).resize((400, 300), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def upright(content: bytes) -> Image.Image:
    """Return the file as Python decodes it: upright and composited on white (docs/guides/apps.md)."""
    from collections import Counter

    from compress.data.media import decode, media

    return decode(media(content, None) or {}, "RGB", Counter())


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 8
    return encoded(photo(), "JPEG", quality=92, exif=exif)


def soft() -> bytes:
    rgba = noise(60, 40, "RGB").convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(rgba.size))
    return encoded(rgba, "PNG")


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
FILES = {
    # (file, largest and mean allowed difference in 8-bit levels)
    "png": (encoded(noise(61, 43, "RGB"), "PNG"), 0, 0.0),
    "gray": (encoded(noise(61, 43, "L"), "PNG"), 0, 0.0),
    "webp": (encoded(noise(61, 43, "RGB"), "WEBP", lossless=True), 0, 0.0),
    "profile": (encoded(photo(), "PNG", icc_profile=PROFILE), 0, 0.0),
    "jpeg": (encoded(photo(), "JPEG", quality=92), 4, 0.5),
    "turned": (turned(), 4, 0.5),
    "transparent": (soft(), 1, 0.5),
}


def blob(content: bytes) -> str:
    """Return a JavaScript expression that creates the file."""
    letters = base64.b64encode(content).decode()
    return f"new File([Uint8Array.from(atob('{letters}'), (mark) => mark.charCodeAt(0))], 'x', {{type: 'image/*'}})"


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("name", FILES)
def test_page_decodes_images_like_pillow(tab: tuple[Page, int], name: str) -> None:
    content, most, mean = FILES[name]
    right = np.asarray(upright(content), int)
    found = tab[0].evaluate(
        f"""(async () => {{
          const {{ pictureOf }} = await import("./picture.mjs"), {{ openPreparation }} = await import("./prepare.mjs");
          const rule = {{ channels: "RGB", mean: [0, 0, 0], std: [1, 1, 1], rescale_factor: 1, input: "x" }};
          const way = await openPreparation({{ preprocessing: rule }});
          const {{ data, shape }} = way.prepare(await pictureOf({blob(content)}));
          return [shape, Array.from(data)];
        }})()"""
    )
    pixels = np.array(found[1], int).reshape(found[0])[0].transpose(1, 2, 0)
    assert pixels.shape == right.shape
    apart = np.abs(pixels - right)
    assert (apart.max() <= most, apart.mean() <= mean) == (True, True), (apart.max(), apart.mean())


@pytest.mark.slow
@pytest.mark.browser
def test_page_classifies_dropped_images_offline(picture_page: Bundle, tab: tuple[Page, int]) -> None:
    opened, port = tab
    processor = ViTImageProcessorPil.from_pretrained(picture_page.folder / "model")
    for content, kind, event in ((turned(), "drop", "dataTransfer"), (soft(), "paste", "clipboardData")):
        opened.evaluate("document.body.dataset.answer = ''")
        opened.evaluate(
            f"""(() => {{
              const transfer = new DataTransfer();
              transfer.items.add(new File([{blob(content)}], "photo", {{type: "image/jpeg"}}));
              const event = new Event("{kind}", {{bubbles: true, cancelable: true}});
              Object.defineProperty(event, "{event}", {{value: transfer}});
              document.body.dispatchEvent(event);
            }})()"""
        )
        answer = opened.wait_for("document.body.dataset.answer")
        logits = np.asarray(processor([upright(content)])["pixel_values"]).reshape(1, -1) @ IMAGE_MATRIX
        shares = 100 * (np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())[0]
        right = dict(zip(LABELS, shares.tolist(), strict=True))
        assert answer == max(right, key=lambda label: right[label])
        assert opened.evaluate(SHOWN) == pytest.approx(right, abs=3)
    opened.evaluate("document.getElementById('status').className = ''")
    choose = "document.querySelector('input[type=file]')"
    opened.evaluate(
        f"""(() => {{
          const transfer = new DataTransfer();
          transfer.items.add(new File(["no picture"], "x.png", {{type: "image/png"}}));
          {choose}.files = transfer.files;
          {choose}.dispatchEvent(new Event("change"));
        }})()"""
    )
    opened.wait_for("document.getElementById('status').className === 'failed'")
    assert "no picture that the browser can show" in opened.evaluate("document.getElementById('status').textContent")
    assert_asks_nobody(opened, port)


SECONDS = 300


@pytest.fixture(scope="module")
def speech_page(whisper: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, npm: None) -> Bundle:
    run = tmp_path_factory.mktemp("speech")
    shutil.copytree(whisper["integers"], run / "model")
    (run / "recipe.yaml").write_text(RECIPE.replace("text-classification", "automatic-speech-recognition"))
    rows = pq.read_table(sample_directory("librivox") / "test.parquet").to_pylist()
    samples = [run / f"{number}.flac" for number in (1, 4)]
    for path in samples:
        path.write_bytes(rows[int(path.stem)]["audio"]["bytes"])
    return build(wanted_of(run, "browser", samples=tuple(map(str, samples))), run / "out", SilentProgress())


@pytest.mark.browser
@pytest.mark.slow
def test_page_transcribes_offline_without_external_requests(speech_page: Bundle, chromium: str) -> None:
    assert speech_page.manifest.runtime.package == "npm: @huggingface/transformers"
    cases = json.loads((Path(speech_page.folder) / "selftest.json").read_text())["cases"]
    assert cases[1]["transcript"] == "He might even have been made amiable himself."
    with serve(speech_page.folder) as port, open_page(program=chromium) as tab:
        tab.call("Page.navigate", url=f"http://127.0.0.1:{port}/index.html")
        tab.wait_for("document.body && document.body.dataset.ready", SECONDS)
        # The recording is downloaded before the network is cut; a dropped file needs no network.
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


def embedding(text: str) -> np.ndarray:
    """Return the normalized mean [WIDTH] of the toy encoder's token embeddings."""
    row = EMBEDDINGS[tokenizer()(text)["input_ids"]].mean(axis=0)
    return np.asarray(row / np.linalg.norm(row))


@pytest.mark.slow
@pytest.mark.browser
def test_page_ranks_similar_sentences_offline(tmp_path: Path, chromium: str, npm: None) -> None:
    sentences = ["the film was lovely", "awful plots!", "a great plot"]
    run = write_encoder_run(tmp_path / "run", SentenceModules(WIDTH, steps=(Normalize(),)))
    bundle = build(wanted_of(run, "browser", samples=("a film", *sentences)), tmp_path / "out", SilentProgress())
    with open_bundle(bundle.folder, chromium, "answer") as (tab, port):
        assert tab.evaluate("document.getElementById('others').value").split("\n") == sentences
        go_offline(tab)
        for question in ("the lovely film", "awful plot"):
            right = {text: float(embedding(question) @ embedding(text)) for text in sentences}
            tab.evaluate(
                f"document.getElementById('text').value = {json.dumps(question)}; document.body.dataset.answer = ''"
            )
            tab.evaluate("document.getElementById('text').dispatchEvent(new Event('input'))")
            assert tab.wait_for("document.body.dataset.answer") == max(right, key=lambda text: right[text])
            shown = tab.evaluate(SHOWN)
            assert list(shown) == sorted(shown, key=lambda text: -shown[text])
            assert shown == pytest.approx(right, abs=0.01)
        assert_asks_nobody(tab, port)
