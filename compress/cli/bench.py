"""`compress bench ARTIFACT`: latency, throughput, start-up and memory on this machine, now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from compress.benchmark.host import BenchmarkHost
    from compress.benchmark.session import BenchmarkResult
    from compress.cli.bench_hosts import HostResults, Measure
    from compress.tasks.capability import Capabilities
    from compress.utils.progress import Progress


def bench(
    artifact: Annotated[Path, typer.Argument(help="A run's folder or its model/ folder, or any exported model.")],
    baseline: Annotated[
        Path | None, typer.Option(help="Another artifact, timed in turns with the first, to compare with.")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="Where task and data come from; default: the recipe.yaml beside the model."),
    ] = None,
    target: Annotated[str, typer.Option(help="Where to run it; see `compress targets`.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the runtime.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Batch of the throughput measurement.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="Time budget for each model and scenario.")] = None,
    budget: Annotated[
        float | None,
        typer.Option(min=1, help="Seconds for all of it, with starts and warm-ups; replaces --seconds."),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(min=0.01, help="Also answer requests that arrive at random, so many a second.")
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Time text generation after a prompt of so many tokens; needs no recipe; repeatable."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="With --context: tokens generated after the first one; default 32.")
    ] = None,
    steps: Annotated[
        list[int] | None, typer.Option(min=1, help="Also time pictures in so many steps; repeatable.")
    ] = None,
    size: Annotated[
        list[int] | None, typer.Option(min=8, help="Also time pictures of so many pixels a side; repeatable.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="With --context: a file whose text is the prompt, in place of random tokens.")
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(help="Time it on this device of the inventory, over SSH; repeatable; `all` is every one."),
    ] = None,
    inventory: Annotated[
        Path | None,
        typer.Option(help="With --device: the inventory; default: devices.yaml beside the recipe, or here."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Write measurements, notes and environment as JSON.")] = False,
) -> None:
    """Time an artifact on real examples of the test split, or as it generates text, in a process of its own."""
    from compress.cli.bench_generation import refuse_together
    from compress.cli.bench_hosts import choose_hosts

    steps, size = steps or None, size or None
    on_data = {"recipe": recipe, "batch_size": batch_size, "rate": rate, "steps": steps, "size": size}
    refuse_together(context, **on_data, tokens=tokens, text=text)
    hosts = choose_hosts(device or [], inventory, recipe)
    if context:
        from compress.cli.bench_generation import generation_bench
        from compress.recipe.recipe import Benchmark

        given = {"tokens": tokens, "threads": threads, "seconds": seconds, "budget_seconds": budget}
        wanted = Benchmark(contexts=tuple(context), **_given(given))
        _measure(generation_bench(artifact, baseline, text, target, wanted), hosts, json_)
        return
    changed: dict[str, Any] = {"threads": threads, "batch_size": batch_size, "seconds": seconds}
    changed |= {"budget_seconds": budget, "rate": rate}
    changed |= {"picture_steps": steps and tuple(steps), "picture_sizes": size and tuple(size)}
    _measure(_bench_on_data(artifact, baseline, recipe, target, _given(changed)), hosts, json_)


def _measure(measure: Measure, hosts: Mapping[str, BenchmarkHost], json_: bool) -> None:
    """Measure on the given hosts, or on this machine without any, and print the results."""
    from compress.benchmark.host import LOCAL_HOST
    from compress.cli.bench_hosts import bench_on_hosts
    from compress.cli.console_progress import ConsoleProgress

    if hosts:
        show_outcome(bench_on_hosts(hosts, measure), json_)
        return
    show(measure(LOCAL_HOST, ConsoleProgress()), json_)


def _bench_on_data(
    artifact: Path, baseline: Path | None, recipe: Path | None, target: str, changed: dict[str, Any]
) -> Measure:
    """Return a function that times on the test split of a recipe.

    Args:
        artifact: Artifact that is timed.
        baseline: Artifact to compare with.
        recipe: Recipe with task and data. Default: the one beside the model.
        target: Name of the target.
        changed: Benchmark settings that replace the recipe's.
    """
    from compress.cli.artifact import check_opens, find_artifact
    from compress.cli.console_progress import ConsoleProgress
    from compress.formats.targets import find_target

    subject = find_artifact(artifact, recipe)
    reference = find_artifact(baseline, recipe) if baseline else None
    found_target = find_target(target)
    refuse_idle(subject.task.capabilities, changed)
    for loaded in filter(None, (subject, reference)):
        check_opens(loaded.folder, found_target)
    from compress.formats.quiet_output import quiet_libraries
    from compress.pipeline.timing import time_artifacts

    quiet_libraries()
    progress = ConsoleProgress()
    settings = subject.recipe.benchmark.model_copy(update=changed)
    folders = (
        {"artifact": subject.folder}
        if reference is None
        else {"baseline": reference.folder, "artifact": subject.folder}
    )
    examples = {label: subject.examples(progress, folder) for label, folder in folders.items()}

    def measure(where: BenchmarkHost, shown: Progress) -> BenchmarkResult:
        return time_artifacts(
            subject.task,
            folders,
            examples,
            found_target,
            settings,
            next(iter(folders)),
            shown,
            subject.recipe.seed,
            host=where,
        )

    return measure


def refuse_idle(task: Capabilities, changed: dict[str, Any]) -> None:
    """Raise `InputError` for options of image generation with another kind of model."""
    from compress.tasks.capability import GENERATES_IMAGES
    from compress.utils.errors import InputError

    given = [f"--{name}" for name in ("steps", "size") if f"picture_{name.removesuffix('s')}s" in changed]
    if given and GENERATES_IMAGES not in task:
        raise InputError(f"{' and '.join(given)} means nothing here.", expected="a model that draws pictures")


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def as_values(result: BenchmarkResult) -> dict[str, Any]:
    """Return a result as plain values."""
    measured = [row.model_dump() for row in result.measurements]
    return {"measurements": measured, "notes": result.notes, "environment": result.environment}


def show(result: BenchmarkResult, json_: bool, where: str = "") -> None:
    """Print a result, and its notes to standard error, each after the prefix ``where``."""
    if json_:
        typer.echo(json.dumps(as_values(result)))
        return
    from rich.console import Console

    from compress.cli.output import render_generation, render_rows
    from compress.results.metrics import context_of

    rows = [row for row in result.measurements if context_of(row.metric) is None]
    if len(rows) < len(result.measurements):
        Console().print(render_generation(result.measurements))
    Console().print(render_rows(rows))
    for note in result.notes:
        typer.echo(f"{where}{note}", err=True)


def show_outcome(found: HostResults, json_: bool) -> None:
    """Print the results of all hosts, and raise the first error if one failed."""
    from compress.report.compare.machine_match import machine_summary

    if json_:
        values = {name: as_values(result) for name, result in found.results.items()}
        failed = {name: str(error) for name, error in found.failures.items()}
        typer.echo(json.dumps({"devices": values, "failed": failed}))
    else:
        for name, result in found.results.items():
            typer.echo(f"{name}: {machine_summary(result.environment)}")
            show(result, json_=False, where=f"{name}: ")
    errors = list(found.failures.values())
    for error in errors[1:]:
        typer.echo(f"error: {error}", err=True)
    if errors:
        raise errors[0]
