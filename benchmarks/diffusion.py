"""Measure speed, size and image quality of a small text-to-image model compressed by `recipes/fashion-diffusion.yaml`.

    python benchmarks/train_diffusion.py artifacts/fashion-diffusion
    compress run recipes/fashion-diffusion.yaml
    python benchmarks/diffusion.py artifacts/runs/fashion-diffusion/latest     # about ten minutes on two idle cores

The measurements of the run are read from its report. Three short side runs are added, which share the cache: the
original with only its denoiser in INT8, the original with the best scheduler and the final number of steps, and the
recipe up to step distillation. The web page is measured as a bundle in Chromium with a fresh profile. Our images are
compared with those of diffusers from the same noise. `--write` stores the results for docs/results/.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from bundle_page import serve, summarize, visit

from compress.formats.quiet_output import quiet_libraries
from compress.numerics.differences import difference_of_shares
from compress.pipeline.run import run
from compress.plugins.diffusion.onnx_export import diffusion_folder, export_diffusion, open_diffusion
from compress.plugins.diffusion.pipeline_model import GeneratorModel, load_pipeline
from compress.plugins.diffusion.sampler import IDS, IMAGES, NOISE, SEED, DiffusionSession, open_torch
from compress.plugins.diffusion.stage_settings import StepDistillation
from compress.recipe.loading import read_recipe
from compress.recipe.recipe import Recipe
from compress.report.compare.machine_match import machine_summary
from compress.report.progress import ConsoleProgress
from compress.report.run_folder import find_report
from compress.results.formatting import format_measurement, format_number
from compress.results.metrics import describe_metric
from compress.results.report import BASELINE, FINAL, Measurement, Report, load_report
from compress.utils.progress import Progress

RESULTS = Path(__file__).parent / "results" / "diffusion.json"
TARGET = "cpu"
DISTANCE, PROMPTS, SIZE = "frechet_distance", "prompt_accuracy", "size_bytes"
PERCEPTUAL = "perceptual_distance_to_baseline"
PARTS = ("text_encoder", "denoiser_step", "decoder")
LAUNCHES = 5
METRICS = (DISTANCE, PROMPTS, "ssim_to_baseline", SIZE, "latency_ms", *(f"{part}_ms" for part in PARTS))


@dataclass(frozen=True)
class Row:
    """A measurement with its bounds; ``met`` is the better of the bounds that it meets: no, yes or aim."""

    quantity: str
    measured: str
    required: str
    aim: str
    met: str

    def cells(self) -> list[str]:
        """Return the cells of a table row."""
        return [self.quantity, self.measured, self.required, self.aim, self.met]


def row(
    quantity: str, value: float, measured: str, required: float, aim: float | None, template: str, lower: bool = False
) -> Row:
    """Return a row that compares ``value`` with its bounds, which are formatted by ``template``."""

    def meets(bound: float | None) -> bool:
        return bound is not None and (value <= bound if lower else value >= bound)

    met = "aim" if meets(aim) else "yes" if meets(required) else "no"
    return Row(quantity, measured, template.format(required), "" if aim is None else template.format(aim), met)


def main(
    folder: Annotated[Path, typer.Argument(help="Run of recipes/fashion-diffusion.yaml.")],
    artifacts: Annotated[Path, typer.Option(help="Folder of runs and cache.")] = Path("artifacts"),
    page: Annotated[bool, typer.Option(help="Measure the web page in Chromium.")] = True,
    write: Annotated[bool, typer.Option(help=f"Write {RESULTS.name}.")] = False,
) -> None:
    """Complete the measurements of the run, and print all of them."""
    quiet_libraries()
    progress = ConsoleProgress()
    recipe, report = read_recipe(folder / "recipe.yaml"), load_report(find_report(folder))
    side = {name: run_aside(recipe, name, stages, artifacts, progress) for name, stages in side_runs(recipe).items()}
    rows = [*run_rows(report), *int8_rows(side["int8"]), *distillation_rows(side["scheduler"], side["distilled"])]
    rows += page_rows(folder) if page else []
    rows += diffusers_rows(load_pipeline(Path(recipe.model)))
    tables: list[dict[str, Any]] = [
        {
            "title": "Limits",
            "columns": ["quantity", "measured", "required", "aim", "kept"],
            "rows": [row.cells() for row in rows],
        },
        {
            "title": "Each model on the same prompts and noise",
            "columns": ["model", *(describe_metric(metric).title for metric in METRICS)],
            "rows": list(model_rows(report, side)),
        },
    ]
    for table in tables:
        for cells in (table["columns"], *table["rows"]):
            typer.echo(" | ".join(cells))
    if write:
        RESULTS.write_text(json.dumps(results(report, tables), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def side_runs(recipe: Recipe) -> dict[str, list[Mapping[str, Any]]]:
    """Return the stages of the three side runs, with the settings of the recipe."""
    distill = next(index for index, stage in enumerate(recipe.stages) if isinstance(stage, StepDistillation))
    int8 = next(stage for stage in recipe.stages if stage.kind == "onnx_int8" and getattr(stage, "part", "") == "unet")
    step_stage = recipe.stages[distill]
    assert isinstance(step_stage, StepDistillation)
    best = {"kind": "schedule", "steps": step_stage.steps, "scheduler": "best"}
    return {
        "int8": [{"kind": "onnx"}, int8.model_dump()],
        "scheduler": [best],
        "distilled": [stage.model_dump() for stage in recipe.stages[: distill + 1]],
    }


def run_aside(
    recipe: Recipe, name: str, stages: Sequence[Mapping[str, Any]], artifacts: Path, progress: Progress
) -> Report:
    """Run the recipe with other stages and return the report."""
    changed = {"name": f"{recipe.name}-{name}", "stages": list(stages), "limits": []}
    changed_recipe = Recipe.model_validate({**recipe.model_dump(), **changed})
    return run(changed_recipe, Path.cwd(), artifacts, progress).report


def run_rows(report: Report) -> list[Row]:
    """Return speed-up, size ratio and loss of quality of the whole recipe."""
    speedup, sizes, distances = measurement(report, "speedup"), pair(report, SIZE), pair(report, DISTANCE)
    ratio = sizes[0].value / sizes[1].value
    size_text = f"{format_number(ratio)}x ({' to '.join(format_measurement(size) for size in sizes)})"
    lost = points_lost(*pair(report, PROMPTS))
    lost_text = "{:.1f} ({:.1f} to {:.1f})".format(*lost)
    distance_name = f"Fréchet distance, ratio to the original's ({distances[0].n} images)"
    return [
        row("speed-up, end to end, against fp32", speedup.value, format_measurement(speedup), 20, 40, "{:g}x"),
        row("size ratio, all parts", ratio, size_text, 5, 10, "{:g}x"),
        ratio_row(distance_name, distances, 1.3, 1.1),
        row("prompt accuracy lost, points", lost[0], lost_text, 3, 1, "{:g}", lower=True),
    ]


def int8_rows(report: Report) -> list[Row]:
    """Return quality and speed of the original with only its denoiser in INT8."""
    speedup = measurement(report, "speedup_denoiser_step")
    return [
        ratio_row("INT8 UNet alone: Fréchet distance ratio", pair(report, DISTANCE), 1.05, 1.02),
        row("INT8 UNet alone: speed-up", speedup.value, format_measurement(speedup), 1.5, 2, "{:g}x"),
    ]


def distillation_rows(scheduler: Report, distilled: Report) -> list[Row]:
    """Compare step distillation with the best scheduler at the same number of steps.

    The Fréchet distance of the original itself is far from 0, and neither method has a much lower one. The perceptual
    distance to the original's images from the same noise has no such lower limit.
    """
    rows = []
    for metric, name in ((DISTANCE, "Fréchet distance"), (PERCEPTUAL, "perceptual distance")):
        measurements = measurement(scheduler, metric), measurement(distilled, metric)
        rows.append(ratio_row(f"step distillation against the best scheduler: {name} ratio", measurements, 0.5, None))
    return rows


def ratio_row(quantity: str, measurements: tuple[Measurement, Measurement], required: float, aim: float | None) -> Row:
    """Return a row with the ratio of the second measurement to the first, where lower is better."""
    first, second = measurements
    ratio = second.value / first.value
    # For example `1.12x (2.31 of 2.06)`, with both intervals.
    text = f"{format_number(ratio)}x ({format_measurement(second)} of {format_measurement(first)})"
    return row(quantity, ratio, text, required, aim, "{:g}x", lower=True)


def page_rows(folder: Path) -> list[Row]:
    """Measure the time to the first image of a web page in Chromium, and the bytes transferred."""
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "bundle"
        command = [sys.executable, "-m", "compress", "bundle", str(folder), "--target", "browser", "-o", str(bundle)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with serve(bundle, "br", 11) as (port, sent):
            visits = summarize([visit(port, sent, None, None) for _ in range(LAUNCHES)], "br")
    seconds, megabytes = visits["from_navigation_ms"] / 1e3, visits["transfer_bytes"] / 1e6
    samples = [value / 1e3 for value in visits["samples"]["from_navigation_ms"]]
    span = f"{seconds:.1f} s ({min(samples):.1f} to {max(samples):.1f})"
    return [
        row("web page in Chromium, first image, cold", seconds, span, 6, 3, "{:g} s", lower=True),
        row("web page in Chromium, transferred", megabytes, f"{megabytes:.1f} MB", 40, 25, "{:g} MB", lower=True),
    ]


def diffusers_rows(model: GeneratorModel) -> list[Row]:
    """Compare our images with those of the diffusers pipeline, from the same noise."""
    ids = model.processor.ids(prompts := [f"a photo of a {word}" for word in ("bag", "coat", "dress", "sandal")] * 2)
    exported = export_diffusion(model, ids, None, fusions=True)
    graphs = open_diffusion(diffusion_folder(model, {name: part.graph for name, part in exported.items()}))
    theirs = generate_by_diffusers(model, prompts)
    sessions = {"torch": open_torch(model, {}), "ONNX Runtime": graphs}
    levels = {name: levels_apart(generate(session, ids, model), theirs) for name, session in sessions.items()}
    text = ", ".join(f"{count:g} in {name}" for name, count in levels.items())
    quantity = "largest difference from diffusers, levels of 255"
    return [row(quantity, max(levels.values()), text, 1, None, "{:g}", lower=True)]


def generate(session: DiffusionSession, ids: np.ndarray, model: GeneratorModel) -> np.ndarray:
    """Return images [n, height, width, channels] from 0 to 1, each from the noise of its index."""
    noise = np.stack([model.processor.noise(index) for index in range(len(ids))])
    return session.predict({IDS: ids, NOISE: noise, SEED: np.arange(len(ids))})[IMAGES]


def generate_by_diffusers(model: GeneratorModel, prompts: Sequence[str]) -> np.ndarray:
    """Return the images of the pipeline that model_index.json names, from the same noise."""
    import torch

    pipeline = model.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(np.stack([model.processor.noise(index) for index in range(len(prompts))]))
    steps, guidance = model.sampling.steps, model.sampling.guidance
    images = pipeline(
        list(prompts), num_inference_steps=steps, guidance_scale=guidance, latents=noise, output_type="np"
    )
    return np.asarray(images.images)


def levels_apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the largest difference of a pixel in levels of 255, rounded as in diffusers."""
    return float(np.abs((255 * ours).round() - (255 * theirs.reshape(ours.shape)).round()).max())


