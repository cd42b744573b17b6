"""The best recipe of a search, compared with a recipe written by hand that the search did not know.

The command `found` of `benchmarks/search.py`: both models are measured in one session on the test rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from search_page import Write, by_model, show

SEARCHED, BY_HAND = "found", "by hand"


def found(
    search: Annotated[Path, typer.Argument(help="Folder of a finished search.")],
    by_hand: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run of the recipe written by hand.")],
    artifacts: Annotated[Path, typer.Option(help="Folder of the stage cache of that run.")] = Path("artifacts"),
    threads: Annotated[int | None, typer.Option(help="Threads of the models. Default: those of the search.")] = None,
    write: Write = False,
) -> None:
    """Compare quality, size and latency of both models."""
    from compress.formats.quiet_output import quiet_libraries
    from compress.pipeline.formats import measurable
    from compress.pipeline.runner import StageRunner
    from compress.pipeline.target_session import TargetSession
    from compress.plugins.search.record import SearchRecord
    from compress.recipe.loading import read_recipe
    from compress.report.progress import ConsoleProgress
    from compress.results.formatting import format_seconds
    from compress.results.metrics import describe_metric
    from compress.results.report import BASELINE, FINAL

    quiet_libraries()
    record = SearchRecord.model_validate_json((search / "search.json").read_text())
    best = read_recipe(search / "best.yaml", ())
    recipe = read_recipe(by_hand / "recipe.yaml", ())
    benchmark = {"threads": threads or best.benchmark.threads, "every_stage": False}
    recipe = recipe.model_copy(update={"benchmark": recipe.benchmark.model_copy(update=benchmark)})
    runner = StageRunner(recipe, by_hand, artifacts, ConsoleProgress())
    runner.run_all()
    profile = recipe.profiles()[0]
    files = measurable(runner, profile.target.format, profile.options)
    labels = {BASELINE: files[BASELINE], FINAL: files[FINAL], SEARCHED: search / "model"}
    session = TargetSession(runner, profile, labels, "test")
    rows = [*session.sizes(), *session.accuracies([]), *session.timings(remeasure=False)[0]]
    shown = ("size_bytes", "latency_ms", "time_per_output_token_ms")
    metrics = [name for name in dict.fromkeys(row.metric for row in rows)
               if describe_metric(name).quality or name in shown]  # fmt: skip
    table = by_model(rows, (BASELINE, FINAL, SEARCHED), metrics)
    seconds, budget = format_seconds(record.seconds), format_seconds(record.budget_seconds)
    table += [
        ["time of the trials, and the budget", "", "", f"{seconds}, {budget}"],
        ["recipes tried, of", "", "", f"{len(record.trials)}, {record.size:,}"],
        ["best recipe", "", "", record.best or record.nearest or ""],
    ]
    note = (
        "`python benchmarks/search.py found SEARCH RUN --write`; both in one session, on the test rows. Objective: "
        f"{record.description.rstrip('.')}, within {', '.join(record.limits)}."
    )
    show(
        f"Best recipe for {recipe.task.replace('-', ' ')}",
        ("quantity", "baseline", BY_HAND, SEARCHED),
        table,
        write,
        notes=[note],
    )
