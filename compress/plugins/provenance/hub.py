"""Upload of a run to the Hugging Face Hub: exactly the listed files, and only on request."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from compress.pipeline.licences import refuse_forbidden
from compress.plugins.provenance.run_view import SBOM, RunView
from compress.plugins.provenance.slsa import SIGNED, STATEMENT
from compress.plugins.provenance.write import write_provenance
from compress.report.run_folder import MODEL, shipped_files
from compress.sources.resolve import CARD
from compress.utils.errors import InputError, StageError, first_line


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
    remarks = refuse_forbidden(run.licences, run.recipe)
    if not all((run.folder / name).is_file() for name in (CARD, SBOM, STATEMENT)):
        write_provenance(run, run.folder)
    files = {name.removeprefix(f"{MODEL}/"): run.folder / name for name in shipped_files(run.folder)}
    provenance_files = (CARD, SBOM, STATEMENT, SIGNED.signature)
    files |= {name: run.folder / name for name in provenance_files if (run.folder / name).is_file()}
    return Upload(repository, private, dict(sorted(files.items())), tuple(remarks))


def push(upload: Upload) -> str:
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
        api.create_repo(upload.repository, private=upload.private, exist_ok=True)
        done = api.create_commit(upload.repository, operations, commit_message=f"compress: {len(operations)} files")
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise StageError(
            f"The Hub does not take it: {first_line(error.__cause__ or error)}",
            where=upload.repository,
            hint="`hf auth whoami` says who you are there; `hf auth login` makes you somebody else",
        ) from None
    return str(done.commit_url)
