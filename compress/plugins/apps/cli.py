"""`compress bundle ARTIFACT`: what an app needs; `compress bundle-verify`: is it whole, and does it answer?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def bundle(
    artifact: Annotated[Path, typer.Argument(help="A run's folder or its model/ folder, or a recipe's name.")],
    target: Annotated[str, typer.Option(help="browser, android, ios, linux-arm64 or desktop.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; FOLDER.zip is written beside.")],
    recipe: Annotated[
        Path | None, typer.Option(help="Where the task comes from; default: the recipe.yaml beside the model.")
    ] = None,
    sample: Annotated[
        list[str] | None,
        typer.Option(
            help="A text, or the path of a picture or recording, for the self-test and the page, in place of built-in "
            "ones; repeatable."
        ),
    ] = None,
    licence: Annotated[str | None, typer.Option(help="The model's licence, e.g. apache-2.0.")] = None,
    sign: Annotated[
        Path | None, typer.Option(metavar="KEY", help="Sign with this SSH key, through ssh-keygen.")
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Fail if more is transferred: the zip, or for browser what the page asks for, in brotli."
        ),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Write the manifest as JSON.")] = False,
) -> None:
    """Bundle a model with all that an app needs: manifest, self-test, card, examples; for browsers a page."""
    from compress.cli.artifact import find_artifact, written_for
    from compress.cli.output import ConsoleProgress
    from compress.formats.targets import find_app_profile
    from compress.report.run_folder import RECIPE

    profile = find_app_profile(target)
    found = find_artifact(artifact, recipe)
    from compress.formats.quiet_output import quiet_libraries
    from compress.plugins.apps.build import Wanted, build

    quiet_libraries()
    source = recipe or found.recipe_folder / RECIPE
    wanted = Wanted(
        written_for(found, profile), found.recipe, source, profile, tuple(sample or ()), licence, sign, max_bytes
    )
    done = build(wanted, output, ConsoleProgress())
    if json_:
        typer.echo(done.manifest.sealed().decode(), nl=False)
        return
    size = sum(record.size_bytes for record in done.manifest.files.values())
    typer.echo(f"{done.folder}: {len(done.manifest.files)} files, {size / 1e6:.2f} MB")
    typer.echo(f"{done.archive}: {done.archive.stat().st_size / 1e6:.2f} MB")
    if profile.version is not None:
        typer.echo(f"look at it: python3 -m http.server --directory {done.folder}")


def bundle_verify(
    path: Annotated[Path, typer.Argument(metavar="FOLDER|ZIP", help="What `compress bundle` wrote.")],
    signer: Annotated[
        Path | None, typer.Option(metavar="KEY.pub", help="The public key that must have signed it.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Write what was proven as JSON.")] = False,
) -> None:
    """Find any changed, added or missing byte of a bundle, compare the manifest with the model, run the self-test."""
    from compress.plugins.apps.verify import verify

    done = verify(path, signer)
    if json_:
        typer.echo(json.dumps(asdict(done), indent=1))
        return
    typer.echo(
        f"{done.name} for {done.target}: {done.files} files as they were written, {done.size_bytes / 1e6:.2f} MB"
    )
    prepared = f"self-test: {done.cases} {done.of} are prepared as they should be"
    if done.worst is None:
        typer.echo(f"{prepared}; their {done.compared} could not be compared: {done.unanswered}")
    else:
        typer.echo(f"{prepared}, {done.compared} within {done.worst:.1%} of the tolerance")
    if done.unread is not None:
        typer.echo(f"the manifest could not be compared with the model: {done.unread}")
    typer.echo(
        f"signed by {done.signer}" if done.signer else "not signed: whoever changed it could have sealed it anew"
    )
