"""Sampling settings of a pipeline's folder: steps, guidance, prompts and scheduler. Importing this imports no torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.models.json_file import read_json
from compress.models.pipeline_folder import UNET, part_config
from compress.utils.errors import MissingExtraError, ModelError, first_line

if TYPE_CHECKING:
    import numpy as np
    from diffusers import SchedulerMixin
    from transformers import PreTrainedTokenizerBase

TOKENIZER, SCHEDULER = "tokenizer", "scheduler"
"""Names of their folders in diffusers' layout."""
SAMPLING = "sampling_config.json"
"""File beside model_index.json with the arguments of a diffusers call that the model was made for."""
_TORCHAO = "torchao"
_STEPS, _GUIDANCE = "num_inference_steps", "guidance_scale"


@dataclass(frozen=True)
class Sampling:
    """Number of scheduler ``steps``, and ``guidance``: diffusers' guidance_scale, with 1 or less for none.

    The defaults are those of diffusers' StableDiffusionPipeline.
    """

    steps: int = 50
    guidance: float = 7.5

    @classmethod
    def read(cls, folder: Path) -> Sampling:
        """Read the settings in ``folder``, or return diffusers' defaults. Raises `ModelError`."""
        if not (folder / SAMPLING).is_file():
            return cls()
        config = read_json(folder / SAMPLING)
        steps, guidance = config.get(_STEPS, cls.steps), config.get(_GUIDANCE, cls.guidance)
        if type(steps) is not int or steps < 1 or not isinstance(guidance, int | float):
            raise ModelError(
                f"{SAMPLING} gives {steps!r} steps and the guidance {guidance!r}.",
                where=str(folder / SAMPLING),
                expected=f"{_STEPS} of 1 or more, and a number as {_GUIDANCE}",
            )
        return cls(steps, float(guidance))

    def as_json(self) -> bytes:
        """Return the content of the file that `read` reads."""
        return json.dumps({_STEPS: self.steps, _GUIDANCE: self.guidance}).encode()


@dataclass(frozen=True)
class PromptProcessor:
    """Tokenizer of prompts, and the shapes [channels, height, width] of the initial noise and of the image."""

    tokenizer: PreTrainedTokenizerBase
    noise_shape: tuple[int, int, int]
    image_shape: tuple[int, int, int]

    @property
    def length(self) -> int:
        """Number of tokens that every prompt is padded to."""
        return int(self.tokenizer.model_max_length)

    def ids(self, prompts: Sequence[str]) -> np.ndarray:
        """Return token ids [prompts, length] int64, padded and truncated as diffusers does."""
        import numpy as np

        encoded = self.tokenizer(list(prompts), padding="max_length", max_length=self.length, truncation=True)
        return np.array(encoded["input_ids"], dtype=np.int64)

    def sizes(self, prompts: Sequence[str]) -> np.ndarray:
        """Return the number of tokens of each prompt, without padding and truncation."""
        import numpy as np

        encoded = self.tokenizer(list(prompts), padding=False, truncation=False, verbose=False)["input_ids"]
        return np.array([len(ids) for ids in encoded], dtype=np.int64)

    def truncated(self, prompts: Sequence[str]) -> list[int]:
        """Return the indices of the prompts that `ids` truncates."""
        return [index for index, size in enumerate(self.sizes(prompts)) if size > self.length]

    def noise(self, seed: int) -> np.ndarray:
        """Return the initial noise of a seed, float32 from torch's generator, as diffusers samples it."""
        import numpy as np
        import torch

        return np.asarray(torch.randn(self.noise_shape, generator=torch.Generator().manual_seed(seed)).numpy())


def vae_config(folder: Path) -> Mapping[str, Any]:
    """Return the config of the VAE, which is that of its decoder in a folder of ONNX graphs."""
    return part_config(folder, "vae_decoder" if (folder / "vae_decoder").is_dir() else "vae")


