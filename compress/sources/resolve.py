"""Resolution of model references: a local folder, a GGUF or ONNX file, `sample:NAME` or a Hugging Face id."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from compress.data.source import find
from compress.models.config_checks import check_config
from compress.models.folder_checks import PICKLE_SUFFIXES, check_model_folder, pickle_error
from compress.models.json_file import read_json
from compress.models.pipeline_folder import SafetyChecker, image_generation_hook, is_pipeline
from compress.sources.onnx_file import convert_onnx, onnx_file, ready_folder
from compress.sources.timm_folder import convert_timm, is_timm_folder
from compress.sources.timm_folder import made_folder as made_timm
from compress.tasks.task import Task
from compress.utils.environment import user_cache
from compress.utils.errors import InputError, ModelError
from compress.utils.isolation import network_hint
from compress.utils.paths import exists, expanded
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
    checker: SafetyChecker | None = None,
) -> Path:
    """Return a checked local folder in Hugging Face layout for a model reference.

    - A GGUF file is converted once into ``cache``.
    - An ONNX file, or a folder with one in place of weights, becomes a folder in the layout of the `onnx` stage.
    - A timm folder becomes one whose config names timm's builder function.
    - A diffusers folder is reduced to its model parts.

    Args:
        reference: Local path, `sample:NAME`, or a Hugging Face id with an optional `@revision`.
        trust_remote_code: Download the repository's Python files too, and allow them.
        cache: Folder for converted models.
        progress: Receiver of messages.
        arrays: The task takes plain arrays, which requires an ONNX graph.
        checker: Whether to keep a diffusers pipeline's safety checker.

    Raises:
        ModelError: If the model cannot be found or used.
        SampleError: If a sample cannot be fetched.
    """
    # Local paths and samples come first, so that a folder is never mistaken for a repository.
    path = _local(reference, progress or SilentProgress())
    if path is None:
        path = _download(reference, local_only=False, python_files=trust_remote_code)
    # ONNX graphs are handled before checkpoints, since a task of plain arrays accepts nothing else.
    graph = onnx_file(path)
    if graph is not None:
        return convert_onnx(graph, cache, arrays, progress)
    if arrays:
        raise ModelError(
            f"{path.name} is no ONNX graph, which the recipe's task is for.",
            where=str(path),
            expected="an .onnx file, or a folder with one",
            hint="name the task of the model",
        )
    # A single file that is no graph must be GGUF.
    if path.is_file():
        if path.suffix.lower() in PICKLE_SUFFIXES:
            raise pickle_error(path)
        if path.suffix.lower() != ".gguf":
            raise ModelError(
                f"{path.name} is not something a recipe can start from.",
                where=str(path),
                expected="a model folder, a GGUF or ONNX file, sample:NAME or a Hugging Face id",
                hint="Name the folder that holds config.json, the weights and the tokenizer.",
            )
        path = _converted(path, cache, progress or SilentProgress())
    # A Hub repository may hold GGUF files without a config.
    elif not (path / "config.json").is_file() and (only := _only_gguf(path)):
        path = _converted(only, cache, progress or SilentProgress())
    if is_pipeline(path):
        converted: Path = image_generation_hook("convert_folder")(path, cache, checker, progress)
        return converted
    if is_timm_folder(path):
        path = convert_timm(path, cache, progress)
    # Fail early with a clear message instead of an exception from transformers.
    check_config(path, trust_remote_code)
    check_model_folder(path)
    return path


def find_model(reference: str, progress: Progress | None = None) -> Path:
    """Return the file or folder of a reference without downloading from the Hub. Raises `ModelError`."""
    path = _local(reference, progress or SilentProgress())
    return path if path is not None else _download(reference, local_only=True, python_files=False)


def is_graph(reference: str, folder: Path) -> bool:
    """Return True if the model that a recipe in ``folder`` names is an ONNX graph, without fetching anything.

    Raises `ModelError` for a folder with an ambiguous choice of graphs.
    """
    path = local_model_path(reference, folder)
    return reference.lower().endswith(".onnx") if path is None else onnx_file(path) is not None


def local_model_path(reference: str, folder: Path) -> Path | None:
    """Return the local file or folder that a recipe in ``folder`` names as its model; None for one on the Hub."""
    if not reference.startswith("sample:"):
        return find(reference, folder)
    from compress.data.samples.fetch import cached_directory

    return cached_directory(reference.removeprefix("sample:"))


def find_resolved(
    reference: str, cache: Path = DEFAULT_CACHE, arrays: bool = False, checker: SafetyChecker | None = None
) -> Path | None:
    """Return the folder that `resolve_model` would return if nothing has to be fetched or converted first, else None.

    timm and diffusers folders that are not converted yet are returned unconverted, since their conversion is cheap.

    Args:
        reference: Reference of the model.
        cache: Folder for converted models.
        arrays: The task takes plain arrays.
        checker: Whether to keep a diffusers pipeline's safety checker.
    """
    if reference.startswith("sample:"):
        path = local_model_path(reference, Path())
    else:
        # The Hub's cache is searched without network access.
        try:
            path = find_model(reference)
        except ModelError:
            return None
    # The folder of a converted graph is named after the digest of its files.
    if path is not None and (graph := onnx_file(path)) is not None:
        ready = ready_folder(graph, cache, arrays)
        return ready if ready.is_dir() else None
    if path is not None and (is_pipeline(path) or is_timm_folder(path)):
        try:
            hook = image_generation_hook("converted_folder") if is_pipeline(path) else None
            converted_path = made_timm(path, cache) if hook is None else hook(path, cache, checker)
        except ModelError:  # told by whoever needs more of it than its config
            return path
        return converted_path if converted_path.is_dir() else path
    if path is None or (path / "config.json").is_file():
        return path
    # What remains is a GGUF file or a folder with one.
    file = path if path.is_file() else _only_gguf(path)
    if file is None or file.suffix.lower() != ".gguf":
        return None
    from compress.sources.conversions import converted_folder

    converted = converted_folder(file, cache)
    return converted if converted.is_dir() else None


def local_task_variants(task: Task, reference: str, recipe_folder: Path) -> tuple[Task, ...]:
    """Return the variant of ``task`` that fits a recipe's model; all variants if the model is not available locally."""
    if len(task.variants()) == 1:
        return task.variants()
    try:
        folder = find_resolved(str(find(reference, recipe_folder) or reference))
        return task.variants() if folder is None else (task.specialize(read_json(folder / "config.json")),)
    except (InputError, OSError):  # told by whoever needs the model
        return task.variants()


