"""Command `compress devices`: lists the machines of an inventory and whether each can be measured on now."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from compress.plugins.devices.device_host import DeviceHost


def devices(
    names: Annotated[list[str] | None, typer.Argument(help="Only these devices.")] = None,
    inventory: Annotated[
        Path | None, typer.Option(help="The inventory; default: devices.yaml in the current folder.")
    ] = None,
    clear: Annotated[
        bool, typer.Option("--clear", help="Remove files of earlier benchmarks from the devices' caches.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Write the list as JSON.")] = False,
) -> None:
    """List the devices of an inventory, and whether each answers, is free and has a Python for the harness."""
    from compress.plugins.devices.device_host import find_devices
    from compress.plugins.devices.inventory import ALL_DEVICES

    hosts = find_devices(names or [ALL_DEVICES], inventory, [Path()])
    with ThreadPoolExecutor(len(hosts)) as pool:
        rows = list(pool.map(partial(_probe, clear=clear), hosts.values()))
    if json_:
        typer.echo(json.dumps(rows, indent=2))
    else:
        width = max(map(len, hosts))
        for row in rows:
            typer.echo(f"{row['name']:<{width}}  {row['address']}")
            for line in str(row["state"]).splitlines():
                typer.echo(f"{'':<{width}}  {line}")
    if any(not row["answers"] for row in rows):
        raise typer.Exit(3)


def _probe(host: DeviceHost, clear: bool) -> dict[str, Any]:
    """Return a row about a device; its cache is removed first if ``clear`` is set."""
    from compress.plugins.devices.connection import Connection
    from compress.plugins.devices.session import PACKAGES, busy_error, requirements
    from compress.utils.errors import CompressError

    name, device = host.name, host.device
    row = {"name": name, "address": f"{device.user}@{device.host}, port {device.port}"}
    try:
        with Connection(name, device, host.folder) as connection:
            if clear:
                freed = connection.request("clear")
                if freed["holder"]:
                    raise busy_error(name, freed["holder"])
                state = f"{freed['bytes'] / 1e6:.0f} MB of cache were removed"
                return {**row, "answers": True, "freed_bytes": freed["bytes"], "state": state}
            probe = connection.request("probe", blobs=[], requirements=requirements(PACKAGES))
    except CompressError as error:
        return {**row, "answers": False, "state": str(error)}
    holder = probe["holder"]
    state = f"taken by {holder['who']} since {holder['since']}" if holder else "free"
    ready = "has its environment" if probe["has_environment"] else "makes its environment at the first bench"
    what = f"{probe['platform']}, Python {probe['python']}, {probe['free_bytes'] / 1e9:.1f} GB free"
    shown = {key: probe[key] for key in ("platform", "python", "free_bytes", "has_environment", "holder")}
    return {**row, "answers": True, "state": f"{state}; {what}; {ready}", **shown}
