"""Conversion of a GGUF file to a Hugging Face folder in fp32."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.formats.gguf.model import read_gguf
from compress.sources.build_model import write_once
from compress.utils.errors import ModelError
from compress.utils.progress import Progress, SilentProgress
from compress.utils.storage import digest_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


_REVISION = 2
"""Increase it when the same file should be converted into another folder."""
_DIGIT_BY_DIGIT = {"smollm", "starcoder", "refact", "command-r", "codeshell"}
"""Values of `tokenizer.ggml.pre` for which llama.cpp splits single digits before splitting words."""
_TOLERANCE = 0.001
"""Share of weights that may be missing, such as buffers that only one of the formats stores."""


def convert_gguf(file: Path, cache: Path, progress: Progress | None = None) -> Path:
    """Return the folder below ``cache`` with the file's model and tokenizer, converted on the first call.

    The weights of a quantized file become fp32 with their dequantized values. Raises `ModelError`.
    """
    # The number of stored weights reveals missing tensors.
    stored = sum(math.prod(tensor.shape) for tensor in read_gguf(file).tensors)

    def write(output: Path) -> None:
        with _shown_by(progress or SilentProgress()), _parsed_once():
            _write(file, output, stored)

    hint = "Free some space or name another folder; fp32 takes 4 bytes a parameter."
    return write_once(converted_folder(file, cache), write, hint)


def converted_folder(file: Path, cache: Path) -> Path:
    """Return the path to which `convert_gguf` writes the model of ``file``, whether it exists or not."""
    return cache / f"gguf-{digest_file(file)[:32]}-{_REVISION}"


@contextlib.contextmanager
def _shown_by(progress: Progress) -> Iterator[None]:
    """Let ``progress`` show the conversion in place of transformers' own bar, which cannot be switched off."""
    from transformers import modeling_gguf_pytorch_utils as reader

    bar = reader.tqdm
    reader.tqdm = lambda tensors, desc: progress.track(tensors, "dequantizing tensors", len(tensors))
    try:
        yield
    finally:
        reader.tqdm = bar


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """Let transformers parse the file and list its tensor names once instead of several times.

    This halves the time.
    """
    import gguf

    library: Any = gguf
    reader, names = library.GGUFReader, library.get_tensor_name_map
    library.GGUFReader, library.get_tensor_name_map = functools.cache(reader), functools.cache(names)
    try:
        yield
    finally:
        library.GGUFReader, library.get_tensor_name_map = reader, names


def _write(file: Path, folder: Path, stored: int) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    location = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        # transformers reads config, weights and tokenizer from the GGUF file.
        config = AutoConfig.from_pretrained(**location)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        _check_complete(file, auto, config, stored)
        model = auto.from_pretrained(**location, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**location)
    except (ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(
            f"transformers cannot convert this GGUF file: {error}",
            where=str(file),
            expected="an architecture that transformers reads from GGUF, such as llama, qwen2 or t5",
            hint="Name the model's original Hugging Face checkpoint.",
        ) from error
    # transformers' conversion of the tokenizer ignores this setting.
    if read_gguf(file).metadata.get("tokenizer.ggml.pre") in _DIGIT_BY_DIGIT:
        # Restore, in place, the splitting of digits that transformers drops, which changes tokens before digits.
        from tokenizers.pre_tokenizers import Digits, Sequence

        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    folder.mkdir()
    _plain(auto, model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check_complete(file: Path, auto: Any, config: PretrainedConfig, stored: int) -> None:
    """Raise `ModelError` for a file with missing tensors, which transformers would replace by random numbers."""
    import torch

    # Count the parameters of the architecture without allocating them.
    with torch.device("meta"):
        needed = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if needed > stored * (1 + _TOLERANCE):
        raise ModelError(
            f"The GGUF file is not a whole model: it holds {stored} weights, its architecture has {needed}.",
            where=str(file),
            expected=f"a file with the metadata and all tensors of {config.model_type}",
            hint="Join split files first (llama-gguf-split --merge), or take another file.",
        )


def _plain(auto: Any, model: PreTrainedModel) -> Any:
    """Copy the weights to a fresh model, since save_pretrained refuses one that was loaded from GGUF."""
    import torch

    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = auto.from_config(config)
    # `assign` avoids a second copy of the weights.
    plain.load_state_dict(model.state_dict(), strict=True, assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain
