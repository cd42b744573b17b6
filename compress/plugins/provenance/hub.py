"""Sending a run to the Hugging Face Hub: exactly which files, and only when it is asked for."""

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
    """What would be sent: path in the repository -> file here."""

    repository: str
    private: bool
    files: dict[str, Path]
    remarks: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return sum(file.stat().st_size for file in self.files.values())


def prepare_upload(run: RunView, repository: str, private: bool) -> Upload:
    """The model's files at the top, as the Hub's libraries look for them, those of targets in folders, and the papers.

    Nothing is sent. Papers that the run has not yet are written. Raises `InputError` for a name that the Hub does not
    take, and for a model that may not be passed on.
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
    papers = (CARD, SBOM, STATEMENT, SIGNED.signature)
    files |= {name: run.folder / name for name in papers if (run.folder / name).is_file()}
    return Upload(repository, private, dict(sorted(files.items())), tuple(remarks))


def push(upload: Upload) -> str:
    """Make the repository where there is none, and send everything as one commit; the commit's address.

    The token is the one of `hf auth login` or HF_TOKEN, and is given to nobody but the Hub's library. Raises
    `StageError` where the Hub refuses.
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
