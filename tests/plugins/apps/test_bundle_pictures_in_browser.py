"""The page for pictures in a real Chromium: what it decodes, what it answers, and that it asks nobody."""

from __future__ import annotations

import base64
import functools
import io
import json
import shutil
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image, ImageCms
from serving import SHOWN, assert_asks_nobody, go_offline, serve
from toy_bundles import IMAGE_MATRIX, LABELS, wanted_of, write_image_run
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from compress.formats.onnx.runtimes.chromium import Page, open_page
from compress.plugins.apps.build import Bundle, build
from compress.plugins.apps.pictures import noise, pictures
from compress.utils.progress import SilentProgress

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("no node and npm here")
    folder = tmp_path_factory.mktemp("pictures")
    return build(wanted_of(write_image_run(folder / "run"), "browser"), folder / "bundle", SilentProgress())


@pytest.fixture(scope="module")
def tab(page: Bundle, chromium: str) -> Iterator[tuple[Page, int]]:
    """The page, answered once, and its port; offline."""
    with serve(page.folder) as port, open_page(program=chromium) as opened:
        opened.call("Page.navigate", url=f"http://127.0.0.1:{port}/index.html")
        opened.wait_for("document.body && document.body.dataset.answer")
        go_offline(opened)
        yield opened, port


@functools.cache
def photo() -> Image.Image:
    """A landscape, larger and as smooth as a camera's."""
    return Image.open(io.BytesIO(pictures()[0])).resize((400, 300), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def upright(content: bytes) -> Image.Image:
    """What Python makes of a file, as docs/guides/apps.md says: upright, on white."""
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
    # What differs, in levels of 255: how far at most and how far on average.
    "png": (encoded(noise(61, 43, "RGB"), "PNG"), 0, 0.0),
    "gray": (encoded(noise(61, 43, "L"), "PNG"), 0, 0.0),
    "webp": (encoded(noise(61, 43, "RGB"), "WEBP", lossless=True), 0, 0.0),
    "profile": (encoded(photo(), "PNG", icc_profile=PROFILE), 0, 0.0),
    "jpeg": (encoded(photo(), "JPEG", quality=92), 4, 0.5),
    "turned": (turned(), 4, 0.5),
    "transparent": (soft(), 1, 0.5),
}


def blob(content: bytes) -> str:
    """The file as an expression of JavaScript."""
    letters = base64.b64encode(content).decode()
    return f"new File([Uint8Array.from(atob('{letters}'), (mark) => mark.charCodeAt(0))], 'x', {{type: 'image/*'}})"


@pytest.mark.parametrize("name", FILES)
def test_the_page_decodes_as_pillow_does(tab: tuple[Page, int], name: str) -> None:
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


def test_a_dropped_picture_is_answered_offline_and_nobody_is_asked(page: Bundle, tab: tuple[Page, int]) -> None:
    opened, port = tab
    processor = ViTImageProcessorPil.from_pretrained(page.folder / "model")
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


def test_the_self_test_passes_in_the_page(page: Bundle, chromium: str) -> None:
    test = json.dumps(json.loads((page.folder / "selftest.json").read_text()))
    with serve(page.folder) as port, open_page(program=chromium) as opened:
        opened.call("Page.navigate", url=f"http://127.0.0.1:{port}/index.html")
        opened.wait_for("document.body && document.body.dataset.ready")
        # Transparency goes through the canvas, which keeps it less exactly; what is opaque must be the same.
        found = opened.evaluate(
            f"""(async () => {{
              const {{ openBundle, selftest }} = await import("./answer.mjs");
              const {{ pictureOf }} = await import("./picture.mjs");
              const read = async (path) => new Uint8Array(await (await fetch(path)).arrayBuffer());
              const bundle = await openBundle(read);
              const test = {test};
              test.cases = test.cases.filter((known) => known.image !== "samples/2.png");
              return selftest(bundle, test, async ({{ image }}) => pictureOf(new Blob([await read(image)])));
            }})()"""
        )
    assert 0 <= found <= json.loads(test)["tolerance"]
