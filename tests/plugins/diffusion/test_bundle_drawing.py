"""Tests of bundles of diffusion models: self-test, Python and Node examples and page in Chromium against diffusers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from serving import assert_asks_nobody, serve
from tiny_pipelines import COSINE, denoiser, pipeline
from toy_bundles import wanted_of

from compress.formats.onnx.runtimes.chromium import open_page
from compress.plugins.apps.build import build
from compress.plugins.apps.image_generation import initial_noise, portable_noise
from compress.plugins.apps.postprocess import Draw
from compress.plugins.diffusion.onnx_export import diffusion_folder, export_diffusion
from compress.plugins.diffusion.pipeline_model import SAMPLING, Sampling, load_pipeline
from compress.plugins.diffusion.scheduler_table import build_scheduler_table
from compress.utils.progress import SilentProgress

diffusers = pytest.importorskip("diffusers")
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
    """Write the folder of a run of a tiny pipeline with guidance."""
    folder = tmp_path_factory.mktemp("drawing")
    pipeline(scheduler=scheduler()).save_pretrained(folder / "start")
    (folder / "start" / SAMPLING).write_bytes(Sampling(STEPS, GUIDANCE).as_json())
    model = load_pipeline(folder / "start")
    exported = export_diffusion(model, model.processor.ids(["a bag", "the small dark boot"]), None, True)
    (folder / "model").mkdir()
    diffusion_folder(model, {name: part.graph for name, part in exported.items()}).save(folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def by_diffusers(end: Draw, case: dict[str, Any]) -> np.ndarray:
    """Return the image of diffusers' own pipeline from the same noise, in [0, 1]."""
    diffusers_pipeline = pipeline(scheduler=scheduler())
    diffusers_pipeline.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(initial_noise(end, case["seed"])[0])
    asked = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "latents": noise, "height": 16, "width": 16}
    return np.asarray(diffusers_pipeline(case["text"], **asked, output_type="np").images[0])


def gray_png(content: bytes, side: int) -> np.ndarray:
    """Return the pixels [side, side] of a gray PNG whose rows are not filtered."""
    at, parts = 8, b""
    while at < len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        parts += content[at + 8 : at + 8 + length] if content[at + 4 : at + 8] == b"IDAT" else b""
        at += length + 12
    return np.frombuffer(zlib.decompress(parts), np.uint8).reshape(side, side + 1)[:, 1:]


@pytest.mark.slow
def test_self_test_and_example_generate_images_of_diffusers(run: Path) -> None:
    bundle = build(wanted_of(run), run / "out", SilentProgress())
    end = bundle.manifest.postprocessing
    assert isinstance(end, Draw) and len(end.timesteps) == STEPS and end.guidance == GUIDANCE
    cases = json.loads((bundle.folder / "selftest.json").read_text())["cases"]
    for case in cases:
        expected = by_diffusers(end, case)
        np.testing.assert_allclose(case["picture"], expected.reshape(-1), atol=1 / 255)
    assert np.ptp(cases[0]["picture"]) > 0.05
    command = [sys.executable, str(bundle.folder / "examples" / "run.py")]
    output = subprocess.run([*command, "--selftest"], capture_output=True, text=True, check=True).stdout
    assert output.startswith("passed; levels differ by at most ")
    content = subprocess.run([*command, cases[1]["text"], "1"], capture_output=True, check=True).stdout
    levels = np.array(cases[1]["picture"]).reshape(16, 16)
    assert np.abs(gray_png(content, 16) - (255 * levels)).max() <= 1


@pytest.mark.slow
@pytest.mark.browser
def test_page_generates_the_same_image_without_external_requests(run: Path, chromium: str) -> None:
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


@pytest.mark.parametrize(
    ("name", "steps"), [("DDIMScheduler", 4), ("DPMSolverMultistepScheduler", 8), ("LCMScheduler", 4)]
)
def test_page_sampling_equals_scheduler_table(name: str, steps: int) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node here")
    fields = {"clip_sample": False} if name == "DDIMScheduler" else {}
    scheduler = getattr(diffusers, name)(**COSINE, **fields)
    table = build_scheduler_table(scheduler, steps)
    defaults: dict[str, Any] = {"guidance": 1.0, "empty_ids": (), "condition": (), "scaling": 1.0, "shift": 0.0}
    places = {"output": "", "denoiser": "", "decoder": "", "channels": 4, "height": 3, "width": 5, "factor": 1}
    end = Draw.model_validate({**places, **defaults, **asdict(table)})
    command, asked = [node, Path(__file__).parent / "draws.mjs"], {"end": end.model_dump(mode="json"), "seed": 7}
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=True)
    answer, (noise, added) = json.loads(done.stdout), initial_noise(end, 7)
    np.testing.assert_allclose(answer["noise"], noise.reshape(-1), rtol=1e-6)
    np.testing.assert_allclose(answer["added"], added.reshape(steps, -1), rtol=1e-9, atol=1e-12)
    latents = table.sample(denoiser, noise, added)
    np.testing.assert_allclose(answer["latents"], latents.reshape(-1), rtol=1e-4, atol=1e-4)
    assert answer["steps"] == steps


def test_portable_noise_is_standard_normal() -> None:
    drawn = portable_noise(5, 20_000)
    assert kstest(drawn, "norm").pvalue > 0.01
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(drawn, portable_noise(6, 20_000))[0, 1]) < 0.03


def test_portable_noise_equals_mulberry32_and_box_muller() -> None:
    """The expected values are computed with Python integers, one number at a time."""
    state, uniform = 5, []
    for _ in range(4):
        state = (state + 0x6D2B79F5) & 0xFFFFFFFF
        mixed = ((state ^ state >> 15) * (state | 1)) & 0xFFFFFFFF
        mixed ^= (mixed + (mixed ^ mixed >> 7) * (mixed | 61)) & 0xFFFFFFFF
        uniform.append((mixed ^ mixed >> 14) / 2**32)
    expected = [
        (-2 * np.log(first + 2**-33)) ** 0.5 * turn(2 * np.pi * second)
        for first, second in (uniform[:2], uniform[2:])
        for turn in (np.cos, np.sin)
    ]
    np.testing.assert_allclose(portable_noise(5, 3), expected[:3], rtol=1e-12)