def measurement(report: Report, metric: str, model: str = FINAL) -> Measurement:
    """Return a measurement of the report. Raises `typer.BadParameter` if it is missing."""
    measured = report.find(model, metric, TARGET)
    if measured is None:
        raise typer.BadParameter(f"{report.recipe} has no {metric} of {model} on {TARGET}; run the recipe again")
    return measured


def pair(report: Report, metric: str) -> tuple[Measurement, Measurement]:
    """Return the measurements of the baseline and the final model."""
    return measurement(report, metric, BASELINE), measurement(report, metric)


def points_lost(original: Measurement, compressed: Measurement) -> tuple[float, float, float]:
    """Return the points lost, paired by prompt and noise, with the 90% interval."""
    first, last = np.array(original.raw) > 0.5, np.array(compressed.raw) > 0.5
    difference = difference_of_shares(int((first & ~last).sum()), int((last & ~first).sum()), len(first))
    return 100 * (0 - difference.value), 100 * (0 - difference.high), 100 * (0 - difference.low)


def model_rows(report: Report, side: Mapping[str, Report]) -> Iterator[list[str]]:
    """Yield the measurements of each model, from the run that has it."""
    sources = {
        "original, fp32": (report, BASELINE),
        "denoiser in INT8": (side["int8"], FINAL),
        "best scheduler, as few steps": (side["scheduler"], FINAL),
        "step distillation": (side["distilled"], FINAL),
        "all stages": (report, FINAL),
    }
    for name, (source, model) in sources.items():
        cells = [source.find(model, metric, TARGET) for metric in METRICS]
        yield [name, *("" if cell is None else format_measurement(cell) for cell in cells)]


def results(report: Report, tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the content of the results file."""
    return {
        "title": "Text-to-image",
        "order": 13,
        "command": "python benchmarks/diffusion.py artifacts/runs/fashion-diffusion/latest --write",
        "measured": date.today().isoformat(),
        "machine": machine_summary(report.environment),
        "text": "A latent diffusion model of Fashion-MNIST (32 x 32 pixels, gray), trained by "
        "`benchmarks/train_diffusion.py` and compressed by `recipes/fashion-diffusion.yaml`. A classifier that saw no "
        "generated image judges the images.",
        "tables": list(tables),
    }


if __name__ == "__main__":
    typer.run(main)
