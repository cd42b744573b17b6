"""`compress doctor`: is everything here that a run needs?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.utils.errors import InputError

if TYPE_CHECKING:
    from compress.benchmark.profile import OperatorDifference
    from compress.cli.output import Finding
    from compress.inspection.layer_comparison import FormatComparison

_MARKS = {"ok": "ok     ", "warning": "warning", "problem": "PROBLEM"}


@dataclass(frozen=True)
class _Seen:
    """What was found, and the records behind it."""

    findings: list[Finding]
    differences: Sequence[OperatorDifference] = ()
    answers: FormatComparison | None = None


def doctor(
    model: Annotated[
        Path | None,
        typer.Argument(help="A run's folder or an ONNX model: will it be right and fast on the target?"),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="With MODEL: cpu (this machine), a kind of processor (x86-avx2, x86-vnni, arm64, linux-arm64), or "
            "another of `compress targets`, whose file is compared with the float one, value by value."
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="With MODEL: where real inputs come from; default: the recipe.yaml beside the model."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="With MODEL: its float file, to time both layer by layer or compare their values; default: that of "
            "the run's cache."
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time budget of that.")] = 5.0,
    json_: Annotated[bool, typer.Option("--json", help="Write the findings as JSON.")] = False,
) -> None:
    """Look over this machine and installation, or a model. Exit code 1 if something must be mended before a run."""
    import json

    from compress.utils.environment import environment

    machine = environment()
    if model is None:
        for name, value in (("--target", target), ("--recipe", recipe), ("--against", against)):
            if value is not None:
                raise InputError(f"{name} means nothing without a model.", expected=f"compress doctor MODEL {name} ...")
        from compress.cli.doctor_machine import machine_findings

        seen = _Seen(machine_findings(machine))
    else:
        seen = _of_model(model, target, recipe, against, seconds)
    failed = any(finding.level == "problem" for finding in seen.findings)
    if json_:
        report = {"ok": not failed, "findings": [asdict(f) for f in seen.findings], "environment": machine}
        records = [each.model_dump(mode="json") for each in seen.differences]
        if len(records) == 1:
            report["difference"] = records[0]
        elif records:
            report["differences"] = records
        if seen.answers is not None:
            report["answers"] = asdict(seen.answers)
        typer.echo(json.dumps(report, indent=2))
    else:
        for finding in seen.findings:
            typer.echo(f"{_MARKS[finding.level]}  {finding.what}")
            if finding.advice:
                typer.echo(f"         -> {finding.advice}")
        for difference in seen.differences:
            _show(difference, named=len(seen.differences) > 1)
    if failed:
        raise typer.Exit(1)


def _show(difference: OperatorDifference, named: bool) -> None:
    from rich.console import Console

    from compress.report.difference_console import console_difference

    if named:
        typer.echo(f"\n{Path(difference.int8_file).name} against {Path(difference.float_file).name}")
    Console().print(console_difference(difference))
    for note in difference.notes:
        typer.echo(note, err=True)


def _of_model(model: Path, target: str | None, recipe: Path | None, against: Path | None, seconds: float) -> _Seen:
    from compress.cli.console_progress import ConsoleProgress
    from compress.cli.doctor_model import model_findings, speed_findings
    from compress.formats.target_profile import PROCESSORS
    from compress.formats.targets import TARGETS

    progress = ConsoleProgress()
    here = target in (None, "cpu")
    if target is not None and not here and target in TARGETS and target not in PROCESSORS:
        from compress.cli.doctor_answers import answer_findings

        found, answers = answer_findings(model, TARGETS[target], recipe, against, progress)
        return _Seen(found, answers=answers)
    if not here and against is not None:
        raise InputError(
            f"--against is timed on this machine, and --target {target} is not this one.",
            expected="--target cpu, or none, with --against",
        )
    findings = list(model_findings(model, target, recipe, progress))
    if not here:
        return _Seen(findings)
    more, differences = speed_findings(model, recipe, against, seconds, progress)
    return _Seen([*findings, *more], differences)
