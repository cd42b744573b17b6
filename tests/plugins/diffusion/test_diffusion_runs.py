"""Tests of whole runs of a diffusion model: export, quantization by part, evaluation, timing and reports."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pytest
import torch
import yaml
from diffusion import Row, distillation_rows, int8_rows, levels_apart, points_lost, row, run_rows, side_runs
from picture_reports import picture_report
from PIL import Image
from tiny_pictures import write_rows
from tiny_pipelines import TOKENS, pipeline_folder
from tiny_run import BENCHMARK, Notes, load

from compress.cli.bench import refuse_idle
from compress.cli.bench_measurement import refuse_together
from compress.data.media import media, media_type
from compress.pipeline.keys import CachedStages
from compress.pipeline.run import Run, run
from compress.plugins.diffusion.image_metrics import fit_size, to_uint8
from compress.plugins.diffusion.pipeline_model import (
    GeneratorModel,
    PromptProcessor,
)
from compress.plugins.diffusion.stage_settings import StepDistillation
from compress.plugins.diffusion.task import TASK
from compress.recipe.loading import read_recipe
from compress.recipe.recipe import Recipe
from compress.results.report import BASELINE, FINAL, Measurement, Report
from compress.tasks.classes import outcome_row
from compress.tasks.registry import TASKS, infer_task
from compress.utils.errors import InputError, ModelError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning:torch", "ignore::DeprecationWarning")]

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
"""Config fields of a UNet with one level, which is faster to export."""


def write_recipe(folder: Path, **changes: Any) -> Path:
    """Write a recipe with its data and model, and return the recipe's path."""
    write_rows(folder, **ROWS, side=14)
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