def load_prompt_processor(folder: Path) -> PromptProcessor:
    """Load the tokenizer in ``folder`` and the sizes of its images. Raises `ModelError`."""
    from transformers import AutoTokenizer

    from compress.models.config_checks import load_error_types, max_positions

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / TOKENIZER, trust_remote_code=False)
    except load_error_types() as error:
        raise ModelError(
            f"The tokenizer cannot be loaded: {first_line(error)}",
            where=str(folder / TOKENIZER),
            expected="the tokenizer's files in Hugging Face layout",
        ) from error
    positions = max_positions(dict(part_config(folder, "text_encoder")))
    if positions is not None and tokenizer.model_max_length > positions:
        raise ModelError(
            f"Prompts are padded to {tokenizer.model_max_length} tokens, and the text encoder has {positions} places.",
            where=str(folder / TOKENIZER / "tokenizer_config.json"),
            expected=f"a model_max_length of at most {positions}",
            hint="write the length that the model was trained with",
        )
    unet, vae = part_config(folder, UNET), vae_config(folder)
    size = unet.get("sample_size")
    height, width = (int(side or 0) for side in (size if isinstance(size, list) else (size, size)))
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    image_shape = (int(vae["out_channels"]), factor * height, factor * width)
    return PromptProcessor(tokenizer, (int(unet["in_channels"]), height, width), image_shape)


def empty_prompt_ids(folder: Path) -> np.ndarray:
    """Return the token ids of the empty prompt, [1, tokens] int64. Raises `ModelError`.

    Transformers, which takes seconds to import, is used only if tokenizer.json does not suffice.
    """
    import numpy as np

    file, config = folder / TOKENIZER / "tokenizer.json", read_json(folder / TOKENIZER / "tokenizer_config.json")
    pad, length = config.get("pad_token"), config.get("model_max_length")
    if not file.is_file() or not isinstance(length, int) or config.get("padding_side", "right") != "right":
        return load_prompt_processor(folder).ids([""])
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    pad_id = tokenizer.token_to_id(str(pad.get("content") if isinstance(pad, dict) else pad))
    tokenizer.no_padding()
    ids = tokenizer.encode("").ids
    if pad_id is None or len(ids) > length:
        return load_prompt_processor(folder).ids([""])
    return np.array([[*ids, *[pad_id] * (length - len(ids))]], dtype=np.int64)


def load_scheduler(folder: Path) -> SchedulerMixin:
    """Load diffusers' scheduler of the class and config in ``folder``. Raises `ModelError`, `MissingExtraError`."""
    from compress.models.config_checks import load_error_types

    config = read_json(folder / SCHEDULER / "scheduler_config.json")
    scheduler_class = getattr(import_diffusers(), str(config.get("_class_name")), None)
    if scheduler_class is None or not hasattr(scheduler_class, "step"):
        raise ModelError(
            f"diffusers has no scheduler {config.get('_class_name')!r}.",
            where=str(folder / SCHEDULER),
            expected="the class of one of its schedulers as _class_name",
        )
    try:
        return scheduler_class.from_config(config)
    except load_error_types() as error:
        raise ModelError(f"The scheduler cannot be made: {first_line(error)}", where=str(folder / SCHEDULER)) from error


def import_diffusers() -> Any:
    """Return diffusers, imported without torchao and with errors as its only log messages.

    Raises:
        MissingExtraError: diffusers is not installed.
    """
    # Importing torchao takes seconds and is not needed. None in sys.modules makes diffusers take it for not installed.
    hidden = _TORCHAO not in sys.modules
    if hidden:
        sys.modules[_TORCHAO] = None  # type: ignore[assignment]
    try:
        import diffusers.utils.import_utils
    except ModuleNotFoundError as error:
        raise MissingExtraError("diffusers", "diffusion", "A model that generates images") from error
    finally:
        if hidden:
            del sys.modules[_TORCHAO]
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    return diffusers
