"""Where a model comes from: a local folder, a GGUF or ONNX file, `sample:NAME` or a Hugging Face id."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from compress.data.source import find
from compress.models.config_checks import check_config
from compress.models.diffusion_checks import is_pipeline
from compress.models.folder_checks import PICKLE_SUFFIXES, check_model_folder, pickle_refusal
from compress.models.json_file import read_json
from compress.sources.diffusers_folder import Checker, convert_pipeline
from compress.sources.diffusers_folder import made_folder as made_pipeline
from compress.sources.onnx_file import convert_onnx, onnx_file, ready_folder
from compress.sources.timm_folder import convert_timm, timm_folder
from compress.sources.timm_folder import made_folder as made_timm
from compress.tasks.task import Task
from compress.utils.environment import user_cache
from compress.utils.errors import InputError, ModelError
from compress.utils.progress import Progress, SilentProgress

CARD = "README.md"
DEFAULT_CACHE = Path("artifacts/cache/models")
_HUB_ID = re.compile(r"^(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(@(?P<revision>[\w./-]+))?$")
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_UNWANTED = ["original/*", "consolidated*", "*.fp16.safetensors", "onnx/*", "openvino/*"]


def resolve_model(
    reference: str,
    *,
    trust_remote_code: bool = False,
    cache: Path = DEFAULT_CACHE,
    progress: Progress | None = None,
    arrays: bool = False,
    checker: Checker | None = None,
) -> Path:
    """A local folder in Hugging Face layout with safetensors weights, config and processor files, checked.

    ``reference``: a local folder, a GGUF file (converted once into ``cache``), `sample:NAME`, or a Hugging
    Face id with an optional `@revision`. Its Python files are fetched only with ``trust_remote_code``.
    Of an ONNX file, or a folder with one in place of weights, it is the folder that `export` would have written; with
    ``arrays`` one that takes plain arrays; of timm's folder it is one that says how its network is made; of diffusers'
    one of its parts alone, with the safety checker if ``checker`` says so. Raises `ModelError` or `SampleError`.
    """
    found = _local(reference, progress or SilentProgress())
    if found is None:
        found = _download(reference, local_only=False, python_files=trust_remote_code)
    graph = onnx_file(found)
    if graph is not None:
        return convert_onnx(graph, cache, arrays, progress)
    if arrays:
        raise _no_graph(found)
    if found.is_file():
        if found.suffix.lower() != ".gguf":
            raise _not_a_model(found)
        found = _converted(found, cache, progress or SilentProgress())
    elif not (found / "config.json").is_file() and (only := _only_gguf(found)):
        found = _converted(only, cache, progress or SilentProgress())
    if is_pipeline(found):
        return convert_pipeline(found, cache, checker, progress)
    if timm_folder(found):
        found = convert_timm(found, cache, progress)
    check_config(found, trust_remote_code)
    check_model_folder(found)
    return found


def find_model(reference: str, progress: Progress | None = None) -> Path:
    """The file or folder that a reference names, without any download from the Hub. Raises `ModelError`."""
    found = _local(reference, progress or SilentProgress())
    return found if found is not None else _download(reference, local_only=True, python_files=False)


def is_graph(reference: str, folder: Path) -> bool:
    """Whether a model that a recipe in ``folder`` names is an ONNX graph, told without fetching anything.

    Raises `ModelError` for a folder that doesn't say which of its graphs is meant.
    """
    found = graph_place(reference, folder)
    return reference.lower().endswith(".onnx") if found is None else onnx_file(found) is not None


def graph_place(reference: str, folder: Path) -> Path | None:
    """The file or folder here that a recipe in ``folder`` names as its model; None for one of the Hub."""
    if not reference.startswith("sample:"):
        return find(reference, folder)
    from compress.data.samples.fetch import cached_directory

    return cached_directory(reference.removeprefix("sample:"))


def already_here(
    reference: str, cache: Path = DEFAULT_CACHE, arrays: bool = False, checker: Checker | None = None
) -> Path | None:
    """The folder that `resolve_model` gives, if nothing has to be fetched or converted for it first.

    Of timm's folder and diffusers' it is that one itself until it was made ready, which takes no work to speak of.
    """
    if reference.startswith("sample:"):
        from compress.data.samples.fetch import cached_directory

        found = cached_directory(reference.removeprefix("sample:"))
    else:
        try:
            found = find_model(reference)
        except ModelError:
            return None
    if found is not None and (graph := onnx_file(found)) is not None:
        ready = ready_folder(graph, cache, arrays)
        return ready if ready.is_dir() else None
    if found is not None and (is_pipeline(found) or timm_folder(found)):
        try:
            made = made_pipeline(found, cache, checker) if is_pipeline(found) else made_timm(found, cache)
        except ModelError:  # told by whoever needs more of it than its config
            return found
        return made if made.is_dir() else found
    if found is None or (found / "config.json").is_file():
        return found
    file = found if found.is_file() else _only_gguf(found)
    if file is None or file.suffix.lower() != ".gguf":
        return None
    from compress.sources.gguf_conversion import converted_folder

    converted = converted_folder(file, cache)
    return converted if converted.is_dir() else None


def kinds_here(task: Task, reference: str, recipe_folder: Path) -> tuple[Task, ...]:
    """The kind of ``task`` that a recipe's model is for, alone; every kind, where it is not here to tell."""
    if len(task.kinds()) == 1:
        return task.kinds()
    try:
        folder = already_here(str(find(reference, recipe_folder) or reference))
        return task.kinds() if folder is None else (task.of(read_json(folder / "config.json")),)
    except (InputError, OSError):  # told by whoever needs the model
        return task.kinds()


