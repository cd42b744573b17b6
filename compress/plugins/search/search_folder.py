"""The folder of a search and the files that are written into it after every trial."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

from pydantic_core import to_jsonable_python

from compress.pipeline.run import with_absolute_paths
from compress.plugins.search.engine import Engine
from compress.plugins.search.html_report import search_page
from compress.plugins.search.observations import LEDGER_FILE, Ledger, LedgerEntry, LedgerHeader
from compress.plugins.search.record import SearchRecord, format_outcome
from compress.plugins.search.space import Point, SearchParameter, SearchSpace, value_text
from compress.recipe.loading import dump_recipe
from compress.report.run_folder import LATEST, RECIPE, create_run_folder, update_latest_link, write_atomically
from compress.results.metrics import describe_metric
from compress.utils.environment import granted_cores, processor_class
from compress.utils.errors import InputError
from compress.utils.storage import storage_errors

BEST, RECORD, MODEL = "best.yaml", "search.json", "model"


def create_folder(space: SearchSpace, engine: Engine, artifacts: Path, started: datetime) -> Path:
    """Create the folder with the recipe and an empty ledger. Raises `StorageError`.

    Args:
        space: Search space.
        engine: Engine at the start.
        artifacts: Folder of all artifacts.
        started: Start of the search.

    Returns:
        The new folder.
    """
    with storage_errors(artifacts):
        folder = create_run_folder(artifacts / "searches" / space.base.name, started)
        write_atomically(folder / RECIPE, dump_recipe(with_absolute_paths(space.base, space.folder)))
    # The header comes before the link, so that `latest` always leads to a valid ledger.
    Ledger(folder).create(_header(space, engine))
    update_latest_link(folder)
    return folder


def resume_folder(space: SearchSpace, engine: Engine, artifacts: Path) -> tuple[Path, list[LedgerEntry]]:
    """Return the folder of the latest search and its trials.

    Raises `InputError` where there is no search, or where it differs.
    """
    searches = artifacts / "searches" / space.base.name
    folder = (searches / LATEST).resolve()
    if not (folder / LEDGER_FILE).is_file():
        raise InputError("There is no search to resume.", where=str(searches), hint="run it without --resume first")
    header, entries = Ledger(folder).read()
    header.check_same(_header(space, engine))
    return folder, entries


def write_results(folder: Path, space: SearchSpace, engine: Engine, record: SearchRecord) -> None:
    """Write the record, the best recipe and the page. Raises `StorageError`.

    Args:
        folder: Folder of the search.
        space: Search space.
        engine: Engine with all outcomes.
        record: Record of the search.
    """
    with storage_errors(folder):
        write_atomically(folder / RECORD, record.model_dump_json(indent=1) + "\n")
        best = engine.observations.best() if record.final is None else record.final.winner.point
        if best is not None:
            refit = record.final is not None and record.final.refit
            write_atomically(folder / BEST, best_recipe_yaml(space, engine, best, refit))
        write_atomically(folder / "search.html", search_page(record))


def _header(space: SearchSpace, engine: Engine) -> LedgerHeader:
    return LedgerHeader(
        recipe=to_jsonable_python(space.base),
        knobs=tuple((parameter.name, parameter.values) for parameter in space.parameters),
        rungs=engine.shares,
        machine={"processor": processor_class(), "cores": len(granted_cores())},
    )


def best_recipe_yaml(space: SearchSpace, engine: Engine, point: Point, refit: bool = False) -> str:
    """Return the recipe at a point as YAML that runs on its own.

    A comment explains each field that the search chose. The selection rows stay held out unless the recipe was
    refitted, so that a run finds every stage in the cache and gives the same bytes.

    Args:
        space: Search space.
        engine: Engine with all outcomes.
        point: Point of the recipe.
        refit: Whether it is trained on the selection rows too.

    Returns:
        Text of the file.
    """
    recipe = with_absolute_paths(space.recipe(point, refit=refit), space.folder).model_copy(update={"search": None})
    lines, left_out = dump_recipe(recipe, defaults=False).splitlines(), list[str]()
    included = [index for index in range(len(space.labels)) if index not in space.left_out(point)]
    # Explain each choice at the field itself. Stages that are left out have no field, so they are named at the top.
    for parameter, index in zip(space.parameters, point, strict=True):
        reason = explain_choice(space, engine, parameter, point)
        if parameter.is_optional_stage and index:
            left_out.append(f"# {parameter.name} is left out: {reason}")
        elif not parameter.is_optional_stage and parameter.stage_index in included:
            _comment(lines, included.index(parameter.stage_index), parameter.name.split(".")[-1], reason)
    head = [
        f"# Found by `compress search` among {space.size:,} recipes: {space.describe(point)}.",
        f"# On the selection rows{', before it was trained on them too' if refit else ''}:",
        *(f"#   {line}" for line in format_outcome(engine.goal, engine.observations.finished[point])),
        *left_out,
    ]
    return "\n".join([*head, *lines]) + "\n"


def explain_choice(space: SearchSpace, engine: Engine, parameter: SearchParameter, point: Point) -> str:
    """Explain the value of a parameter by recipes that differ in it alone.

    Args:
        space: Search space.
        engine: Engine with all outcomes.
        parameter: Parameter to explain.
        point: Point of the recipe.
    """
    index = space.parameters.index(parameter)
    chosen_outcome, tried = engine.observations.finished[point], []
    for other, outcome in engine.observations.finished.items():
        differing = [position for position, pair in enumerate(zip(point, other, strict=True)) if len(set(pair)) > 1]
        if differing == [index]:
            figures = ", ".join(
                f"{describe_metric(metric).title.lower()} times "
                f"{outcome.final[metric] / chosen_outcome.final[metric]:.2f}"
                for metric in engine.goal.minimize
                if chosen_outcome.final.get(metric) and metric in outcome.final
            )
            verdict = "" if engine.goal.meets_limits(outcome) else " and misses a limit"
            tried.append(f"{value_text(parameter.values[other[index]])} gives {figures}{verdict}")
    return "; ".join(tried) or "no recipe that differs in this alone was tried in full"


def _comment(lines: list[str], index: int, field: str, words: str) -> None:
    """Insert a comment above a field of the stage at ``index``."""
    # Earlier comments have moved the lines, so they are located anew.
    first = lines.index("stages:") + 1
    last = next((number for number in range(first, len(lines)) if re.match(r"[a-z_]+:", lines[number])), len(lines))
    heads = [number for number in range(first, last) if lines[number].startswith("- ")]
    for number in range(heads[index], [*heads, last][index + 1]):
        if re.match(rf"\s+(- )?{re.escape(field)}:", lines[number]):
            indent = len(lines[number]) - len(lines[number].lstrip())
            lines.insert(number, f"{' ' * indent}# {words}")
            return
