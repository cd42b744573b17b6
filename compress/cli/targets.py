"""`compress targets`: where artifacts can be run from here."""

from __future__ import annotations

from typing import Annotated

import typer


def targets(json_: Annotated[bool, typer.Option("--json", help="Write the list as JSON.")] = False) -> None:
    """List the targets, and for those that can't be had here, why."""
    import json

    from compress.runtimes import why_unavailable
    from compress.targets import TARGETS

    rows = [
        {
            "name": target.name,
            "description": target.description,
            "runtime": target.runtime,
            "provider": target.provider,
            "available": reason is None,
            "reason": reason,
        }
        for target, reason in ((target, why_unavailable(target)) for target in TARGETS.values())
    ]
    if json_:
        typer.echo(json.dumps(rows, indent=2))
        return
    width = max(len(name) for name in TARGETS)
    for row in rows:
        state = "available" if row["available"] else f"not here: {row['reason']}"
        typer.echo(f"{row['name']:<{width}}  {row['description']}\n{'':<{width}}  {state}")