def _local(reference: str, progress: Progress) -> Path | None:
    """The path of a local reference or a sample; None for what can only be a Hugging Face id."""
    if reference.startswith("sample:"):
        from compress.data.samples.fetch import sample_directory

        return Path(sample_directory(reference.removeprefix("sample:"), progress))
    path = Path(reference).expanduser()
    if path.exists():
        return path
    if not _HUB_ID.match(reference) or path.suffix.lower() in (
        ".gguf",
        ".onnx",
        ".safetensors",
        *PICKLE_SUFFIXES,
    ):
        raise ModelError(
            f"There is no model {reference!r}.",
            where=reference,
            expected="a local folder, a GGUF or ONNX file, sample:NAME or a Hugging Face id such as org/name",
            hint="Check the path; `compress samples` lists the samples.",
        )
    return None


def _converted(file: Path, cache: Path, progress: Progress) -> Path:
    from compress.sources.gguf_conversion import convert_gguf

    progress.note(f"converting {file.name} to safetensors in {cache}")
    return convert_gguf(file, cache, progress)


def _only_gguf(folder: Path) -> Path | None:
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise ModelError(
            f"The folder holds {len(files)} GGUF files and no config.json.",
            where=str(folder),
            expected="one model",
            hint=f"Name one of the files: {', '.join(file.name for file in files[:5])}.",
        )
    return files[0] if files else None


def _not_a_model(file: Path) -> ModelError:
    if file.suffix.lower() in PICKLE_SUFFIXES:
        return pickle_refusal(file)
    return ModelError(
        f"{file.name} is not something a recipe can start from.",
        where=str(file),
        expected="a model folder, a GGUF or ONNX file, sample:NAME or a Hugging Face id",
        hint="Name the folder that holds config.json, the weights and the tokenizer.",
    )


def _no_graph(place: Path) -> ModelError:
    return ModelError(
        f"{place.name} is no ONNX graph, which the recipe's task is for.",
        where=str(place),
        expected="an .onnx file, or a folder with one",
        hint="name the task of the model",
    )


def _download(reference: str, *, local_only: bool, python_files: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    match = _HUB_ID.match(reference)
    assert match is not None, "_local lets only Hugging Face ids through"
    try:
        folder = snapshot_download(
            match["name"],
            revision=match["revision"],
            allow_patterns=[*_WANTED, "*.py"] if python_files else _WANTED,
            ignore_patterns=_UNWANTED,
            local_files_only=local_only,
        )
    except HFValidationError as error:
        raise _unavailable(reference, "it is neither a path here nor a valid Hugging Face id") from error
    except GatedRepoError as error:
        raise _unavailable(reference, "its owner asks for consent: accept it there, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise _unavailable(reference, "neither a path here nor a public repository has that name") from error
    except RevisionNotFoundError as error:
        raise _unavailable(reference, f"it has no revision {match['revision']!r}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise _offline(reference, local_only) from error
    except (HfHubHTTPError, OSError) as error:
        raise _unavailable(reference, f"the download failed ({error})") from error
    return Path(folder)


def hub_card(reference: str, kind: Literal["model", "dataset"], fetch: bool) -> Path | None:
    """The card of a Hugging Face id, kept apart from the files that digests are of; None where there is none.

    Without ``fetch`` it is one that an earlier call fetched. None too where the Hub can't be reached.
    """
    match = _HUB_ID.match(reference)
    if match is None:
        return None
    folder = user_cache() / "cards" / kind / re.sub(r"[^\w.-]", "--", reference)
    if not fetch:
        return folder if (folder / CARD).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        hf_hub_download(match["name"], CARD, repo_type=kind, revision=match["revision"], local_dir=folder)
    except (HfHubHTTPError, HFValidationError, OSError):
        return None
    return folder


def _unavailable(reference: str, reason: str) -> ModelError:
    return ModelError(
        f"The model {reference!r} cannot be had: {reason}.",
        where=reference,
        expected="a local folder, a GGUF file, sample:NAME or a Hugging Face id such as org/name",
        hint="Check the name, or download the model elsewhere and name its folder.",
    )


def _offline(reference: str, local_only: bool) -> ModelError:
    why = "no copy is here" if local_only else "the Hugging Face Hub can't be reached and no copy is here"
    return ModelError(
        f"The model {reference!r} is not a path here, and {why}.",
        where=reference,
        expected="a local folder, or a Hugging Face id that was downloaded before",
        hint=f"Where there is a network, run `hf download {reference.partition('@')[0]}` "
        "and copy the folder here; unset HF_HUB_OFFLINE if it is set.",
    )
