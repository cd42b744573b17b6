"""`compress gate RUN --baseline REF`: may this run replace what is there?"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from compress.cli.compared import Found
    from compress.compare.gate import GateResult
    from compress.recipe.policy import Policy


class GateFormat(StrEnum):
    """The views of a gate."""

    console = "console"
    markdown = "markdown"
    html = "html"
    json = "json"
    junit = "junit"
    github = "github"


def gate(
    run: Annotated[Path, typer.Argument(help="The run to judge: its folder, report.json, or a recipe's name.")],
    baseline: Annotated[
        Path, typer.Option(help="What it is judged against: a baseline's JSON file, or another run as `RUN`.")
    ],
    policy: Annotated[
        Path | None,
        typer.Option(help="A YAML file with the rules; default: `gate:` of the run's recipe, else built-in rules."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Which model of the runs; default: the policy's, final.")] = None,
    across_hosts: Annotated[
        bool, typer.Option("--across-hosts", help="Judge times even if the machines differ.")
    ] = False,
    update: Annotated[bool, typer.Option("--update", help="Make the run the new baseline: write the file.")] = False,
    why: Annotated[
        str | None, typer.Option(help="With --update: the reason, kept in the file. Needed to lower the bar.")
    ] = None,
    format: Annotated[GateFormat, typer.Option(help="The view to write to standard output.")] = GateFormat.console,
    json_: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Judge a run against a baseline by a policy. Exit code 1: something got worse by more than it may."""
    from compress.cli.compared import find_policy, find_side, with_model
    from compress.errors import InputError

    if why is not None and not update:
        raise InputError("--why says why a baseline is replaced.", mend="give --update with it, or leave it out")
    found = find_side(run)
    rules, source = find_policy(policy, found)
    rules = with_model(rules, model)
    if update:
        _update(found, baseline, rules, why, json_)
        return
    typer.echo(f"policy: {source}", err=True)
    result = _judged(found, find_side(baseline), rules, across_hosts)
    _write(result, GateFormat.json if json_ else format)
    if result.failed:
        raise typer.Exit(1)


def _judged(run: Found, baseline: Found, rules: Policy, across_hosts: bool) -> GateResult:
    from compress.compare.gate import gate as judge
    from compress.compare.reports import compare_reports

    comparison = compare_reports(
        baseline.report,
        run.report,
        rules,
        names=(baseline.name, run.name),
        across_hosts=across_hosts,
        folders=(baseline.folder, run.folder),
    )
    return judge(comparison, rules)


def _update(run: Found, path: Path, rules: Policy, why: str | None, as_json: bool) -> None:
    """Write the run as the baseline at ``path``. Raises `InputError` where the bar would come down unexplained."""
    import json

    from compress.cli.compared import find_side
    from compress.compare.baseline import lowered, origin, write_baseline
    from compress.compare.words import sentence
    from compress.errors import InputError

    if path.suffix != ".json" or path.name == "report.json":
        raise InputError(
            "--update writes a baseline's file, and this is none.",
            where=str(path),
            expected="a file such as baselines/my-recipe.json; a run's own report is never changed",
        )
    before = find_side(path) if path.exists() else None
    less = lowered(_judged(run, before, rules, across_hosts=True).comparison, rules) if before else ()
    if less and not (why or "").strip():
        lines = "\n".join(f"  {sentence(change)}" for change in less)
        raise InputError(
            f"The new baseline would lower the bar:\n{lines}",
            where=str(path),
            expected="a reason that is kept in the file",
            mend='if it is meant, say so: --update --why "..."',
        )
    made = origin((why or "").strip() or ("raises the bar, or keeps it" if before else "the first baseline"))
    write_baseline(run.report, path, made, rules.model)
    if as_json:
        typer.echo(json.dumps({"baseline": str(path), **made.model_dump(), "lowered": [c.metric for c in less]}))
    else:
        typer.echo(f"{path}: {run.name} ({rules.model}), by {made.who}: {made.why}")


def _write(result: GateResult, format: GateFormat) -> None:
    from compress.cli.compared import write_text

    match format:
        case GateFormat.json:
            write_text(result.to_json())
        case GateFormat.markdown:
            from compress.compare.views.markdown import markdown_gate

            write_text(markdown_gate(result))
        case GateFormat.html:
            from compress.compare.views.html import html_gate

            write_text(html_gate(result))
        case GateFormat.junit:
            from compress.compare.views.build_servers import junit_gate

            write_text(junit_gate(result))
        case GateFormat.github:
            from compress.compare.views.build_servers import github_gate

            write_text(github_gate(result))
        case GateFormat.console:
            import sys

            from rich.console import Console

            from compress.compare.views.console import console_gate

            Console(file=sys.stdout).print(console_gate(result))
