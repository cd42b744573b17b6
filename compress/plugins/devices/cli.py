"""Command `compress devices`: lists the machines of an inventory and whether each can be measured on now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from compress.plugins.devices.inventory import Device


def devices(
    names: Annotated[list[str] | None, typer.Argument(help="Only these devices.")] = None,
    inventory: Annotated[
        Path | None, typer.Option(help="The inventory; default: devices.yaml in the current folder.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove what earlier benches left in their caches.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Write the list as JSON.")] = False,
) -> None:
    """List the devices of an inventory, and whether each answers, is free and has a Python for the harness."""
    from compress.plugins.devices.inventory import ALL_DEVICES, choose_devices, find_inventory, read_inventory

    file = find_inventory(inventory, [Path()])
    selected = choose_devices(read_inventory(file), names or [ALL_DEVICES], file)
    rows = _looked_at(selected, file.absolute().parent, clear)
    if json_:
        typer.echo(json.dumps(rows, indent=2))
    else:
        width = max(map(len, selected))
        for row in rows:
            typer.echo(f"{row['name']:<{width}}  {row['address']}")
            for line in str(row["state"]).splitlines():
                typer.echo(f"{'':<{width}}  {line}")
    if any(not row["answers"] for row in rows):
        raise typer.Exit(3)


def _looked_at(chosen: Mapping[str, Device], folder: Path, clear: bool) -> list[dict[str, Any]]:
    from compress.utils.errors import CompressError

    def one(name: str) -> dict[str, Any]:
        device = chosen[name]
        row = {"name": name, "address": f"{device.user}@{device.host}, port {device.port}"}
        try:
            return {**row, "answers": True, **_asked(name, device, folder, clear)}
        except CompressError as error:
            return {**row, "answers": False, "state": str(error)}

    with ThreadPoolExecutor(len(chosen)) as pool:
        return list(pool.map(one, chosen))


def _asked(name: str, device: Device, folder: Path, clear: bool) -> dict[str, Any]:
    from compress.plugins.devices.connection import Connection
    from compress.plugins.devices.session import PACKAGES, busy_error, requirements

    with Connection(name, device, folder) as connection:
        if clear:
            freed = connection.request("clear")
            if freed["holder"]:
                raise busy_error(name, freed["holder"])
            return {"freed_bytes": freed["bytes"], "state": f"{freed['bytes'] / 1e6:.0f} MB of cache were removed"}
        found = connection.request("probe", blobs=[], requirements=requirements(PACKAGES))
    holder = found["holder"]
    state = f"taken by {holder['who']} since {holder['since']}" if holder else "free"
    ready = "has its environment" if found["has_environment"] else "makes its environment at the first bench"
    what = f"{found['platform']}, Python {found['python']}, {found['free_bytes'] / 1e9:.1f} GB free"
    return {
        "state": f"{state}; {what}; {ready}",
        **{key: found[key] for key in ("platform", "python", "free_bytes", "has_environment", "holder")},
    }
