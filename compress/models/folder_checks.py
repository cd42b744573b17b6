"""Checks of a model folder before torch is loaded, and of its weights for NaN and infinity."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from compress.models.config_checks import TOKENIZER_FILES, is_timm
from compress.models.graph_inputs import GRAPH_INPUTS
from compress.models.json_file import read_json, read_optional_json, wrong_fields
from compress.models.pipeline_folder import image_generation_hook, is_pipeline, part_config, pipeline_weights
from compress.models.safetensors_file import read_header
from compress.models.stored_tensor import StoredTensor
from compress.utils.errors import ModelError
from compress.utils.paths import is_file, is_within

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

PROCESSOR_FILES = (
    *TOKENIZER_FILES,
    "preprocessor_config.json",
    "processor_config.json",
    "feature_extractor_config.json",
    GRAPH_INPUTS,
)
CHUNK_ELEMENTS = 1 << 22


def check_model_folder(folder: Path) -> None:
    """Check that ``folder`` is a complete Hugging Face model folder with safetensors and a matching processor.

    Only headers and JSON are read. Raises `ModelError`.
    """
    if not folder.is_dir():
        raise ModelError(
            "The model folder does not exist.",
            where=str(folder),
            expected="a folder in Hugging Face layout",
            hint="Check the path.",
        )
    try:
        if is_pipeline(folder):
            image_generation_hook("check_folder")(folder)
            check_processor(folder, dict(part_config(folder, "text_encoder")))
            return
        config = read_json(folder / "config.json")
        # Reading the headers detects truncated files.
        present = {tensor.name: file.name for file in weight_files(folder) for tensor in read_header(file)}
        if not (folder / WEIGHTS).is_file():
            mapping = _weight_map(folder)
            # Index and shards of different versions disagree about the location of tensors.
            wrong = [name for name, file in mapping.items() if present.get(name) != PurePosixPath(file).name]
            if wrong:
                raise ModelError(
                    f"{len(wrong)} of {len(mapping)} tensors are not where {INDEX} says, such as {wrong[0]!r}.",
                    where=str(folder / INDEX),
                    expected=f"{wrong[0]!r} in {mapping[wrong[0]]}",
                    hint="Fetch the model again; index and shards are of different versions.",
                )
        if not is_timm(config):  # how pictures are prepared is in the config
            check_processor(folder, config)
    except OSError as error:
        raise unreadable_model_error(error, folder) from error


def refuse_quantized(folder: Path) -> None:
    """Raise `ModelError` for a quantized checkpoint where float weights are needed for training or tracing."""
    quantization = read_json(folder / "config.json").get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise ModelError(
            f"The model is quantized already: its config.json has a quantization_config (quant_method: {method}).",
            where=str(folder),
            expected="weights in float, as they were before they were quantized",
            hint="start from the float model; quantizing twice only loses accuracy",
        )


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files with the model's weights: one file, or the shards that the index names.

    Raises `ModelError` if there are none, a shard is missing, or the index names a file outside the folder.
    """
    if is_pipeline(folder):
        return pipeline_weights(folder)
    if (folder / WEIGHTS).is_file():
        return (folder / WEIGHTS,)
    if (folder / INDEX).is_file():
        names = sorted(set(_weight_map(folder).values()))
        return tuple(_shard(folder, name) for name in names)
    # A pickle gets its own message with a conversion command; the Trainer's `training_args.bin` holds no weights.
    pickles = sorted(p for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES and p.name != "training_args.bin")
    if pickles:
        raise pickle_error(pickles[0])
    fault, hint = "holds no safetensors weights", "Name the folder that save_pretrained wrote."
    if (folder / "config.json").is_file():
        hint += " To train from random weights, write `random_weights: true` into the recipe."
    if (folder / "adapter_model.safetensors").is_file():
        fault = "holds an adapter, not a model"
        hint = "Merge it into its base model with peft's merge_and_unload, then save_pretrained."
    raise ModelError(f"The folder {fault}.", where=str(folder), expected=f"{WEIGHTS} or {INDEX}", hint=hint)


def check_weights_finite(folder: Path) -> None:
    """Read every tensor once, in chunks. Raises `ModelError` for the first one with NaN or infinity."""
    # Files are memory-mapped, so that at most one chunk is in memory.
    for tensor in (tensor for file in weight_files(folder) for tensor in read_header(file)):
        count = count_not_finite(tensor)
        if count:
            raise ModelError(
                f"{count} of {tensor.elements} values of the tensor {tensor.name!r} are NaN or infinite.",
                where=str(tensor.path),
                expected="finite weights",
                hint="Take another checkpoint: a training run that diverged leaves such weights.",
            )


