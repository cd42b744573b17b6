"""What a small generator of pictures loses and gains on the way of `recipes/fashion-diffusion.yaml`.

    python benchmarks/train_diffusion.py artifacts/fashion-diffusion
    compress run recipes/fashion-diffusion.yaml
    python benchmarks/diffusion.py artifacts/runs/fashion-diffusion/latest     # about ten minutes on two idle cores

Everything that the run measured is taken from its report. Three short runs are added, whose stages come from the cache
where the first run had them: the start with nothing but its denoiser in INT8, the start in as few steps by the best
scheduler, and the recipe up to where it is distilled into them. The page is a bundle in Chromium with a fresh profile;
ours and diffusers' own pictures are drawn from the same noise. `--write` puts it all into the results file that
docs/results/ is made from.
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
from bundle_page import figures, serve, visit

from compress.cli.output import ConsoleProgress
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
from compress.report.run_folder import find_report
from compress.results.formatting import format_measurement, format_number
from compress.results.metrics import describe_metric
from compress.results.report import BASELINE, FINAL, Measurement, Report, load_report
from compress.utils.progress import Progress

RESULTS = Path(__file__).parent / "results" / "diffusion.json"
TARGET = "cpu"
DISTANCE, PROMPTS, SIZE = "frechet_distance", "prompt_accuracy", "size_bytes"
APART = "perceptual_distance_to_baseline"
PARTS = ("text_encoder", "denoiser_step", "decoder")
DRAWN, LAUNCHES = 8, 5
SHOWN = (DISTANCE, PROMPTS, "ssim_to_baseline", SIZE, "latency_ms", *(f"{part}_ms" for part in PARTS))


@dataclass(frozen=True)
class Row:
    """What was asked for and what was found; ``held`` is the best of the two bounds that it keeps."""

    what: str
    found: str
    least: str
    aim: str
    held: str

    def cells(self) -> list[str]:
        """As a table has it."""
        return [self.what, self.found, self.least, self.aim, self.held]


def row(what: str, value: float, found: str, least: float, aim: float | None, words: str, lower: bool = False) -> Row:
    """A figure and its bounds, each written as ``words`` has it."""

    def keeps(bound: float | None) -> bool:
        return bound is not None and (value <= bound if lower else value >= bound)

    held = "aim" if keeps(aim) else "yes" if keeps(least) else "no"
    return Row(what, found, words.format(least), "" if aim is None else words.format(aim), held)


def main(
    folder: Annotated[Path, typer.Argument(help="a run of recipes/fashion-diffusion.yaml")],
    artifacts: Annotated[Path, typer.Option(help="where runs and their cache are")] = Path("artifacts"),
    page: Annotated[bool, typer.Option(help="open the page in Chromium")] = True,
    write: Annotated[bool, typer.Option(help=f"write {RESULTS.name}")] = False,
) -> None:
    """Measure what the run did not, and show all of it."""
    quiet_libraries()
    progress = ConsoleProgress()
    recipe, report = read_recipe(folder / "recipe.yaml"), load_report(find_report(folder))
    beside = {name: aside(recipe, name, stages, artifacts, progress) for name, stages in runs_beside(recipe).items()}
    rows = [*of_the_run(report), *of_int8(beside["int8"]), *of_steps(beside["scheduler"], beside["distilled"])]
    rows += of_page(folder) if page else []
    rows += of_levels(load_pipeline(Path(recipe.model)))
    tables = [
        {"columns": ["quantity", "measured", "required", "aim", "kept"], "rows": [row.cells() for row in rows]},
        {
            "title": "Each model on the same prompts and noise, timed in the session of its run",
            "columns": headings(),
            "rows": list(models(report, beside)),
        },
    ]
    for table in tables:
        for cells in (table["columns"], *table["rows"]):
            typer.echo(" | ".join(cells))
    if write:
        RESULTS.write_text(json.dumps(results(report, tables), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def runs_beside(recipe: Recipe) -> dict[str, list[Mapping[str, Any]]]:
    """The stages of the three short runs, with the fields that the recipe has."""
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


def aside(
    recipe: Recipe, name: str, stages: Sequence[Mapping[str, Any]], artifacts: Path, progress: Progress
) -> Report:
    """The report of the recipe with other stages."""
    changed = {"name": f"{recipe.name}-{name}", "stages": list(stages), "limits": []}
    changed_recipe = Recipe.model_validate({**recipe.model_dump(), **changed})
    return run(changed_recipe, Path.cwd(), artifacts, progress).report


def of_the_run(report: Report) -> list[Row]:
    """End to end: faster, smaller, and what pictures lose."""
    faster, sizes, distances = found(report, "speedup"), pair(report, SIZE), pair(report, DISTANCE)
    smaller, farther = sizes[0].value / sizes[1].value, distances[1].value / distances[0].value
    lost = points_lost(*pair(report, PROMPTS))
    return [
        row("end to end against the fp32 start, faster", faster.value, format_measurement(faster), 20, 40, "{:g}x"),
        row("smaller on disk, all parts", smaller, f"{format_number(smaller)}x ({in_bytes(sizes)})", 5, 10, "{:g}x"),
        row(
            f"Fréchet distance against the start's ({distances[0].n} pictures)",
            farther,
            of_two(distances),
            1.3,
            1.1,
            "{:g}x",
            lower=True,
        ),
        row("prompts kept, points lost", lost[0], "{:.1f} ({:.1f} to {:.1f})".format(*lost), 3, 1, "{:g}", lower=True),
    ]


def of_int8(report: Report) -> list[Row]:
    """The denoiser in INT8 alone, in as many steps as the start."""
    distances, faster = pair(report, DISTANCE), found(report, "speedup_denoiser_step")
    farther, what = distances[1].value / distances[0].value, "INT8 UNet alone against fp32, same steps"
    return [
        row(f"{what}: distance", farther, of_two(distances), 1.05, 1.02, "{:g}x", lower=True),
        row(f"{what}: faster", faster.value, format_measurement(faster), 1.5, 2, "{:g}x"),
    ]


def of_steps(scheduler: Report, distilled: Report) -> list[Row]:
    """Training against the best that is to be had without it, in as many steps.

    What both are measured by first is far from 0 for the start too, which neither comes below by much; how far
    pictures are from the start's own, of the same noise, has no such floor.
    """
    rows = []
    for metric, what in ((DISTANCE, "Fréchet distance"), (APART, "perceptual distance from the start's pictures")):
        best, taught = found(scheduler, metric), found(distilled, metric)
        share, words = taught.value / best.value, of_two((best, taught))
        rows.append(row(f"distilled against the best scheduler: {what}", share, words, 0.5, None, "{:g}x", True))
    return rows


def of_page(folder: Path) -> list[Row]:
    """A bundle's first picture in a fresh Chromium, and what went over the wire."""
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "bundle"
        command = [sys.executable, "-m", "compress", "bundle", str(folder), "--target", "browser", "-o", str(bundle)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with serve(bundle, "br", 11) as (port, sent):
            seen = figures([visit(port, sent, None, None) for _ in range(LAUNCHES)], "br")
    seconds, megabytes = seen["from_navigation_ms"] / 1e3, seen["transfer_bytes"] / 1e6
    samples = [value / 1e3 for value in seen["samples"]["from_navigation_ms"]]
    span = f"{seconds:.1f} s ({min(samples):.1f} to {max(samples):.1f})"
    return [
        row("page in Chromium, first picture, cold", seconds, span, 6, 3, "{:g} s", lower=True),
        row("page in Chromium, transferred", megabytes, f"{megabytes:.1f} MB", 40, 25, "{:g} MB", lower=True),
    ]


def of_levels(model: GeneratorModel) -> list[Row]:
    """Our pictures against those of diffusers' own pipeline, from the same noise."""
    ids = model.processor.ids(prompts := [f"a photo of a {word}" for word in ("bag", "coat", "dress", "sandal")] * 2)
    exported = export_diffusion(model, ids, None, fusions=True)
    graphs = open_diffusion(diffusion_folder(model, {name: part.graph for name, part in exported.items()}))
    theirs = as_diffusers(model, prompts)
    apart = {"torch": open_torch(model, {}), "ONNX Runtime": graphs}
    levels = {name: levels_apart(drawn(session, ids, model), theirs) for name, session in apart.items()}
    words = ", ".join(f"{count:g} in {name}" for name, count in levels.items())
    return [row("ours against diffusers' own, levels of 255", max(levels.values()), words, 1, None, "{:g}", lower=True)]


def drawn(session: DiffusionSession, ids: np.ndarray, model: GeneratorModel) -> np.ndarray:
    """Pictures [n, height, width, channels] from 0 to 1, each from the noise of its place."""
    noise = np.stack([model.processor.noise(index) for index in range(len(ids))])
    return session.predict({IDS: ids, NOISE: noise, SEED: np.arange(len(ids))})[IMAGES]


def as_diffusers(model: GeneratorModel, prompts: Sequence[str]) -> np.ndarray:
    """The same by the pipeline that model_index.json names."""
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
    """The largest difference of a pixel in levels of 255, each rounded as diffusers rounds them."""
    return float(np.abs((255 * ours).round() - (255 * theirs.reshape(ours.shape)).round()).max())


def found(report: Report, metric: str, model: str = FINAL) -> Measurement:
    """A row of the report, which has it."""
    measured = report.find(model, metric, TARGET)
    if measured is None:
        raise typer.BadParameter(f"{report.recipe} has no {metric} of {model} on {TARGET}; run the recipe anew")
    return measured


def pair(report: Report, metric: str) -> tuple[Measurement, Measurement]:
    """Of the baseline and the final model."""
    return found(report, metric, BASELINE), found(report, metric)


def points_lost(before: Measurement, after: Measurement) -> tuple[float, float, float]:
    """Points that are lost, paired by prompt and noise, with the 90% interval."""
    first, last = np.array(before.raw) > 0.5, np.array(after.raw) > 0.5
    apart = difference_of_shares(int((first & ~last).sum()), int((last & ~first).sum()), len(first))
    return 100 * (0 - apart.value), 100 * (0 - apart.high), 100 * (0 - apart.low)


def of_two(measured: tuple[Measurement, Measurement]) -> str:
    """`1.12x (2.31 of 2.06)`, with both intervals."""
    first, last = measured
    return f"{format_number(last.value / first.value)}x ({format_measurement(last)} of {format_measurement(first)})"


def in_bytes(sizes: tuple[Measurement, Measurement]) -> str:
    """`113 MB to 18 MB`."""
    return " to ".join(format_measurement(size) for size in sizes)


def headings() -> list[str]:
    """Of the table of models."""
    return ["model", *(describe_metric(metric).title for metric in SHOWN)]


def models(report: Report, beside: Mapping[str, Report]) -> Iterator[list[str]]:
    """A row for each model, from the run that has it."""
    named = {
        "the start, fp32": (report, BASELINE),
        "its denoiser in INT8": (beside["int8"], FINAL),
        "best scheduler, as few steps": (beside["scheduler"], FINAL),
        "distilled": (beside["distilled"], FINAL),
        "all of it": (report, FINAL),
    }
    for name, (source, model) in named.items():
        cells = [source.find(model, metric, TARGET) for metric in SHOWN]
        yield [name, *("" if cell is None else format_measurement(cell) for cell in cells)]


def results(report: Report, tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What docs/results/ is made from."""
    return {
        "title": "Pictures from words",
        "order": 13,
        "command": "python benchmarks/diffusion.py artifacts/runs/fashion-diffusion/latest --write",
        "measured": date.today().isoformat(),
        "machine": machine_summary(report.environment),
        "text": "A latent diffusion model of Fashion-MNIST that `benchmarks/train_diffusion.py` trained, on the way of "
        "`recipes/fashion-diffusion.yaml`; 32 x 32 pixels, gray, ten kinds of clothes. A classifier that saw no drawn "
        "picture judges them.",
        "tables": list(tables),
    }


if __name__ == "__main__":
    typer.run(main)