def test_exported_parts_follow_optimum_layout(done: Run) -> None:
    model = done.folder / "model"
    parts = ("text_encoder", "unet", "vae_decoder")
    assert sorted(model.rglob("*.onnx")) == [model / part / "model.onnx" for part in parts]
    for part in parts:
        assert json.loads((model / part / "config.json").read_text())
    index = json.loads((model / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and index["safety_checker"] == [None, None]
    assert (model / "scheduler" / "scheduler_config.json").is_file()
    assert (model / "tokenizer" / "tokenizer.json").is_file()


def test_cached_stages_are_predicted(done: Run) -> None:
    """A file added next to the components does not change the cache keys."""
    folder = done.folder.parents[3]
    (folder / "model" / "README.md").write_text("where it comes from")
    recipe = load(folder / "recipe.yaml")
    cached_stages = CachedStages(recipe, folder, folder / "artifacts")
    assert all(cached_stages(label) for label in recipe.labels())


def rows_of(report: Report, metric: str, target: str = "cpu") -> list[Measurement]:
    """Return a metric of the baseline and of the final model."""
    found = [report.find(label, metric, target) for label in (BASELINE, FINAL)]
    assert None not in found, metric
    return found  # type: ignore[return-value]


def test_sizes_are_reported_by_part_and_only_quantized_parts_shrink(done: Run) -> None:
    shares, total = {}, 0.0
    for part in ("unet", "text_encoder", "vae_decoder"):
        size_before, after = (row.value for row in rows_of(done.report, f"size_bytes_{part}"))
        shares[part], total = after / size_before, total + after
    assert shares["unet"] < 0.95 and shares["text_encoder"] < 0.99 and shares["vae_decoder"] == 1
    assert rows_of(done.report, "size_bytes")[1].value > total


def test_images_are_compared_with_float_images_of_the_same_noise(done: Run) -> None:
    float_, quantized = rows_of(done.report, "psnr_to_baseline")
    # The PSNR of equal images, which is bounded by 8-bit rounding.
    assert float_.value == pytest.approx(58.92, abs=0.01)
    assert 10 < quantized.value < float_.value and len(quantized.raw or ()) == ROWS["test"]


def test_image_latency_is_reported_and_graph_has_integer_operators(done: Run) -> None:
    assert rows_of(done.report, "latency_ms")
    graph = onnx.load(done.folder / "model" / "unet" / "model.onnx").graph
    assert {"MatMulInteger", "DynamicQuantizeMatMul", "DynamicQuantizeLinear"} & {node.op_type for node in graph.node}


@pytest.mark.browser
@pytest.mark.slow
def test_browser_target_generates_the_same_images_as_cpu(tmp_path: Path, chromium: str) -> None:
    if shutil.which("npm") is None:
        pytest.skip("no npm here to fetch onnxruntime-web with")
    # Each component runs in its own page and is timed by that page's clock.
    stages, targets = [{"onnx": {}}, {"onnx_weight_only": {"part": "text_encoder", "bits": 8}}], ["cpu", "browser"]
    path = write_recipe(tmp_path, stages=stages, targets=targets)
    done = run(load(path), tmp_path, tmp_path / "artifacts", Notes())
    assert not done.report.skipped
    psnr = [[row.value for row in rows_of(done.report, "psnr_to_baseline", target)] for target in targets]
    assert psnr[1] == pytest.approx(psnr[0], abs=0.5)
    timed = [rows_of(done.report, f"{part}_ms", "browser") for part in ("latency", *PARTS_TIMED)]
    for whole, *parts in zip(*timed, strict=True):
        assert min(part.value for part in parts) > 0 and whole.value > sum(part.value for part in parts)
    graphs = sum(path.stat().st_size for path in (done.folder / "model").rglob("*.onnx"))
    assert graphs < rows_of(done.report, "model_transfer_bytes", "browser")[1].value < graphs + 3000


RECIPE = Path(__file__).parents[3] / "recipes" / "fashion-diffusion.yaml"


def report(**speeds: float) -> Report:
    """Return a report with distances 3.1 and 3.8, 188 and 184 of 200 prompts right, 1.5 MB and 120 kB; and speeds."""
    run_report, fields = picture_report(), {"model": FINAL, "target": "cpu", "unit": "x", "n": 6}
    rows = [
        Measurement(**fields, metric=metric, value=value, low=0.9 * value, high=1.1 * value)
        for metric, value in speeds.items()
    ]
    return run_report.model_copy(update={"measurements": (*run_report.measurements, *rows)})


@pytest.mark.parametrize(
    ("value", "lower", "held"),
    [(41, False, "aim"), (40, False, "aim"), (39, False, "yes"), (20, False, "yes"), (19.9, False, "no"),
     (1.1, True, "aim"), (1.2, True, "yes"), (1.31, True, "no")],
)  # fmt: skip
def test_row_reports_the_strictest_bound_met(value: float, lower: bool, held: str) -> None:
    least, aim = (1.3, 1.1) if lower else (20, 40)
    assert row("what", value, "so much", least, aim, "{:g}x", lower).met == held
    assert row("what", value, "so much", least, None, "{:g}x", lower).met == ("no" if held == "no" else "yes")


def test_final_model_is_compared_with_baseline() -> None:
    faster, smaller, farther, lost = run_rows(report(speedup=37.0))
    assert faster == Row("speed-up, end to end, against fp32", "37.0x (33.3\u201340.7x)", "20x", "40x", "yes")
    # 50 x 30,000 bytes before and 4 x 30,000 after.
    assert smaller.measured.startswith("12.5x (1.50 MB to 120 kB)") and smaller.met == "aim"
    assert farther.measured.startswith("1.23x (3.80 (3.60") and farther.met == "yes"
    # 188 and 184 of the same 200 prompts.
    assert lost.measured.startswith("2.0 (") and lost.met == "yes"


def test_accuracy_loss_is_paired_by_row() -> None:
    def prompts(*seen: int) -> Measurement:
        return outcome_row("prompt_accuracy", np.array(seen, bool), "m", "cpu")

    lost, low, high = points_lost(prompts(1, 1, 1, 0), prompts(1, 0, 0, 1))
    # Of four predictions two become wrong and one becomes right.
    assert lost == pytest.approx(25.0)
    assert low < lost < high
    assert points_lost(prompts(1, 0), prompts(1, 0))[0] == 0.0


def test_int8_and_distillation_rows_use_their_side_runs() -> None:
    distance, faster = int8_rows(report(speedup_denoiser_step=1.7))
    assert (distance.met, faster.met) == ("no", "yes")
    scheduler, taught = (report(perceptual_distance_to_baseline=apart) for apart in (0.2, 0.05))
    from_real, from_the_start = distillation_rows(scheduler, taught)
    assert from_real.measured.startswith("1.00x") and from_real.met == "no"
    assert from_the_start.measured.startswith("0.250x") and from_the_start.met == "yes"


def test_side_runs_use_the_fields_of_the_recipe() -> None:
    recipe = read_recipe(RECIPE)
    beside = side_runs(recipe)
    (unet_stage,) = (stage for stage in recipe.stages if getattr(stage, "part", "") == "unet")
    assert beside["int8"][1] == unet_stage.model_dump()
    steps = next(stage.steps for stage in recipe.stages if isinstance(stage, StepDistillation))
    assert beside["scheduler"] == [{"kind": "schedule", "steps": steps, "scheduler": "best"}]
    assert beside["distilled"][-1]["kind"] == "distill_steps"
    for stages in beside.values():
        changed: dict[str, Any] = {"name": "beside", "stages": stages, "limits": []}
        assert Recipe.model_validate({**recipe.model_dump(), **changed}).baseline == "start"


def test_pixel_difference_is_in_8_bit_levels() -> None:
    ours = np.zeros((1, 2, 2, 1), np.float32)
    theirs = np.array([[[0.0, 0.0039], [0.0, 0.0098]]], np.float32)
    assert levels_apart(ours, theirs) == 2.0


@pytest.fixture
def processor(generator: GeneratorModel) -> PromptProcessor:
    return generator.processor


def encoded(levels: np.ndarray) -> object:
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    return media(file.getvalue(), None)


def rows(*texts: str) -> pa.Table:
    pictures = [np.full((12, 14), 10 * number, np.uint8) for number in range(len(texts))]
    images = pa.array([encoded(picture) for picture in pictures], media_type())
    return pa.table({"image": images, "text": list(texts), "label": ["bag", "boot"] * (len(texts) // 2)})


def test_noise_of_each_row_has_the_row_index_as_seed(processor: PromptProcessor) -> None:
    examples = TASK.encode(rows("a bag", "dark boot"), processor, None, 99)
    batch = examples.batch([0, 1])
    assert batch["seed"].tolist() == [0, 1] and batch["input_ids"].shape == (2, TOKENS)
    for seed in (0, 1):
        drawn = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(seed))
        np.testing.assert_array_equal(batch["noise"][seed : seed + 1], drawn.numpy())
    assert examples.lengths().tolist() == [4, 4], "words and the tokens about them"
    assert examples.note == "" and examples.subset([1]).batch([0])["seed"].tolist() == [1]
    long = TASK.encode(rows("a bag", " ".join(["dark"] * 40)), processor, None, 99)
    assert long.note == f"1 of 2 prompts are cut at {TOKENS} tokens" and long.lengths().tolist() == [4, 42]


def test_smaller_real_images_are_padded_with_black(processor: PromptProcessor) -> None:
    examples = TASK.encode(rows("a bag", "dark boot"), processor, None, 99)
    assert examples.labels is not None and examples.labels.shape == (2, 16, 16, 1)
    expected = np.zeros((16, 16), np.uint8)
    expected[2:14, 1:15] = 10
    np.testing.assert_array_equal(examples.labels[1, :, :, 0], expected)


def test_larger_images_are_scaled_and_center_cropped() -> None:
    wide = np.zeros((32, 64), np.uint8)
    wide[:, 16:48] = 200
    cropped = np.asarray(fit_size(Image.fromarray(wide), 16, 16))
    assert cropped.shape == (16, 16) and (cropped[:, 2:-2] == 200).all()


def test_uint8_rounding_equals_diffusers() -> None:
    from diffusers.image_processor import VaeImageProcessor

    pictures = np.random.default_rng(0).random((2, 4, 4, 3), dtype=np.float32)
    expected = [np.asarray(picture) for picture in VaeImageProcessor.numpy_to_pil(pictures)]
    np.testing.assert_array_equal(to_uint8(pictures), np.stack(expected))


def test_collected_images_keep_class_names(processor: PromptProcessor) -> None:
    examples = TASK.encode(rows("a bag", "dark boot"), processor, None, 99)
    pictures = np.stack([np.full((16, 16, 1), 0.5, np.float32), np.zeros((16, 16, 1), np.float32)])
    collected = TASK.collect({"pictures": pictures}, examples, [1, 0])
    assert collected["class"].tolist() == ["boot", "bag"]
    assert collected["pictures"].dtype == np.uint8 and collected["pictures"][0].max() == 128


def test_contrast_and_psnr_of_known_images() -> None:
    half = np.zeros((2, 16, 16, 1), np.uint8)
    half[1, :8] = 100
    (contrast,) = TASK.measure({"pictures": half}, None, "final", "cpu")
    assert contrast.raw == (0.0, 50.0)
    nearness = {row.metric: row for row in TASK.compare({"pictures": half}, {"pictures": half + 10}, "final", "cpu")}
    # 10 log10(255² / 10²)
    assert nearness["psnr_to_baseline"].value == pytest.approx(28.1308, abs=1e-3)


def test_task_is_inferred_and_other_processors_are_refused() -> None:
    assert infer_task({"architectures": ["StableDiffusionPipeline"]}, False) == "text-to-image"
    assert TASKS["text-to-image"] is TASK
    with pytest.raises(ModelError, match="does not prepare prompts"):
        TASK.encode(rows("a bag", "dark boot"), object(), None, 99)


PICTURES = {"picture_steps": (4, 50), "picture_sizes": (64,)}


def test_steps_and_sizes_are_refused_for_other_tasks() -> None:
    refuse_idle(TASKS["text-to-image"].capabilities, PICTURES)
    others = TASKS["text-classification"].capabilities
    refuse_idle(others, {"threads": 2})
    with pytest.raises(InputError, match="No effect on this model: --steps and --size"):
        refuse_idle(others, PICTURES)
    with pytest.raises(InputError, match="No effect on this model: --size"):
        refuse_idle(others, {"picture_sizes": (64,)})


def test_steps_are_refused_with_context_lengths() -> None:
    idle = dict.fromkeys(("recipe", "batch_size", "rate", "size", "tokens", "text"))
    with pytest.raises(InputError, match="--steps and --context don't go together"):
        refuse_together([128], steps=[4], **idle)
    refuse_together(None, steps=[4], **idle)