def _local(reference: str, progress: Progress) -> Path | None:
    """Return the path of a local reference or a sample; None for a possible Hugging Face id."""
    if reference.startswith("sample:"):
        from compress.data.samples.fetch import sample_directory

        return Path(sample_directory(reference.removeprefix("sample:"), progress))
    path = expanded(reference)
    if exists(path):
        return path
    # A name with a model file's suffix is a missing file, not a Hugging Face id.
    if not _HUB_ID.match(reference) or path.suffix.lower() in (".gguf", ".onnx", ".safetensors", *PICKLE_SUFFIXES):
        raise ModelError(
            f"There is no model {reference!r}.",
            where=reference,
            expected="a local folder, a GGUF or ONNX file, sample:NAME or a Hugging Face id such as org/name",
            hint="Check the path; `compress samples` lists the samples.",
        )
    return None


def _converted(file: Path, cache: Path, progress: Progress) -> Path:
    from compress.sources.conversions import convert_gguf

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
        # Only safetensors and small text files are fetched, never pickles; code only on request.
        folder = snapshot_download(
            match["name"],
            revision=match["revision"],
            allow_patterns=[*_WANTED, "*.py"] if python_files else _WANTED,
            ignore_patterns=_UNWANTED,
            local_files_only=local_only,
        )
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        why = "no copy is here" if local_only else "the Hugging Face Hub can't be reached and no copy is here"
        raise ModelError(
            f"The model {reference!r} is not a path here, and {why}.",
            where=reference,
            expected="a local folder, or a Hugging Face id that was downloaded before",
            hint=(None if local_only else network_hint())
            or f"Where there is a network, run `hf download {reference.partition('@')[0]}` "
            "and copy the folder here; unset HF_HUB_OFFLINE if it is set.",
        ) from error
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        # A gated repository is also one that was not found, so it comes first.
        reasons = {
            HFValidationError: "it is neither a path here nor a valid Hugging Face id",
            GatedRepoError: "its owner asks for consent: accept it there, then `hf auth login`",
            RepositoryNotFoundError: "neither a path here nor a public repository has that name",
            RevisionNotFoundError: f"it has no revision {match['revision']!r}",
        }
        reason = next((text for kind, text in reasons.items() if isinstance(error, kind)), None)
        raise ModelError(
            f"The model {reference!r} is not available: {reason or f'the download failed ({error})'}.",
            where=reference,
            expected="a local folder, a GGUF file, sample:NAME or a Hugging Face id such as org/name",
            hint="Check the name, or download the model elsewhere and name its folder.",
        ) from error
    return Path(folder)


def hub_card(reference: str, kind: Literal["model", "dataset"], fetch: bool) -> Path | None:
    """Return the folder with the README.md of a Hugging Face id, stored apart from the digested files, or None.

    Without ``fetch`` only an earlier download counts. None also if the Hub cannot be reached.
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
        # The card is optional, so a failed download is no error.
        hf_hub_download(match["name"], CARD, repo_type=kind, revision=match["revision"], local_dir=folder)
    except (HfHubHTTPError, HFValidationError, OSError):
        return None
    return folder
