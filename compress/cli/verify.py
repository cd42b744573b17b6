"""Command `compress verify PATH`: checks what lies at a path. Plug-ins register what they can verify."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass(frozen=True)
class Verified:
    """Result of a verification. One that finds a fault without an error has ``sound=False``.

    Attributes:
        content: The result for `--json`.
        lines: The result for the console.
        sound: Whether everything is as it was written.
    """

    content: Mapping[str, object]
    lines: tuple[str, ...]
    sound: bool = True


@dataclass(frozen=True)
class Verifier:
    """Something that can be verified, which a plug-in registers as `PluginSpec.verifiers`.

    Attributes:
        subject: What it is, for messages.
        recognizes: Returns whether it lies at a path.
        verify: Verifies it, with the public key that must have signed it or None. Raises `BundleError` for a fault.
    """

    subject: str
    recognizes: Callable[[Path], bool]
    verify: Callable[[Path, Path | None], Verified]


def verify(
    path: Annotated[
        Path,
        typer.Argument(
            help="A bundle's folder or zip file, a run's folder or name, a copy of its files with provenance.json, "
            "or a registry's folder."
        ),
    ],
    signer: Annotated[
        Path | None,
        typer.Option(metavar="KEY.pub", help="The public key that must have signed it, or OpenSSH's allowed_signers."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Write the result as JSON.")] = False,
) -> None:
    """Find any changed, added or missing byte, check the signature, and run a bundle's self-test. Exit code 1: a fault.

    The command tells by what lies at the path which checks apply.
    """
    import json

    from compress.plugins import find_extensions, load_extension
    from compress.report.run_folder import LATEST, RUNS
    from compress.utils.errors import BundleError, InputError
    from compress.utils.terminal import printable

    # A run's name stands for its latest run.
    candidates = (path, path / LATEST) if path.exists() else (RUNS / path / LATEST,)
    extensions = find_extensions("verifiers").values()
    loaded = (load_extension(extension, lambda value: value) for extension in extensions)
    verifiers: list[Verifier] = [verifier for verifier in loaded if verifier is not None]
    match = next(
        ((verifier, place) for verifier in verifiers for place in candidates if verifier.recognizes(place)), None
    )
    if match is None:
        raise InputError(
            "There is nothing here that can be verified." if path.exists() else "There is no such file, folder or run.",
            where=str(path),
            expected=" or ".join(verifier.subject for verifier in verifiers),
        )
    verifier, place = match
    try:
        verified = verifier.verify(place, signer)
    except BundleError as error:
        error.exit_code = 1  # a fault, and not a wrong use of the command
        raise
    if json_:
        typer.echo(json.dumps(verified.content, indent=1))
    else:
        typer.echo(printable("\n".join(verified.lines)))
    if not verified.sound:
        raise typer.Exit(1)
