"""Tests of detection, segmentation and image embedding bundles: page in Chromium and example against transformers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rotation import todays
from serving import assert_asks_nobody, serve
from toy_bundles import run_example, wanted_of
from toy_places import LABELS, TASK_OF, TASKS, outputs, write_places_run

from compress.data.media import decode, media
from compress.formats.onnx.runtimes.chromium import open_page
from compress.plugins.apps.build import Bundle, build
from compress.plugins.apps.image import ImageInputs, UncroppedImages
from compress.plugins.apps.verify import verify
from compress.utils.errors import ModelError
from compress.utils.progress import SilentProgress

LEAST = 0.4
BOXES = ("object-detection", "rt_detr")
SOFT = 1
"""The index of the sample with transparency, whose pixels a canvas stores less exactly."""


def made(folder: Path, task: str, target: str) -> Bundle:
    run = folder / "run" if (folder / "run").is_dir() else write_places_run(folder / "run", task)
    return build(wanted_of(run, target), folder / target, SilentProgress())


def answered(bundle: Bundle, task: str) -> tuple[list[Image.Image], list[dict[str, torch.Tensor]]]:
    """Return the bundle's sample images, and the expected graph outputs for transformers' pixel values of each."""
    processor = TASKS[task][0]
    paths = sorted((bundle.folder / "samples").glob("*.png"))
    pictures = [decode(media(str(path), None) or {}, "RGB", Counter()) for path in paths]
    answers = [outputs(task, np.asarray(processor([picture])["pixel_values"])) for picture in pictures]
    return pictures, [{name: torch.from_numpy(array) for name, array in arrays.items()} for arrays in answers]


def boxes_of(task: str, found: dict[str, torch.Tensor], picture: Image.Image) -> list[list[Any]]:
    """Return [label, score, left, top, width, height] of transformers' detections above ``LEAST``, best score first."""
    processor = TASKS[task][0]
    given = SimpleNamespace(**found)
    (detection,) = processor.post_process_object_detection(given, threshold=LEAST, target_sizes=[picture.size[::-1]])
    parts = zip(detection["scores"].tolist(), detection["labels"].tolist(), detection["boxes"].tolist(), strict=True)
    rows = [[LABELS[key], score, left, top, right - left, low - top] for score, key, (left, top, right, low) in parts]
    return sorted(rows, key=lambda row: -row[1])


@pytest.mark.parametrize("task", TASKS)
def test_example_passes_self_test_and_equals_transformers(tmp_path: Path, task: str) -> None:
    bundle = made(tmp_path, task, "desktop")
    assert verify(bundle.archive).worst == 0
    assert "passed" in run_example(bundle.folder, "--selftest")
    lines = run_example(bundle.folder).splitlines()
    (picture, *_), (answer, *_) = answered(bundle, task)
    if task in BOXES:
        shown = [f"{score:7.2%}  {label}" for label, score, *_ in boxes_of(task, answer, picture) if score >= 0.5]
        assert [line.split(":")[0] for line in lines] == shown[: len(lines)] and len(lines) == min(5, len(shown))
    elif task == "image-segmentation":
        processor = TASKS[task][0]
        (mask,) = processor.post_process_semantic_segmentation(SimpleNamespace(**answer), [picture.size[::-1]])
        shares = {label: float((mask == key).float().mean()) for key, label in enumerate(LABELS)}
        assert {row.split("  ")[-1]: float(row.split("%")[0]) / 100 for row in lines} == pytest.approx(shares, abs=1e-3)
    elif task == "image-feature-extraction":
        assert lines[0].split() == ["1.000", "1.png"]


CALLS = {
    "object-detection": f"(await app.detect(picture, {LEAST})).map((one) => [one.label, one.score, ...one.box])",
    "image-segmentation": "Array.from(await app.segment(picture))",
    "image-feature-extraction": "await app.embed(picture)",
}


@pytest.mark.browser
@pytest.mark.slow
def test_page_predictions_equal_transformers(tmp_path: Path, chromium: str, npm: None) -> None:
    checks: dict[str, Callable[..., None]] = {
        **{kind: partial(boxes, kind) for kind in BOXES},
        "image-segmentation": pixels,
        "image-feature-extraction": numbers_of,
    }
    for task in todays(checks, 2, str):
        bundle = made(tmp_path / task, task, "browser")
        pictures, answers = answered(bundle, task)
        names = json.dumps([f"samples/{at + 1}.png" for at in range(len(pictures))])
        with serve(bundle.folder) as port, open_page(program=chromium) as tab:
            tab.call("Page.navigate", url=f"http://127.0.0.1:{port}/index.html")
            first = tab.wait_for("document.body && document.body.dataset.answer")
            given = tab.evaluate(
                f"""(async () => {{
                  const {{ openBundle }} = await import("./answer.mjs");
                  const {{ pictureOf }} = await import("./picture.mjs");
                  const read = async (path) => new Uint8Array(await (await fetch(path)).arrayBuffer());
                  const app = await openBundle(read), found = [];
                  for (const name of {names}) {{
                    const picture = await pictureOf(new Blob([await read(name)]));
                    found.push({CALLS[TASK_OF.get(task, task)]});
                  }}
                  return found;
                }})()"""
            )
            for at, whole in enumerate(zip(given, answers, pictures, strict=True)):
                if at != SOFT:
                    checks[task](*whole)
            if task in BOXES:
                assert first == (given[0][0][0] if given[0] else "(nothing)")
                drawn = "drawn.getContext('2d').getImageData(0, 0, drawn.width, drawn.height).data.some((one) => one)"
                assert tab.evaluate(drawn) is (first != "(nothing)")
            else:
                assert first in (*LABELS, "Picture 1")
            assert_asks_nobody(tab, port)


def boxes(task: str, answer: list[list[Any]], numbers: dict[str, torch.Tensor], picture: Image.Image) -> None:
    expected_boxes = boxes_of(task, numbers, picture)
    assert [box[0] for box in answer] == [box[0] for box in expected_boxes]
    assert [box[1:] for box in answer] == [pytest.approx(box[1:], rel=1e-3, abs=1e-3) for box in expected_boxes]


def pixels(answer: list[int], numbers: dict[str, torch.Tensor], picture: Image.Image) -> None:
    processor = TASKS["image-segmentation"][0]
    (mask,) = processor.post_process_semantic_segmentation(SimpleNamespace(**numbers), [picture.size[::-1]])
    # Where two classes have exactly equal scores, either one is right.
    assert np.mean(np.array(answer) != mask.numpy().ravel()) < 1e-3


def numbers_of(answer: list[float], numbers: dict[str, torch.Tensor], picture: Image.Image) -> None:
    assert answer == pytest.approx(numbers["pooler_output"].ravel().tolist(), abs=1e-4)


def test_processor_without_fixed_size_is_refused(tmp_path: Path) -> None:
    run = write_places_run(tmp_path / "run", "image-feature-extraction")
    path = run / "model" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_resize": False}))
    with pytest.raises(ModelError, match=r"takes pixel_values of shape .*16, 16.*would give it \[1, 3, 300, 400\]"):
        build(wanted_of(run, "desktop"), tmp_path / "out", SilentProgress())


def test_center_crop_is_refused_for_detection(tmp_path: Path) -> None:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    cut = ViTImageProcessorPil(do_center_crop=True, crop_size={"height": 8, "width": 8})
    assert ImageInputs.find_rule(tmp_path, cut, 0).center_crop is not None  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="cuts out the middle"):
        UncroppedImages.find_rule(tmp_path, cut, 0)
