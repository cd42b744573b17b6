"""Command `compress targets`: list the targets and whether they are available here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def targets(
    target: Annotated[
        str | None,
        typer.Argument(metavar="NAME|FILE", help="Show only the target of this name, or that a YAML file describes."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Write the list as JSON.")] = False,
) -> None:
    """List the targets, and why some are not available here."""
    import json

    from compress.formats.runtime import why_unavailable
    from compress.formats.target_profile import AppProfile
    from compress.formats.targets import PROFILES, find_profile

    if target is None:
        profiles = list(PROFILES.values())
    elif target not in PROFILES and (Path(target).exists() or Path(target).suffix in {".yaml", ".yml"}):
        from compress.recipe.target_entries import read_target_file

        profiles = [read_target_file(Path(target))]
    else:
        profiles = [find_profile(target)]
    rows: list[dict[str, Any]] = []
    for profile in profiles:
        shown = profile.target
        reason = why_unavailable(shown)
        rows.append(
            {
                "name": shown.name,
                "description": shown.description,
                "runtime": shown.runtime,
                "provider": shown.provider,
                "formats": list(profile.allowed),
                "threads": profile.threads,
                "max_bytes": profile.max_bytes,
                "max_memory_bytes": profile.max_memory_bytes,
                "measured_instead_of": profile.instead_of,
                "device": profile.device,
                "options": dict(profile.options),
                "apps": {form: app.package for form, app in profile.apps.items()}
                if isinstance(profile, AppProfile)
                else {},
                "available": reason is None,
                "reason": reason,
            }
        )
    if json_:
        typer.echo(json.dumps(rows, indent=2))
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        state = "available" if row["available"] else f"not here: {row['reason']}"
        typer.echo(f"{row['name']:<{width}}  {row['description']}; {', '.join(row['formats'])}\n{'':<{width}}  {state}")
        if row["device"]:
            typer.echo(f"{'':<{width}}  timed on the device {row['device']}")
        elif row["measured_instead_of"]:
            typer.echo(f"{'':<{width}}  measured on this machine instead of {row['measured_instead_of']}")
