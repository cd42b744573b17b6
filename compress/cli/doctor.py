"""Command `compress doctor`: check this machine and installation, or a model."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.utils.errors import InputError
from compress.utils.progress import is_shown
from compress.utils.terminal import printable

if TYPE_CHECKING:
    from compress.cli.output import Finding
    from compress.inspection.layer_comparison import FormatComparison

_MARKS = {"ok": "ok     ", "absent": "-      ", "warning": "warning", "problem": "PROBLEM"}


@dataclass(frozen=True)
class _Examination:
    """Findings of the command, and the comparison of values behind them."""

    findings: list[Finding]
    answers: FormatComparison | None = None


def doctor(
    model: Annotated[
        Path | None,
        typer.Argument(help="Run folder or ONNX model to check for correctness on the target."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="With MODEL: cpu (this machine), a processor class (x86-avx2, x86-vnni, arm64, linux-arm64), or "
            "another target of `compress targets`, whose file is compared with the float file value by value."
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="With MODEL: recipe whose data is used as input; default: the recipe.yaml beside the model."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="With --target of another format: the float file that values are compared with; default: that of the "
            "run's cache."
        ),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Write the findings as JSON.")] = False,
) -> None:
    """Check this machine and installation, or a model. Exit code 1 if something must be fixed before a run."""
    from compress.utils.environment import environment

    machine = environment()
    if model is None:
        # These options refer to a model.
        for name, value in (("--target", target), ("--recipe", recipe), ("--against", against)):
            if value is not None:
                raise InputError(f"{name} has no effect without a model.", expected=f"compress doctor MODEL {name} ...")
        from compress.cli.doctor_machine import machine_findings

        result = _Examination(machine_findings(machine))
    else:
        result = _of_model(model, target, recipe, against)
    failed = any(finding.level == "problem" for finding in result.findings)
    _print(result, machine, failed, json_)
    if failed:
        raise typer.Exit(1)


def _print(result: _Examination, machine: dict[str, object], failed: bool, json_: bool) -> None:
    """Print the findings, and the comparison of values as JSON.

    Args:
        result: Findings and comparison.
        machine: Environment of this machine, for JSON.
        failed: Whether something must be fixed.
        json_: Print JSON.
    """
    if json_:
        import json

        report = {"ok": not failed, "findings": [asdict(f) for f in result.findings], "environment": machine}
        if result.answers is not None:
            report["answers"] = asdict(result.answers)
        typer.echo(json.dumps(report, indent=2))
    else:
        # What is absent may not be needed, and would hide the rest.
        absent = [finding for finding in result.findings if finding.level == "absent"]
        brief = len(absent) > 1 and not is_shown(logging.DEBUG)
        for finding in [f for f in result.findings if not (brief and f in absent)]:
            advice = f"\n         -> {finding.advice}" if finding.advice else ""
            typer.echo(printable(f"{_MARKS[finding.level]}  {finding.what}{advice}"))
        if brief:
            names = ", ".join(finding.what.partition(":")[0] for finding in absent)
            typer.echo(f"{_MARKS['absent']}  not on this machine: {names}")
            typer.echo("         -> compress doctor -v says why, and how to install it")
        typer.echo(_summary(result.findings))


def _summary(findings: list[Finding]) -> str:
    """Return a line with the number of findings of each level."""
    counts = Counter(finding.level for finding in findings)
    parts = [f"{counts['ok']} ok"]
    parts += [f"{counts['absent']} optional parts absent (-)"] if counts["absent"] else []
    parts += [
        f"{counts[level]} {level}{'s' * (counts[level] > 1)}" for level in ("warning", "problem") if counts[level]
    ]
    advice = "fix the problems before a run" if counts["problem"] else "nothing has to be fixed before a run"
    return f"{', '.join(parts)}: {advice}"


def _of_model(model: Path, target: str | None, recipe: Path | None, against: Path | None) -> _Examination:
    """Return the findings on a model.

    Args:
        model: Run folder or ONNX model.
        target: Name of a target or a kind of processor.
        recipe: Recipe with real inputs.
        against: Float file of the model.
    """
    from compress.cli.doctor_model import model_findings
    from compress.formats.target_profile import PROCESSORS
    from compress.formats.targets import TARGETS
    from compress.report.progress import ConsoleProgress

    progress = ConsoleProgress()
    # Files for other formats are compared by value. Processors are checked by the instructions that they have.
    if target and target != "cpu" and target in TARGETS and target not in PROCESSORS:
        from compress.cli.doctor_answers import answer_findings

        findings_by_value, answers = answer_findings(model, TARGETS[target], recipe, against, progress)
        return _Examination(findings_by_value, answers=answers)
    if against is not None:
        raise InputError(
            "--against has no effect without a target of another format, whose values are compared.",
            expected="--target with a name of `compress targets` other than cpu",
            hint="`compress compare A B --now` measures how fast two files are",
        )
    return _Examination(list(model_findings(model, target, recipe, progress)))
