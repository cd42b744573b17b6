"""Command `compress tasks`: list the tasks with the columns of their data and their metrics."""

from __future__ import annotations

from typing import Annotated

import typer


def tasks(json_: Annotated[bool, typer.Option("--json", help="Write the list as JSON.")] = False) -> None:
    """List the tasks, under their Hugging Face names, with the columns of their data and their metrics."""
    import json

    from compress.cli.output import show
    from compress.tasks.registry import TASKS
    from compress.utils.responsive_table import ResponsiveTable, TableColumn

    rows = [
        {"name": task.name, "columns": [column.name for column in task.columns], "metrics": list(task.metrics)}
        for task in TASKS.values()
    ]
    if json_:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = ResponsiveTable("tasks", [TableColumn("name"), TableColumn("columns of the data"), TableColumn("metrics")])
    for row in rows:
        metrics = row["metrics"]
        more = f", and {len(metrics) - 4} more" if len(metrics) > 4 else ""
        table.add(str(row["name"]), ", ".join(row["columns"]), ", ".join(metrics[:4]) + more)
    show(table)