def count_not_finite(tensor: StoredTensor) -> int:
    """Return the number of NaN and infinite values of a floating-point tensor; 0 for integers and sub-byte types."""
    if "float" not in tensor.dtype or not tensor.readable:
        return 0
    import numpy as np

    values = tensor.values().reshape(-1)
    pieces = range(0, values.size, CHUNK_ELEMENTS)
    return sum(int(np.count_nonzero(~np.isfinite(values[at : at + CHUNK_ELEMENTS]))) for at in pieces)


def unreadable_model_error(error: OSError, path: Path) -> ModelError:
    """Return the error for a file that the operating system refuses to read."""
    return ModelError(
        f"The model cannot be read: {error.strerror or error}.",
        where=str(error.filename or path),
        hint="Check the permissions of the file and that its disk is there.",
    )


def pickle_error(file: Path) -> ModelError:
    """Return the error for weights stored as a pickle, with a command that converts them."""
    folder = file.parent
    return ModelError(
        f"{file.name} is a pickle, which can run code when it is opened; it is refused.",
        where=str(file),
        expected="weights in safetensors",
        hint="convert them once, in a sandbox if you don't trust their origin: "
        'python -c "from transformers import AutoModelForSequenceClassification as A, AutoTokenizer as T; '
        f"A.from_pretrained('{folder}', use_safetensors=False).save_pretrained('{folder}-safetensors'); "
        f"T.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\" "
        "(with the Auto class of your task)",
    )


def _weight_map(folder: Path) -> dict[str, str]:
    mapping = read_json(folder / INDEX).get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(v, str) for v in mapping.values()):
        raise ModelError(
            f"{INDEX} has no usable weight_map.",
            where=str(folder / INDEX),
            expected="an object of tensor name -> file name",
            hint="Fetch or write the file again.",
        )
    return mapping


def _shard(folder: Path, name: str) -> Path:
    pure, path, root = PurePosixPath(name), folder / name, folder.resolve()
    # The index comes from a download and must not lead out of the folder, also after links are resolved. The Hub's
    # cache links files of `snapshots/` to `blobs/`.
    allowed = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    stays = any(is_within(path, parent) for parent in allowed)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or not stays:
        raise ModelError(
            f"{INDEX} names {name!r}, which lies outside the model folder.",
            where=str(folder / INDEX),
            expected="names of files in the same folder",
            hint="Put the shards into the model folder and name them without a path.",
        )
    if not is_file(path):
        raise ModelError(
            f"The shard {name!r} is missing.",
            where=str(folder),
            expected=f"every file that {INDEX} names",
            hint="Fetch the model again; its download stopped early.",
        )
    return path


def check_processor(folder: Path, config: dict[str, Any]) -> None:
    """Check that ``folder`` has a processor whose token ids fit the model of ``config``. Raises `ModelError`."""
    if is_pipeline(folder):
        folder = folder / "tokenizer"
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        raise ModelError(
            "The model folder has no tokenizer or other processor.",
            where=str(folder),
            expected="tokenizer.json, vocab.txt, tokenizer.model or preprocessor_config.json",
            hint="Copy the files of the tokenizer that the model was trained with into the folder.",
        )
    # Vision-language models nest the language model's config.
    with wrong_fields(folder / "config.json"):
        vocab_size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    rows = tokenizer_rows(folder)
    if isinstance(vocab_size, int) and rows is not None and rows > vocab_size:
        raise ModelError(
            f"The tokenizer does not match the model: its token ids need {rows} embedding rows, "
            f"the model has {vocab_size}.",
            where=str(folder),
            expected=f"a tokenizer with at most {vocab_size} tokens (vocab_size of config.json)",
            hint="Take the tokenizer that the model was trained with, or resize the model's embeddings.",
        )


def tokenizer_rows(folder: Path) -> int | None:
    """Return the number of embedding rows that the largest token id needs; None if the vocabulary is a binary file."""
    with wrong_fields(folder / "tokenizer.json"):
        return _tokenizer_rows(folder)


def _tokenizer_rows(folder: Path) -> int | None:
    path = folder / "tokenizer.json"
    if path.is_file():
        content = read_json(path)
        model = content.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if not isinstance(vocabulary, dict | list):
            raise ModelError("tokenizer.json has no vocabulary.", where=str(path), expected="model.vocab")
        # Unigram vocabularies are lists, others map tokens to ids.
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
        ids += [token.get("id") for token in content.get("added_tokens") or () if isinstance(token, dict)]
    else:
        ids = list(read_optional_json(folder / "added_tokens.json").values())
        if (folder / "vocab.json").is_file():
            ids += read_json(folder / "vocab.json").values()
        elif (folder / "vocab.txt").is_file():
            # WordPiece vocabularies have one token per line.
            with (folder / "vocab.txt").open("rb") as file:
                ids.append(sum(1 for _ in file) - 1)
        else:
            return None
    return max((value for value in ids if isinstance(value, int)), default=-1) + 1
