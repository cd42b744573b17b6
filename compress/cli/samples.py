"""Commands `compress samples`: list and fetch real models and data to try recipes with."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from compress import DISTRIBUTION

samples_app = typer.Typer(help="List samples and fetch them into the user's cache folder.")
SampleRow = dict[str, Any]
"""Fields of a sample in the list."""
_Json = Annotated[bool, typer.Option("--json", help="Write JSON to standard output.")]


@samples_app.callback(invoke_without_command=True)
def samples(context: typer.Context, json_: _Json = False) -> None:
    """List samples and fetch them into the user's cache folder."""
    if context.invoked_subcommand is None:
        _show(_described(), json_)


@samples_app.command("list", epilog="Example: compress samples list")
def list_samples(json_: _Json = False) -> None:
    """List all samples with description, licence, size and state."""
    _show(_described(), json_)


@samples_app.command("fetch", epilog="Example: compress samples fetch minilm")
def fetch_samples(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Samples, as listed by `samples`.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare fetched files with their SHA-256; repair damaged ones.")
    ] = False,
    json_: _Json = False,
) -> None:
    """Fetch samples that are not fetched yet."""
    from compress.data.samples.fetch import sample_directory
    from compress.data.samples.sample import find_sample
    from compress.report.progress import ConsoleProgress
    from compress.utils.progress import SilentProgress

    selected = [find_sample(name) for name in names]
    progress = SilentProgress() if json_ else ConsoleProgress()
    folders = {sample.name: str(sample_directory(sample.name, progress, verify=verify)) for sample in selected}
    if json_:
        typer.echo(json.dumps(folders, indent=2))
    else:
        for name, folder in folders.items():
            typer.echo(f"sample:{name}\t{folder}")


def _described() -> list[SampleRow]:
    from compress.data.samples.fetch import cached_directory
    from compress.data.samples.sample import known_samples

    described = []
    for sample in known_samples().values():
        folder = cached_directory(sample.name)
        described.append(
            {
                "name": sample.name,
                "kind": sample.kind,
                "description": sample.description,
                "licence": sample.licence,
                "package": sample.requirements,
                "download_bytes": sample.download_bytes,
                "folder": None if folder is None else str(folder),
            }
        )
    return described


def _show(described: list[SampleRow], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(described, indent=2))
        return
    if not described:
        typer.echo(f"No package of samples is installed: pip install --force-reinstall {DISTRIBUTION}", err=True)
    for sample in described:
        size = f"{sample['download_bytes'] / 1e6:.1f} MB"
        state = f"in {sample['folder']}" if sample["folder"] else "not fetched"
        typer.echo(f"sample:{sample['name']}  ({sample['kind']}, {size}, {state})")
        typer.echo(f"    {sample['description']}")
        typer.echo(f"    {sample['licence']}; from {sample['package']}")
