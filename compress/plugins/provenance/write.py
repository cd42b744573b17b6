"""Provenance of a run as files: model card, bill of materials, statement and signature; their upload to the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from compress.pipeline.licences import refuse_forbidden
from compress.plugins.provenance.card import run_card
from compress.plugins.provenance.run_view import SBOM, RunView
from compress.plugins.provenance.sbom import run_sbom
from compress.plugins.provenance.slsa import SIGNED, STATEMENT, run_statement
from compress.report.run_folder import MODEL, shipped_files, write_atomically
from compress.sources.resolve import CARD
from compress.utils.errors import InputError, StageError, first_line
from compress.utils.ssh_signatures import sign_file

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
    # A signature of an older statement does not fit the new one.
    (folder / SIGNED.signature).unlink(missing_ok=True)
    if key is None:
        return [*contents]
    sign_file(folder, key, SIGNED)
    return [*contents, SIGNED.signature]


@dataclass(frozen=True)
class Upload:
    """Files to send, by their paths in the repository."""

    repository: str
    private: bool
    files: dict[str, Path]
    remarks: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """Return the size of all files together."""
        return sum(file.stat().st_size for file in self.files.values())


def prepare_upload(run: RunView, repository: str, private: bool) -> Upload:
    """List the files of a run as they would lie on the Hub. Nothing is sent.

    The model's files lie at the top, where the Hub's libraries look for them, those of targets in folders. Model card,
    bill of materials and provenance are written if the run lacks them.

    Raises:
        InputError: The Hub does not accept the name, or a licence forbids to pass the model on.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(
            f"The Hub has no repository of that name: {first_line(error)}", where=repository, expected="OWNER/NAME"
        ) from None
    # Check the licences before anything is written or sent.
    refuse_forbidden(run.licences, run.recipe)
    if not all((run.folder / name).is_file() for name in (CARD, SBOM, STATEMENT)):
        write_provenance(run, run.folder)
    files = {name.removeprefix(f"{MODEL}/"): run.folder / name for name in shipped_files(run.folder)}
    provenance_files = (CARD, SBOM, STATEMENT, SIGNED.signature)
    # A signature exists only if the run was signed.
    files |= {name: run.folder / name for name in provenance_files if (run.folder / name).is_file()}
    return Upload(repository, private, dict(sorted(files.items())), tuple(run.licence_remarks))


def push_upload(upload: Upload) -> str:
    """Create the repository if it does not exist, and send all files as one commit.

    The token is that of `hf auth login` or HF_TOKEN. Only the Hub's library receives it.

    Returns:
        The address of the commit.

    Raises:
        StageError: The Hub refuses.
    """
    api = HfApi()
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in upload.files.items()]
    try:
        # One commit contains all files, so that the repository never holds a partial model.
        api.create_repo(upload.repository, private=upload.private, exist_ok=True)
        commit = api.create_commit(upload.repository, operations, commit_message=f"compress: {len(operations)} files")
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise StageError(
            f"The Hub refuses the upload: {first_line(error.__cause__ or error)}",
            where=upload.repository,
            hint="`hf auth whoami` names your account; `hf auth login` changes it",
        ) from None
    return str(commit.commit_url)
