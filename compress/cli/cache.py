"""Commands `compress cache`: list or remove the outputs of finished stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

cache_app = typer.Typer(help="List or remove the cached outputs of stages.", invoke_without_command=True)
_Artifacts = Annotated[Path, typer.Option(help="Folder of the cache and the runs.")]
_Json = Annotated[bool, typer.Option("--json", help="Write JSON.")]


@cache_app.callback()
def show(context: typer.Context, artifacts: _Artifacts = Path("artifacts"), json_: _Json = False) -> None:
    """List the entries, oldest first."""
    if context.invoked_subcommand is not None:
        return
    from datetime import UTC, datetime

    from compress.pipeline.cache import Cache

    rows = []
    for entry in Cache(artifacts / "cache").entries():
        created = datetime.fromtimestamp(entry.record["created"], UTC).isoformat(timespec="seconds")
        rows.append({"key": entry.key, "name": entry.record["name"], "bytes": entry.size_bytes, "created": created})
    if json_:
        typer.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        typer.echo(f"{row['key'][:12]}  {row['bytes'] / 1e6:9.2f} MB  {row['created']}  {row['name']}")
    typer.echo(f"{len(rows)} entries, {sum(row['bytes'] for row in rows) / 1e6:.2f} MB")


@cache_app.command(epilog="Example: compress cache prune --older-than-days 30")
def prune(
    artifacts: _Artifacts = Path("artifacts"),
    older_than_days: Annotated[float, typer.Option(min=0, help="Remove entries older than this; 0: all.")] = 0.0,
    json_: _Json = False,
) -> None:
    """Remove entries, and files of killed runs. Finished runs stay."""
    import time

    from compress.pipeline.cache import Cache

    cache = Cache(artifacts / "cache")
    removed: list[str] = []
    busy: list[str] = []
    freed = 0
    for entry in cache.entries():
        if time.time() - entry.record["created"] < older_than_days * 86400:
            continue
        size = cache.remove(entry.key)
        freed += size or 0
        (busy if size is None else removed).append(entry.key)
    # Killed runs leave partial entries without a record.
    freed += cache.remove_partial()
    if json_:
        typer.echo(json.dumps({"removed": removed, "in_use": busy, "freed_bytes": freed}))
        return
    typer.echo(f"{len(removed)} entries removed, {freed / 1e6:.2f} MB freed")
    for key in busy:
        typer.echo(f"{key[:12]} is in use by a run and stays", err=True)
