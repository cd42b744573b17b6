"""What a person means by a side of a comparison, and writing views."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import typer

from compress.compare.baseline import load_baseline
from compress.compare.policy_file import SECTION, read_policy
from compress.recipe.policy import Policy
from compress.report.locate import find_report
from compress.report.schema import Report


@dataclass(frozen=True)
class Found:
    """A report with where it lies; ``folder`` is None for a baseline's file, beside which nothing is."""

    report: Report
    path: Path
    name: str
    folder: Path | None


def find_side(given: Path) -> Found:
    """The report of a run's folder, a file, or a recipe's latest run. Raises `InputError`."""
    path = find_report(given)
    folder = path.resolve().parent
    return Found(load_baseline(path), path, str(given), folder if (folder / "recipe.yaml").is_file() else None)


def find_policy(given: Path | None, run: Found) -> tuple[Policy, str]:
    """The policy of a gate and where it comes from: the file, else the run's recipe, else the defaults."""
    if given is not None:
        return read_policy(given), str(given)
    recipe = run.folder / "recipe.yaml" if run.folder else None
    if recipe and f"\n{SECTION}:" in "\n" + recipe.read_text(encoding="utf-8"):
        return read_policy(recipe), f"`{SECTION}:` of {recipe}"
    return Policy(), "the defaults"


def with_model(policy: Policy, model: str | None) -> Policy:
    """The policy for another model of the run, if one is named."""
    return policy if model is None else policy.model_copy(update={"model": model})


def write_text(text: str) -> None:
    """To standard output in UTF-8, whatever the terminal's own encoding, since the views say so of themselves."""
    typer.echo(text.removesuffix("\n").encode("utf-8"))
