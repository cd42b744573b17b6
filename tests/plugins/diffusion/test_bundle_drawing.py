"""A bundle that draws: its self-test is diffusers' own pipeline, for the examples, and in a real Chromium."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from serving import assert_asks_nobody, serve
from tiny_pipelines import pipeline
from toy_bundles import wanted_of

from compress.formats.onnx.runtimes.chromium import open_page
from compress.plugins.apps.build import build
from compress.plugins.apps.image_generation import noise_of
from compress.plugins.apps.postprocess import Draw
from compress.plugins.diffusion.onnx_export import diffusion_folder, export_diffusion
from compress.plugins.diffusion.pipeline_model import load_pipeline
from compress.plugins.diffusion.sampling_settings import SAMPLING, Sampling
from compress.utils.errors import ModelError
from compress.utils.progress import SilentProgress

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.slow
RECIPE = """name: toy
task: text-to-image
model: ./nowhere
data: {splits: {train: train.csv, test: test.csv}, max_length: 24}
stages: [onnx]
"""
STEPS, GUIDANCE = 3, 2.5


def scheduler(**fields: Any) -> Any:
    return diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing", steps_offset=1, **fields)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline with guidance, as a run leaves it."""
    folder = tmp_path_factory.mktemp("drawing")
    pipeline(scheduler=scheduler()).save_pretrained(folder / "start")
    (folder / "start" / SAMPLING).write_bytes(Sampling(STEPS, GUIDANCE).as_json())
    model = load_pipeline(folder / "start")
    exported = export_diffusion(model, model.processor.ids(["a bag", "the small dark boot"]), None, True)
    (folder / "model").mkdir()
    diffusion_folder(model, {name: part.graph for name, part in exported.items()}).save(folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def by_diffusers(run: Path, end: Draw, case: dict[str, Any]) -> np.ndarray:
    """Levels [height, width] of its own pipeline, from the same noise."""
    diffusers_pipeline = pipeline(scheduler=scheduler())
    diffusers_pipeline.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(noise_of(end, case["seed"])[0])
    pictures = diffusers_pipeline(
        case["text"],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=noise,
        height=16,
        width=16,
        output_type="np",
    )
    return np.asarray(pictures.images[0])


def gray_png(content: bytes, side: int) -> np.ndarray:
    """The levels of a PNG whose rows are not filtered."""
    at, parts = 8, b""
    while at < len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        parts += content[at + 8 : at + 8 + length] if content[at + 4 : at + 8] == b"IDAT" else b""
        at += length + 12
    return np.frombuffer(zlib.decompress(parts), np.uint8).reshape(side, side + 1)[:, 1:]


def test_the_self_test_and_the_example_draw_what_diffusers_does(run: Path) -> None:
    bundle = build(wanted_of(run), run / "out", SilentProgress())
    end = bundle.manifest.postprocessing
    assert isinstance(end, Draw) and len(end.timesteps) == STEPS and end.guidance == GUIDANCE
    cases = json.loads((bundle.folder / "selftest.json").read_text())["cases"]
    for case in cases:
        expected = by_diffusers(run, end, case)
        np.testing.assert_allclose(case["picture"], expected.reshape(-1), atol=1 / 255)
    assert np.ptp(cases[0]["picture"]) > 0.05
    command = [sys.executable, str(bundle.folder / "examples" / "run.py")]
    output = subprocess.run([*command, "--selftest"], capture_output=True, text=True, check=True).stdout
    assert output.startswith("passed; levels differ by at most ")
    content = subprocess.run([*command, cases[1]["text"], "1"], capture_output=True, check=True).stdout
    levels = np.array(cases[1]["picture"]).reshape(16, 16)
    assert np.abs(gray_png(content, 16) - (255 * levels)).max() <= 1


def test_a_scheduler_that_clips_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "model", tmp_path / "model")
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clip_sample": True}))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(ModelError, match="no sum of noise"):
        build(wanted_of(tmp_path), tmp_path / "out", SilentProgress())


@pytest.mark.browser
def test_the_page_draws_the_same_and_asks_nobody(run: Path, chromium: str) -> None:
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("no node and npm here")
    bundle = build(wanted_of(run, "browser"), run / "page", SilentProgress())
    test = json.loads((bundle.folder / "selftest.json").read_text())
    levels = 255 * np.array(test["cases"][1]["picture"]).reshape(16, 16)
    command = ["node", str(bundle.folder / "examples" / "run.mjs"), test["cases"][1]["text"], "1"]
    content = subprocess.run(command, capture_output=True, check=True).stdout
    assert np.abs(gray_png(content, 16) - levels).max() <= 1 + 255 * test["tolerance"]
    with serve(bundle.folder) as port, open_page(program=chromium) as tab:
        tab.call("Page.navigate", url=f"http://127.0.0.1:{port}/index.html")
        tab.wait_for("document.body && document.body.dataset.ready")
        assert tab.wait_for("document.body.dataset.answer") == test["cases"][0]["text"]
        assert tab.evaluate("import('./page.mjs').then((page) => page.tryAll())") <= test["tolerance"]
        assert tab.evaluate("document.getElementById('progress').value") == STEPS
        shown = tab.evaluate(
            "Array.from(document.getElementById('picture').getContext('2d').getImageData(0, 0, 16, 16).data)"
        )
        levels = 255 * np.array(test["cases"][0]["picture"]).reshape(16, 16)
        assert np.abs(np.array(shown).reshape(16, 16, 4)[:, :, 0] - levels).max() <= 1 + 255 * test["tolerance"]
        tab.evaluate("document.getElementById('text').value = 'a bag '.repeat(20)")
        tab.evaluate("document.getElementById('again').click()")
        tab.wait_for("document.getElementById('status').textContent.includes('its end was not read')")
        assert tab.evaluate("document.getElementById('seed').value") == "1"
        assert_asks_nobody(tab, port)
