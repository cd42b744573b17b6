"""`compress compare A B`: what changed from one run to another, and whether it matters."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from compress.compare.change import Comparison


class CompareFormat(StrEnum):
    """The views of a comparison."""

    console = "console"
    markdown = "markdown"
    html = "html"
    json = "json"


def compare(
    baseline: Annotated[
        Path,
        typer.Argument(
            metavar="A", help="The run to compare with: its folder, report.json, a baseline's file, or a recipe's name."
        ),
    ],
    candidate: Annotated[
        Path | None,
        typer.Argument(
            metavar="B", help="The run to judge. Left out: the model of A against A's own baseline, of one session."
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="Which model of the runs: final, baseline, or a stage's label.")] = "final",
    policy: Annotated[
        Path | None, typer.Option(help="A YAML file with the changes that matter; default: finer ones than a gate's.")
    ] = None,
    across_hosts: Annotated[
        bool, typer.Option("--across-hosts", help="Give verdicts on times even if the machines differ.")
    ] = False,
    now: Annotated[
        bool, typer.Option("--now", help="Measure both models now, side by side: sharper than comparing reports.")
    ] = False,
    recipe: Annotated[
        Path | None,
        typer.Option(help="With --now: where task and data come from; default: the recipe.yaml beside B's model."),
    ] = None,
    target: Annotated[str, typer.Option(help="With --now: where to run both; see `compress targets`.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="With --now: threads of the runtime.")] = None,
    budget: Annotated[
        float | None,
        typer.Option(min=1, help="With --now: seconds for timing; it ends before, once it is sure."),
    ] = None,
    format: Annotated[CompareFormat, typer.Option(help="The view to write to standard output.")] = (
        CompareFormat.console
    ),
    json_: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Compare two runs, or a run's model with its own baseline: better, same, worse, or can't tell."""
    from compress.cli.compared import find_side, with_model
    from compress.compare.policy_file import read_policy
    from compress.compare.reports import compare_reports
    from compress.recipe.policy import COMPARE
    from compress.report.schema import BASELINE

    rules = with_model(read_policy(policy) if policy else COMPARE, model)
    view = CompareFormat.json if json_ else format
    if now:
        from compress.cli.side_by_side import compare_now

        write_comparison(compare_now(baseline, candidate, rules, recipe, target, threads, budget), view)
        return
    before = find_side(baseline)
    after = find_side(candidate) if candidate else before
    comparison = compare_reports(
        before.report,
        after.report,
        rules,
        names=(before.name, after.name),
        baseline_model=None if candidate else BASELINE,
        across_hosts=across_hosts,
        folders=(before.folder, after.folder),
    )
    write_comparison(comparison, view)


def write_comparison(comparison: Comparison, format: CompareFormat) -> None:
    """Write one of the views to standard output."""
    from compress.cli.compared import write_text

    match format:
        case CompareFormat.json:
            write_text(comparison.model_dump_json(indent=2))
        case CompareFormat.markdown:
            from compress.compare.views.markdown import markdown_comparison

            write_text(markdown_comparison(comparison))
        case CompareFormat.html:
            from compress.compare.views.html import html_comparison

            write_text(html_comparison(comparison))
        case CompareFormat.console:
            import sys

            from rich.console import Console

            from compress.compare.views.console import console_comparison

            Console(file=sys.stdout).print(console_comparison(comparison))
