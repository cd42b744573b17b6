"""Model card, bill of materials, statement of provenance and signature of a run as files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compress.plugins.provenance.card import run_card
from compress.plugins.provenance.run_view import SBOM, RunView
from compress.plugins.provenance.sbom import run_sbom
from compress.plugins.provenance.signature import sign
from compress.plugins.provenance.slsa import SIGNED, STATEMENT, run_statement
from compress.report.run_folder import write_atomically
from compress.sources.resolve import CARD

if TYPE_CHECKING:
    from compress.pipeline.run import FinishedRun


def write_after_run(run: FinishedRun) -> None:
    """Write the files into the folder of a run that has just finished; see `PluginSpec.run_finished`."""
    write_provenance(RunView(run.recipe, run.report, run.lock, run.folder), run.folder)


def write_provenance(run: RunView, folder: Path, key: Path | None = None) -> list[str]:
    """Write the files of a run into ``folder``, each atomically, and sign the statement if there is an SSH key.

    An older signature is removed, since it would no longer fit.

    Returns:
        Names of the files.

    Raises:
        StorageError: The folder cannot be written to.
        InputError: The key or ssh-keygen cannot be used.
    """
    contents = {CARD: run_card(run), SBOM: run_sbom(run), STATEMENT: run_statement(run)}
    for name, content in contents.items():
        write_atomically(folder / name, content, "provenance file")
    (folder / SIGNED.signature).unlink(missing_ok=True)
    if key is None:
        return [*contents]
    sign(folder, key, SIGNED)
    return [*contents, SIGNED.signature]
