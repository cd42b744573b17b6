"""Command `compress bundle`, and the verification of bundles by `compress verify`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from compress.cli.verify import Verified, Verifier


def bundle(
    artifact: Annotated[Path, typer.Argument(help="A run's folder or name, or its model/ folder.")],
    target: Annotated[str, typer.Option(help="browser, android, ios, linux-arm64 or desktop.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; FOLDER.zip is written next to it.")],
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe that names the task; default: the recipe.yaml beside the model.")
    ] = None,
    sample: Annotated[
        list[str] | None,
        typer.Option(
            help="Text, or path of an image or recording, for the self-test and the page instead of built-in "
            "examples; repeatable."
        ),
    ] = None,
    licence: Annotated[str | None, typer.Option(help="The model's licence, e.g. apache-2.0.")] = None,
    sign: Annotated[
        Path | None, typer.Option(metavar="KEY", help="Sign with this SSH key, through ssh-keygen.")
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Fail if the download is larger: the zip file, or for browser the requests of the page with brotli.",
        ),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Write the manifest as JSON.")] = False,
) -> None:
    """Bundle a model with all that an app needs: manifest, self-test, card, examples; for browsers a page."""
    from compress.formats.targets import find_app_profile
    from compress.pipeline.artifact import find_artifact, written_for
    from compress.report.progress import ConsoleProgress
    from compress.report.run_folder import RECIPE

    profile = find_app_profile(target)
    located = find_artifact(artifact, recipe)
    from compress.formats.quiet_output import quiet_libraries
    from compress.plugins.apps.build import BundleRequest, build

    quiet_libraries()
    source = recipe or located.recipe_folder / RECIPE
    request = BundleRequest(
        written_for(located, profile), located.recipe, source, profile, tuple(sample or ()), licence, sign, max_bytes
    )
    result = build(request, output, ConsoleProgress())
    if json_:
        typer.echo(result.manifest.sealed().decode(), nl=False)
        return
    size = sum(record.size_bytes for record in result.manifest.files.values())
    typer.echo(f"{result.folder}: {len(result.manifest.files)} files and their manifest, {size / 1e6:.2f} MB")
    typer.echo(f"{result.archive}: {result.archive.stat().st_size / 1e6:.2f} MB")
    if profile.version is not None:
        typer.echo(f"look at it: python3 -m http.server --directory {result.folder}")


def _is_bundle(path: Path) -> bool:
    from compress.plugins.apps.manifest import MANIFEST

    return path.suffix == ".zip" or (path / MANIFEST).is_file()


def _verify_bundle(path: Path, signer: Path | None) -> Verified:
    from compress.plugins.apps.verify import verify

    result = verify(path, signer)
    size = f"{result.size_bytes / 1e6:.2f} MB"
    prepared = f"self-test: {result.cases} {result.of} are prepared as they should be"
    lines = [f"{result.name} for {result.target}: {result.files} files as they were written, {size}"]
    if result.worst is None:
        lines.append(f"{prepared}; their {result.compared} could not be compared: {result.unanswered}")
    else:
        lines.append(f"{prepared}, {result.compared} within {result.worst:.1%} of the tolerance")
    if result.unread is not None:
        lines.append(f"the manifest could not be compared with the model: {result.unread}")
    unsigned = "not signed: whoever changed it could have sealed it anew"
    lines.append(f"signed by {result.signer}" if result.signer else unsigned)
    return Verified(asdict(result), tuple(lines))


BUNDLE = Verifier("a bundle's folder or zip file", _is_bundle, _verify_bundle)
