"""A model that draws pictures goes all the way: loaded, exported, quantized by parts, judged, timed and reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from PIL import Image
from tiny_pipelines import WORDS, pipeline_folder
from tiny_run import BENCHMARK, Notes, load

from compress.pipeline.keys import CachedStages
from compress.pipeline.run import Run, run
from compress.plugins.diffusion.sampling_settings import empty_ids, load_prompt_processor
from compress.results.report import BASELINE, FINAL

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torch", "ignore::DeprecationWarning")
STAGES: list[dict[str, Any]] = [
    {"onnx": {}},
    {"onnx_int8": {"part": "unet"}},
    {"onnx_weight_only": {"part": "text_encoder", "bits": 8}},
]
ROWS = {"train": 6, "test": 5}
PARTS_TIMED = ("text_encoder", "denoiser_step", "decoder")
ONE_LEVEL: dict[str, Any] = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
"""Of a UNet, which is traced sooner so."""


def write_rows(folder: Path) -> None:
    """Pictures of 14x14 random levels, each with a caption and a class."""
    random = np.random.default_rng(0)
    for split, count in ROWS.items():
        lines = []
        for row in range(count):
            name = f"{split}-{row}.png"
            Image.fromarray(random.integers(0, 255, (14, 14), dtype=np.uint8)).save(folder / name)
            kind = WORDS[3 + row % 2]
            lines.append(json.dumps({"image": name, "text": f"a {WORDS[9 + row % 4]} {kind}", "label": kind}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def write_recipe(folder: Path, **changes: Any) -> Path:
    """The recipe beside its rows and its model."""
    write_rows(folder)
    pipeline_folder(folder / "model", **ONE_LEVEL)
    (folder / "model" / "sampling_config.json").write_text('{"num_inference_steps": 3, "guidance_scale": 2.0}')
    recipe = {
        "name": "pictures",
        "task": "text-to-image",
        "model": str(folder / "model"),
        "data": {"splits": {split: str(folder / f"{split}.jsonl") for split in ROWS}},
        "stages": STAGES,
        "targets": ["cpu"],
        "benchmark": {**BENCHMARK, "every_stage": False},
        **changes,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("pictures")
    return run(load(write_recipe(folder)), folder, folder / "artifacts", Notes())


def test_parts_lie_where_optimum_opens_them(done: Run) -> None:
    model = done.folder / "model"
    parts = ("text_encoder", "unet", "vae_decoder")
    assert sorted(model.rglob("*.onnx")) == [model / part / "model.onnx" for part in parts]
    for part in parts:
        assert json.loads((model / part / "config.json").read_text())
    index = json.loads((model / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and index["safety_checker"] == [None, None]
    assert (model / "scheduler" / "scheduler_config.json").is_file()
    assert (model / "tokenizer" / "tokenizer.json").is_file()


def test_what_is_cached_is_foretold(done: Run) -> None:
    """Of the parts alone, whatever lies beside them, as a run takes them."""
    folder = done.folder.parents[3]
    (folder / "model" / "README.md").write_text("where it comes from")
    recipe = load(folder / "recipe.yaml")
    cached_stages = CachedStages(recipe, folder, folder / "artifacts")
    assert all(cached_stages(label) for label in recipe.labels())


def test_sizes_are_told_by_part_and_only_the_named_parts_shrink(done: Run) -> None:
    def sizes(part: str) -> list[float]:
        rows = [done.report.find(label, f"size_bytes_{part}", "cpu") for label in (BASELINE, FINAL)]
        return [row.value for row in rows if row is not None]

    for part, most in (("unet", 0.95), ("text_encoder", 0.99)):
        size_before, after = sizes(part)
        assert after < most * size_before
    assert len(set(sizes("vae_decoder"))) == 1
    whole = done.report.find(FINAL, "size_bytes", "cpu")
    assert whole is not None and whole.value > sum(sizes(part)[-1] for part in ("unet", "text_encoder", "vae_decoder"))


def test_pictures_are_compared_with_the_float_ones_of_the_same_noise(done: Run) -> None:
    float_, quantized = (done.report.find(label, "psnr_to_baseline", "cpu") for label in (BASELINE, FINAL))
    assert float_ is not None and quantized is not None and quantized.raw is not None
    # That of equal pictures: rounding to levels alone.
    assert float_.value == pytest.approx(58.92, abs=0.01)
    assert 10 < quantized.value < float_.value and len(quantized.raw) == ROWS["test"]


def test_a_picture_is_timed_and_the_integers_are_there(done: Run) -> None:
    assert done.report.find(FINAL, "latency_ms", "cpu") is not None
    graph = onnx.load(done.folder / "model" / "unet" / "model.onnx").graph
    assert {"MatMulInteger", "DynamicQuantizeMatMul", "DynamicQuantizeLinear"} & {node.op_type for node in graph.node}


def test_the_empty_prompt_is_read_without_transformers(done: Run) -> None:
    model = done.folder / "model"
    np.testing.assert_array_equal(empty_ids(model), load_prompt_processor(model).ids([""]))


@pytest.mark.browser
@pytest.mark.slow
def test_pages_draw_what_this_machine_draws(tmp_path: Path, chromium: str) -> None:
    if shutil.which("npm") is None:
        pytest.skip("no npm here to fetch onnxruntime-web with")
    # Each part has a page of its own, and times are those of the pages' clocks.
    stages, targets = [{"onnx": {}}, {"onnx_weight_only": {"part": "text_encoder", "bits": 8}}], ["cpu", "browser"]
    path = write_recipe(tmp_path, stages=stages, targets=targets)
    done = run(load(path), tmp_path, tmp_path / "artifacts", Notes())
    assert not done.report.skipped
    for label in (BASELINE, FINAL):
        machine_psnr, page_psnr = (done.report.find(label, "psnr_to_baseline", target) for target in targets)
        assert (
            machine_psnr is not None
            and page_psnr is not None
            and page_psnr.value == pytest.approx(machine_psnr.value, abs=0.5)
        )
        times = [done.report.find(label, f"{part}_ms", "browser") for part in ("latency", *PARTS_TIMED)]
        whole, *parts = (row.value for row in times if row is not None)
        assert len(parts) == len(PARTS_TIMED) and min(parts) > 0 and whole > sum(parts)
        sent = done.report.find(label, "model_transfer_bytes", "browser")
        graphs = sum(path.stat().st_size for path in (done.folder / "model").rglob("*.onnx"))
        assert sent is not None and (label == BASELINE or graphs < sent.value < graphs + 3000)
