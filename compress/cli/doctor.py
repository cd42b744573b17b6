"""`compress doctor`: is everything here that a run needs?"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.output import Finding

if TYPE_CHECKING:
    from compress.bench.difference import OperatorDifference
    from compress.inspect.departures import FormatComparison

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_LITTLE_DISK_BYTES = 5_000_000_000
_LITTLE_MEMORY_BYTES = 4_000_000_000
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

    from compress.environment import environment

    machine = environment()
    if model is None:
        _refuse_options({"--target": target, "--recipe": recipe, "--against": against})
        seen = _Seen(_of_machine(machine))
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


def _refuse_options(options: dict[str, object]) -> None:
    from compress.errors import InputError

    for name, value in options.items():
        if value is not None:
            raise InputError(f"{name} means nothing without a model.", expected=f"compress doctor MODEL {name} ...")


def _of_machine(machine: dict[str, Any]) -> list[Finding]:
    return [
        *_installation(),
        *_plugins(),
        *_targets(),
        *_processor(machine),
        *_memory(machine),
        *_disk(Path.cwd()),
        *_browser(),
    ]


def _of_model(model: Path, target: str | None, recipe: Path | None, against: Path | None, seconds: float) -> _Seen:
    from compress.cli.console_progress import ConsoleProgress
    from compress.cli.doctor_model import model_findings
    from compress.cli.doctor_speed import speed_findings
    from compress.errors import InputError
    from compress.formats.targets import TARGETS
    from compress.targets import PROCESSORS

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


def _installation() -> Iterator[Finding]:
    from compress.installation import is_installed, packages

    if not is_installed():
        yield Finding("warning", "compress runs from its folder and is not installed", "pip install -e .")
    required = [package for package in packages() if package.extra is None]
    bad = [package for package in required if not package.fits]
    for package in bad:
        have = f"{package.installed} is installed" if package.installed else "it is missing"
        yield Finding(
            "problem",
            f"{package.name} {package.wanted} is needed, {have}",
            f"pip install '{package.name}{package.wanted}'",
        )
    if not bad:
        yield Finding("ok", f"all {len(required)} required packages, in the versions wanted")
    for extra in dict.fromkeys(package.extra for package in packages() if package.extra):
        lacking = [package.name for package in packages() if package.extra == extra and not package.fits]
        state = f"not installed (lacks {', '.join(lacking)})" if lacking else "installed"
        yield Finding("ok", f"extra {extra}: {state}", f"pip install 'compress[{extra}]'" if lacking else None)


def _plugins() -> Iterator[Finding]:
    """What other packages add, and what of it cannot be used."""
    from compress import stages  # noqa: F401
    from compress.formats.lacking import lacking
    from compress.formats.registry import PLUGGED
    from compress.plugins import plugin_errors

    for form in PLUGGED:
        if faults := lacking(form):
            yield Finding("warning", f"the format {form} of a plugin: {'; '.join(faults)}", "mend or uninstall it")
        else:
            yield Finding("ok", f"the format {form} of a plugin: all that it refers to is there")
    for error in plugin_errors():
        yield Finding("warning", str(error), "mend or uninstall the package")


def _targets() -> Iterator[Finding]:
    from compress.formats.runtimes import why_unavailable
    from compress.formats.targets import TARGETS
    from compress.installation import packages

    for target in TARGETS.values():
        reason = why_unavailable(target)
        if reason is None:
            yield Finding("ok", f"target {target.name}: available")
        elif target.name == "cpu":
            yield Finding("problem", f"target cpu: {reason}", "pip install --force-reinstall onnxruntime")
        else:
            yield Finding("ok", f"target {target.name}: not here, {reason}; recipes skip it")
    versions = {package.name: package.installed for package in packages()}
    if versions.get("onnxruntime-gpu") and why_unavailable(TARGETS["gpu"]):
        yield Finding(
            "warning",
            "onnxruntime-gpu is installed and yet has no working CUDA provider",
            "onnxruntime may have overwritten its files: pip install --force-reinstall --no-deps "
            "onnxruntime-gpu; then look at the driver",
        )


def _processor(machine: dict[str, Any]) -> Iterator[Finding]:
    from compress.environment import has_bf16, has_int8_dot_product

    granted, features = machine["cores_granted"], machine["features"]
    yield Finding(
        "ok", f"{machine['processor']}, {granted} cores granted ({', '.join(features) or 'features unknown'})"
    )
    quota = machine["cores_quota"]
    if quota is not None and quota < granted:
        yield Finding(
            "warning",
            f"a control group grants the time of {quota:g} cores only; timings will be throttled",
            f"set benchmark.threads to at most {max(1, int(quota))}, or raise the limit",
        )
    if "avx2" in features and not has_int8_dot_product():
        yield Finding(
            "warning",
            "the processor lacks VNNI: 8-bit products may saturate and int8 gains little speed",
            "`reduce_range: auto` of the quantize stage keeps weights from saturating",
        )
    if features and not has_bf16():
        yield Finding("ok", "no bf16 arithmetic: training runs in fp32")
    if machine["governor"] not in (None, "performance"):
        yield Finding(
            "warning",
            f"the frequency governor is {machine['governor']!r}: timings will vary",
            "cpupower frequency-set -g performance",
        )
    load = os.getloadavg()[0]
    if load > granted:
        yield Finding("warning", f"the load is {load:.1f} on {granted} cores", "stop what else runs before timing")


def _memory(machine: dict[str, Any]) -> Iterator[Finding]:
    sizes = [size for size in (machine["memory_bytes"], machine["memory_limit_bytes"]) if size is not None]
    if not sizes:
        return
    text = f"{min(sizes) / 1e9:.1f} GB of memory"
    if min(sizes) < _LITTLE_MEMORY_BYTES:
        yield Finding("warning", f"{text} is little", "train small models, or lower batch_size")
    else:
        yield Finding("ok", text)


def _disk(folder: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:.1f} GB free on the disk of the current folder"
    if not os.access(folder, os.W_OK):
        yield Finding("problem", "the current folder cannot be written to", "run from a folder of your own")
    elif free < _LITTLE_DISK_BYTES:
        yield Finding("warning", f"{text}, which is little", "`compress cache prune`, or free some space")
    else:
        yield Finding("ok", text)


def _browser() -> Iterator[Finding]:
    found = next((name for name in BROWSERS if shutil.which(name)), None)
    if found:
        yield Finding("ok", f"browser for the report's own tests: {found}")
    else:
        yield Finding("ok", "no Chromium: the tests marked `browser` are skipped", "install chromium to run them")
