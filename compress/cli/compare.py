"""Commands `compress compare A B`, which judges changes, and `compress gate RUN`, which passes or fails by a policy.

A run is the folder of one execution of a recipe, with its `report.json` of measurements. A policy says which metrics
matter and which changes are too small to count. A gate's baseline is a JSON file with the measurements of an accepted
run, usually in version control, and the baseline model of a run is the model before compression.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from compress.report.run_folder import RECIPE, REPORT

if TYPE_CHECKING:
    from compress.recipe.policy import Policy
    from compress.report.compare.change import Comparison
    from compress.results.report import Report


@dataclass(frozen=True)
class ReportFile:
    """Report of a run or of a baseline file.

    Attributes:
        report: Measurements.
        path: File that the report was read from.
        name: Run as given on the command line.
        folder: Folder of the run, whose other files can be compared too. None for a baseline file.
    """

    report: Report
    path: Path
    name: str
    folder: Path | None


def compare(
    baseline: Annotated[
        Path,
        typer.Argument(
            metavar="A", help="Run to compare with: folder, report.json, a baseline's file, or a recipe's name."
        ),
    ],
    candidate: Annotated[
        Path | None,
        typer.Argument(
            metavar="B", help="The run to judge; default: compare the final model of A with A's own baseline."
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="Model of the runs: final, baseline, or a stage's label.")] = "final",
    policy: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with the smallest changes that matter; default: smaller ones than those of a gate."
        ),
    ] = None,
    across_hosts: Annotated[
        bool, typer.Option("--across-hosts", help="Give verdicts on times even if the machines differ.")
    ] = False,
    now: Annotated[
        bool, typer.Option("--now", help="Measure both models now, interleaved: more precise than comparing reports.")
    ] = False,
    recipe: Annotated[
        Path | None, typer.Option(help="With --now: the recipe; default: the recipe.yaml beside B's model.")
    ] = None,
    target: Annotated[str, typer.Option(help="With --now: target of both; see `compress targets`.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="With --now: threads of the runtime.")] = None,
    budget: Annotated[float | None, typer.Option(min=1, help="With --now: maximum seconds for timing.")] = None,
    format: Annotated[
        Literal["console", "markdown", "html", "json"], typer.Option(help="Format of the output.")
    ] = "console",
    json_: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also show intervals, margins and the samples needed.")
    ] = False,
) -> None:
    """Compare two runs, or a run's model with its own baseline: better, same, worse, or inconclusive."""
    from compress.cli.output import show
    from compress.recipe.policy import comparison_policy
    from compress.report.compare.gate import read_policy
    from compress.report.compare.views import comparison_view
    from compress.results.report import BASELINE
    from compress.utils.progress import set_verbosity

    if verbose:
        set_verbosity(quiet=False, verbose=True)
    rules = (read_policy(policy) if policy else comparison_policy()).model_copy(update={"model": model})
    view = "json" if json_ else format
    # Models that are measured alternately now have the same load of the machine, unlike those of two old reports.
    if now:
        from compress.cli.side_by_side import compare_now

        show(comparison_view(compare_now(baseline, candidate, rules, recipe, target, threads, budget), view))
        return
    first = _load_report(baseline)
    # Without B, the model `--model` of A is compared with the baseline model of the same report.
    second = _load_report(candidate) if candidate else first
    show(comparison_view(_compare(first, second, rules, across_hosts, None if candidate else BASELINE), view))


