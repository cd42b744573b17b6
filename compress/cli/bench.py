"""Command `compress bench ARTIFACT`: latency, throughput, start-up and memory on this machine, now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from compress.benchmark.restarts import BenchmarkHost
    from compress.benchmark.session import BenchmarkResult
    from compress.cli.bench_measurement import HostResults, Measure
    from compress.tasks.capability import Capabilities
    from compress.utils.progress import Progress

Settings = dict[str, Any]
"""Benchmark settings by field."""


def bench(
    artifact: Annotated[Path, typer.Argument(help="A run's folder or name, its model/ folder, or any exported model.")],
    baseline: Annotated[
        Path | None, typer.Option(help="Another run or model to compare with; both are timed alternately.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="Recipe; default: the recipe.yaml beside the model.")] = None,
    target: Annotated[str, typer.Option(help="Target of the model; see `compress targets`.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the runtime.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Batch of the throughput measurement.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="Time budget for each model and scenario.")] = None,
    budget: Annotated[float | None, typer.Option(min=1, help="Seconds for everything; replaces --seconds.")] = None,
    rate: Annotated[
        float | None, typer.Option(min=0.01, help="Also serve requests that arrive at random, at this rate per second.")
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Time text generation after a prompt of this many tokens; needs no recipe; repeatable."
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="With --context: tokens generated after the first one; default 32.")
    ] = None,
    steps: Annotated[
        list[int] | None, typer.Option(min=1, help="Also time image generation with this many steps; repeatable.")
    ] = None,
    size: Annotated[
        list[int] | None, typer.Option(min=8, help="Also time images with sides of this many pixels; repeatable.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="With --context: a file whose text is the prompt, in place of random tokens.")
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(help="Measure on this device of the inventory, over SSH; repeatable; `all`: every device."),
    ] = None,
    inventory: Annotated[
        Path | None,
        typer.Option(help="With --device: the inventory; default: devices.yaml beside the recipe, or here."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Write measurements, notes and environment as JSON.")] = False,
) -> None:
    """Time an artifact on real examples of the test split, or as it generates text, in a process of its own."""
    from compress.cli.bench_measurement import choose_hosts, generation_bench, refuse_together
    from compress.recipe.recipe import Benchmark

    on_data = {"batch_size": batch_size, "rate": rate, "steps": steps or None, "size": size or None}
    refuse_together(context, recipe=recipe, **on_data, tokens=tokens, text=text)
    hosts = choose_hosts(device or [], inventory, recipe)
    settings: Settings = {"threads": threads, "seconds": seconds, "budget_seconds": budget}
    if context:
        benchmark = Benchmark(contexts=tuple(context), **_without_none({"tokens": tokens, **settings}))
        measure = generation_bench(artifact, baseline, text, target, benchmark)
    else:
        settings |= {"batch_size": batch_size, "rate": rate}
        settings |= {"picture_steps": tuple(steps) if steps else None, "picture_sizes": tuple(size) if size else None}
        measure = _bench_on_data(artifact, baseline, recipe, target, _without_none(settings))
    _measure(measure, hosts, json_)


def _measure(measure: Measure, hosts: Mapping[str, BenchmarkHost], json_: bool) -> None:
    """Measure on the given hosts, or on this machine without any, and print the results."""
    from compress.benchmark.restarts import LOCAL_HOST
    from compress.cli.bench_measurement import bench_on_hosts
    from compress.report.progress import ConsoleProgress

    if hosts:
        show_outcome(bench_on_hosts(hosts, measure), json_)
        return
    show(measure(LOCAL_HOST, ConsoleProgress()), json_)


def _bench_on_data(
    artifact: Path, baseline: Path | None, recipe: Path | None, target: str, changed: Settings
) -> Measure:
    """Return a function that times on the test split of a recipe.

    Args:
        artifact: Artifact that is timed.
        baseline: Artifact to compare with.
        recipe: Recipe with task and data. Default: the one beside the model.
        target: Name of the target.
        changed: Benchmark settings that replace the recipe's.
    """
    from compress.formats.targets import find_target
    from compress.pipeline.artifact import check_opens, find_artifact
    from compress.report.progress import ConsoleProgress

    subject = find_artifact(artifact, recipe)
    reference = find_artifact(baseline, recipe) if baseline else None
    runtime_target = find_target(target)
    refuse_idle(subject.task.capabilities, changed)
    for loaded in filter(None, (subject, reference)):
        check_opens(loaded.folder, runtime_target)
    from compress.formats.quiet_output import quiet_libraries
    from compress.pipeline.timing import time_artifacts

    # Libraries print messages when they are imported, so silence them first.
    quiet_libraries()
    progress = ConsoleProgress()
    settings = subject.recipe.benchmark.model_copy(update=changed)
    # The first model is the one that the others are compared with.
    folders = {} if reference is None else {"baseline": reference.folder}
    folders["artifact"] = subject.folder
    examples = {label: subject.examples(progress, folder) for label, folder in folders.items()}

    def measure(where: BenchmarkHost, shown: Progress) -> BenchmarkResult:
        return time_artifacts(
            subject.task,
            folders,
            examples,
            runtime_target,
            settings,
            next(iter(folders)),
            shown,
            subject.recipe.seed,
            host=where,
        )

    return measure


def refuse_idle(task: Capabilities, changed: Settings) -> None:
    """Raise `InputError` for options of image generation with another kind of model."""
    from compress.tasks.capability import GENERATES_IMAGES
    from compress.utils.errors import InputError

    options = [f"--{name}" for name in ("steps", "size") if f"picture_{name.removesuffix('s')}s" in changed]
    if options and GENERATES_IMAGES not in task:
        raise InputError(f"No effect on this model: {' and '.join(options)}.", expected="a model that generates images")


def _without_none(options: Settings) -> Settings:
    return {name: value for name, value in options.items() if value is not None}


def as_values(result: BenchmarkResult) -> dict[str, object]:
    """Return a result as plain values."""
    from compress.utils.isolation import isolation_record

    measured = [row.model_dump() for row in result.measurements]
    facts = {"environment": result.environment, "isolation": isolation_record()}
    return {"measurements": measured, "notes": result.notes, **facts}


def show(result: BenchmarkResult, json_: bool, where: str = "") -> None:
    """Print a result, and its notes to standard error, each after the prefix ``where``."""
    if json_:
        typer.echo(json.dumps(as_values(result)))
        return
    from compress.cli.output import render_generation, render_rows, show_hint
    from compress.results.metrics import context_of
    from compress.utils.terminal import Console

    # Measurements of text generation have a table of their own, with a line for each context.
    rows = [row for row in result.measurements if context_of(row.metric) is None]
    if len(rows) < len(result.measurements):
        Console().print(render_generation(result.measurements))
    Console().print(render_rows(rows))
    for note in result.notes:
        show_hint(f"{where}{note}")


def show_outcome(outcome: HostResults, json_: bool) -> None:
    """Print the results of all hosts, and raise the first error if one failed."""
    from compress.report.compare.machine_match import machine_summary
    from compress.utils.terminal import printable

    if json_:
        values = {name: as_values(result) for name, result in outcome.results.items()}
        failed = {name: str(error) for name, error in outcome.failures.items()}
        typer.echo(json.dumps({"devices": values, "failed": failed}))
    else:
        for name, result in outcome.results.items():
            typer.echo(printable(f"{name}: {machine_summary(result.environment)}"))
            show(result, json_=False, where=f"{name}: ")
    # The exit code is that of the first error, and `main` prints it.
    errors = list(outcome.failures.values())
    for error in errors[1:]:
        typer.echo(f"error: {error}", err=True)
    if errors:
        raise errors[0]
