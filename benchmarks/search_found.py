"""What a search found beside the recipe that somebody made by hand, which it was not told of.

The command `found` of `benchmarks/search.py`: both models in one session on the test rows, which chose neither.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from search_page import Write, by_model, show

FOUND, BY_HAND = "found", "by hand"


def found(
    search: Annotated[Path, typer.Argument(help="The folder of a search that has ended.")],
    made: Annotated[Path, typer.Argument(help="The folder of a run of the recipe made by hand.")],
    artifacts: Annotated[Path, typer.Option(help="Where the stages of that run are cached.")] = Path("artifacts"),
    threads: Annotated[int | None, typer.Option(help="For the models; default: what the search had.")] = None,
    write: Write = False,
) -> None:
    """Quality, bytes and time of both, and what the search took."""
    from compress.cli.output import ConsoleProgress
    from compress.formats.quiet_output import quiet_libraries
    from compress.pipeline.formats import measurable
    from compress.pipeline.runner import StageRunner
    from compress.pipeline.target_session import TargetSession
    from compress.plugins.search.record import SearchRecord
    from compress.recipe.loading import read_recipe
    from compress.results.formatting import format_seconds
    from compress.results.metrics import describe_metric
    from compress.results.report import BASELINE, FINAL

    quiet_libraries()
    record = SearchRecord.model_validate_json((search / "search.json").read_text())
    theirs = read_recipe(search / "best.yaml", ())
    recipe = read_recipe(made / "recipe.yaml", ())
    benchmark = {"threads": threads or theirs.benchmark.threads, "every_stage": False}
    recipe = recipe.model_copy(update={"benchmark": recipe.benchmark.model_copy(update=benchmark)})
    runner = StageRunner(recipe, made, artifacts, ConsoleProgress())
    runner.run_all()
    profile = recipe.profiles()[0]
    files = measurable(runner, profile.target.format, profile.options)
    labels = {BASELINE: files[BASELINE], FINAL: files[FINAL], FOUND: search / "model"}
    session = TargetSession(runner, profile, labels, "test")
    rows = [*session.sizes(), *session.accuracies([]), *session.timings(remeasure=False)[0]]
    shown = ("size_bytes", "latency_ms", "time_per_output_token_ms")
    metrics = [name for name in dict.fromkeys(row.metric for row in rows)
               if describe_metric(name).quality or name in shown]  # fmt: skip
    table = by_model(rows, (BASELINE, FINAL, FOUND), metrics)
    took, most = format_seconds(record.seconds), format_seconds(record.budget_seconds)
    table += [
        ["time of its trials, and the budget", "", "", f"{took}, {most}"],
        ["recipes tried, of", "", "", f"{len(record.trials)}, {record.size:,}"],
        ["what it found", "", "", record.best or record.nearest or ""],
    ]
    note = (
        "`python benchmarks/search.py found SEARCH RUN --write`; both in one session, on the test rows. Searched was "
        f"{record.description.rstrip('.')}, within {', '.join(record.limits)}."
    )
    show(
        f"Best recipe for {recipe.task.replace('-', ' ')}",
        ("quantity", "baseline", BY_HAND, FOUND),
        table,
        write,
        notes=[note],
    )