def gate(
    run: Annotated[Path, typer.Argument(help="The run to judge: its folder, report.json, or a recipe's name.")],
    baseline: Annotated[Path, typer.Option(help="The baseline: its JSON file, or another run as `RUN`.")],
    policy: Annotated[
        Path | None,
        typer.Option(help="YAML file with the rules; default: `gate:` of the run's recipe, or else built-in rules."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model of the runs; default: the one in the policy, or `final`.")
    ] = None,
    across_hosts: Annotated[
        bool, typer.Option("--across-hosts", help="Judge times even if the machines differ.")
    ] = False,
    update: Annotated[bool, typer.Option("--update", help="Make the run the new baseline: write the file.")] = False,
    why: Annotated[
        str | None, typer.Option(help="With --update: the reason, stored in the file. Required to lower the bar.")
    ] = None,
    format: Annotated[
        Literal["console", "markdown", "html", "json", "junit", "github"],
        typer.Option(help="Format of the output."),
    ] = "console",
    json_: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also show intervals, margins and the samples needed.")
    ] = False,
) -> None:
    """Judge a run against a baseline by a policy. Exit code 1: something got worse than allowed."""
    from compress.cli.output import show, show_hint
    from compress.report.compare.gate import find_policy, judge_comparison
    from compress.report.compare.views import gate_view
    from compress.utils.errors import InputError
    from compress.utils.progress import set_verbosity

    if verbose:
        set_verbosity(quiet=False, verbose=True)
    if why is not None and not update:
        raise InputError("--why is the reason for replacing a baseline.", hint="give --update with it, or leave it out")
    run_file = _load_report(run)
    if not update and baseline.suffix == ".json" and not baseline.exists():
        raise InputError(
            "There is no such baseline.",
            where=str(baseline),
            expected="the JSON file of a baseline, or another run",
            hint=f"make an accepted run the baseline: compress gate {run} --baseline {baseline} --update",
        )
    rules, source = find_policy(policy, run_file.folder)
    rules = rules if model is None else rules.model_copy(update={"model": model})
    # An update judges nothing. It only lists metrics on which the new baseline would demand less.
    if update:
        _update(run_file, baseline, rules, why, json_)
        return
    show_hint(f"policy: {source}")
    result = judge_comparison(_compare(_load_report(baseline), run_file, rules, across_hosts), rules)
    show(gate_view(result, "json" if json_ else format))
    if result.failed:
        raise typer.Exit(1)


def _compare(
    baseline: ReportFile, candidate: ReportFile, rules: Policy, across_hosts: bool, baseline_model: str | None = None
) -> Comparison:
    """Compare two reports. ``baseline_model`` is the model of ``baseline``; by default the one that ``rules`` name."""
    from compress.report.compare.reports import compare_reports

    names, folders = (baseline.name, candidate.name), (baseline.folder, candidate.folder)
    return compare_reports(
        baseline.report,
        candidate.report,
        rules,
        names=names,
        baseline_model=baseline_model,
        across_hosts=across_hosts,
        folders=folders,
    )


def _update(run: ReportFile, path: Path, rules: Policy, why: str | None, as_json: bool) -> None:
    """Write the run as the baseline at ``path``.

    Args:
        run: Report of the run.
        path: File that is written.
        rules: Policy of the gate.
        why: Reason that is stored in the file.
        as_json: Whether the result is printed as JSON.

    Raises:
        InputError: The baseline would demand less, and no reason is given.
    """
    import json

    from compress.report.compare.baseline import current_origin, lowered_metrics, write_baseline
    from compress.report.compare.formatting import change_sentence
    from compress.utils.errors import InputError

    if path.suffix != ".json" or path.name == REPORT:
        raise InputError(
            "--update writes a baseline's file, and this is another file.",
            where=str(path),
            expected="a file such as baselines/my-recipe.json; a run's own report is never changed",
        )
    previous = _load_report(path) if path.exists() else None
    # The machines may differ, since a baseline may be replaced by one that was measured on a new machine.
    lowered = lowered_metrics(_compare(previous, run, rules, across_hosts=True), rules) if previous else ()
    if lowered and not (why or "").strip():
        lines = "\n".join(f"  {change_sentence(change)}" for change in lowered)
        raise InputError(
            f"The new baseline would lower the bar:\n{lines}",
            where=str(path),
            expected="a reason that is stored in the file",
            hint='if this is intended, name the reason: --update --why "..."',
        )
    reason = (why or "").strip() or ("raises the bar, or keeps it" if previous else "the first baseline")
    origin = current_origin(reason)
    write_baseline(run.report, path, origin, rules.model)
    if as_json:
        typer.echo(json.dumps({"baseline": str(path), **origin.model_dump(), "lowered": [c.metric for c in lowered]}))
    else:
        typer.echo(f"{path}: {run.name} ({rules.model}), by {origin.who}: {origin.why}")


def _load_report(argument: Path) -> ReportFile:
    """Read the report of a run's folder, a JSON file, or a recipe's latest run. Raises `InputError` if none exists."""
    from compress.report.compare.baseline import load_baseline
    from compress.report.run_folder import find_report

    path = find_report(argument)
    folder = path.resolve().parent
    return ReportFile(load_baseline(path), path, str(argument), folder if (folder / RECIPE).is_file() else None)
