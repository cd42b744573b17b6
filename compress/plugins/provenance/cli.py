"""Commands `compress papers RUN` and `compress push-to-hub RUN REPOSITORY`, and the verification of provenance."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from compress.cli.verify import Verified, Verifier
from compress.utils.terminal import printable

Run = Annotated[Path, typer.Argument(help="A run's folder, or a recipe's name.")]


def write_run_provenance(
    run: Run,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder to write into; default: the run's.")
    ] = None,
    sign: Annotated[
        Path | None, typer.Option(metavar="KEY", help="Sign the provenance with this SSH key, through ssh-keygen.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Write licences and files as JSON.")] = False,
) -> None:
    """Write model card, bill of materials and provenance of a run, and list what its licences require."""
    from compress.plugins.provenance.run_view import read_run
    from compress.plugins.provenance.write import write_provenance

    view = read_run(run)
    folder = output or view.folder
    names = write_provenance(view, folder, sign)
    if json_:
        content = {
            "licence": view.licence,
            "licences": [record.model_dump() for record in view.licences],
            "remarks": view.licence_remarks,
            "files": {name: str(folder / name) for name in names},
        }
        typer.echo(json.dumps(content, indent=1))
        return
    typer.echo(f"{folder}: {', '.join(names)}")
    typer.echo(printable("\n".join([f"licence of the model: {view.licence}", *view.licence_remarks])))


def _has_statement(path: Path) -> bool:
    from compress.plugins.provenance.slsa import STATEMENT

    return (path / STATEMENT).is_file()


def _verify_provenance(folder: Path, signer: Path | None) -> Verified:
    from compress.plugins.provenance.slsa import verify_statement

    result = verify_statement(folder, signer)
    unsigned = "not signed: anyone could have rewritten the files"
    lines = (
        f"{result.recipe}: the {result.files} files of the model are as they were written; reports are not covered",
        f"signed by {result.signer}" if result.signer else unsigned,
    )
    return Verified(asdict(result), lines)


PROVENANCE = Verifier("a run's files with provenance.json", _has_statement, _verify_provenance)


def push_to_hub(
    run: Run,
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face Hub, or at HF_ENDPOINT.")],
    push: Annotated[bool, typer.Option("--push", help="Send the files; without this, only list them.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Write the files as JSON.")] = False,
) -> None:
    """List the files of a run for the Hugging Face Hub, with sizes and card; send them with --push."""
    from compress.plugins.provenance.run_view import read_run
    from compress.plugins.provenance.write import prepare_upload, push_upload
    from compress.results.formatting import format_bytes
    from compress.sources.resolve import CARD

    upload = prepare_upload(read_run(run), repository, private=not public)
    # Without --push, nothing is sent and the command shows the same list.
    address = push_upload(upload) if push else None
    sizes = {name: file.stat().st_size for name, file in upload.files.items()}
    if json_:
        content = {"repository": repository, "private": upload.private, "files": sizes, "remarks": upload.remarks}
        typer.echo(json.dumps({**content, "commit": address}, indent=1))
        return
    for name, size in sizes.items():
        typer.echo(printable(f"{format_bytes(size):>10}  {name}"))
    total = f"{len(sizes)} files, {format_bytes(upload.size_bytes)}"
    kind = "private" if upload.private else "public"
    for remark in upload.remarks:
        typer.echo(printable(remark))
    if address is not None:
        typer.echo(f"sent {total}: {address}")
        return
    # The card contains texts of the model and of its data.
    typer.echo(printable(f"\n{upload.files[CARD].read_text(encoding='utf-8')}"))
    typer.echo(f"nothing was sent; --push sends {total} to {repository}, which is {kind} if it is new")
