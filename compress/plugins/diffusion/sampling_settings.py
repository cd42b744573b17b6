"""How a model draws pictures, and how prompts become what its text encoder reads. Importing this imports no torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.models.json_file import read_json
from compress.models.pipeline_folder import part_config
from compress.plugins.diffusion.pipeline_checks import noise_shape, picture_shape
from compress.utils.errors import MissingExtraError, ModelError, first_line

if TYPE_CHECKING:
    import numpy as np
    from diffusers import SchedulerMixin
    from transformers import PreTrainedTokenizerBase

TOKENIZER, SCHEDULER = "tokenizer", "scheduler"
"""diffusers' names of their folders."""
SAMPLING = "sampling_config.json"
"""Beside model_index.json: diffusers' arguments of a call, where the model's maker has an opinion on them."""
_TORCHAO = "torchao"
_STEPS, _GUIDANCE = "num_inference_steps", "guidance_scale"


@dataclass(frozen=True)
class Sampling:
    """``steps`` of the scheduler, and ``guidance`` as diffusers' guidance_scale has it: 1 or less is none.

    The defaults are those of diffusers' StableDiffusionPipeline.
    """

    steps: int = 50
    guidance: float = 7.5

    @classmethod
    def read(cls, folder: Path) -> Sampling:
        """What lies in ``folder``, or diffusers' own defaults. Raises `ModelError`."""
        if not (folder / SAMPLING).is_file():
            return cls()
        said = read_json(folder / SAMPLING)
        steps, guidance = said.get(_STEPS, cls.steps), said.get(_GUIDANCE, cls.guidance)
        if type(steps) is not int or steps < 1 or not isinstance(guidance, int | float):
            raise ModelError(
                f"{SAMPLING} gives {steps!r} steps and the guidance {guidance!r}.",
                where=str(folder / SAMPLING),
                expected=f"{_STEPS} of 1 or more, and a number as {_GUIDANCE}",
            )
        return cls(steps, float(guidance))

    def as_json(self) -> bytes:
        """What `read` reads."""
        return json.dumps({_STEPS: self.steps, _GUIDANCE: self.guidance}).encode()


@dataclass(frozen=True)
class PromptProcessor:
    """A tokenizer, and the shapes [channels, height, width] of what a picture begins as, its noise, and of itself."""

    tokenizer: PreTrainedTokenizerBase
    noise_shape: tuple[int, int, int]
    picture_shape: tuple[int, int, int]

    @property
    def length(self) -> int:
        """Tokens of a prompt, shorter ones padded to it."""
        return int(self.tokenizer.model_max_length)

    def ids(self, prompts: Sequence[str]) -> np.ndarray:
        """[prompts, length] int64, padded and cut as diffusers does it."""
        import numpy as np

        found = self.tokenizer(list(prompts), padding="max_length", max_length=self.length, truncation=True)
        return np.array(found["input_ids"], dtype=np.int64)

    def sizes(self, prompts: Sequence[str]) -> np.ndarray:
        """How many tokens each prompt has, neither padded nor cut."""
        import numpy as np

        found = self.tokenizer(list(prompts), padding=False, truncation=False, verbose=False)["input_ids"]
        return np.array([len(ids) for ids in found], dtype=np.int64)

    def cut(self, prompts: Sequence[str]) -> list[int]:
        """Places of the prompts that `ids` cuts."""
        return [place for place, size in enumerate(self.sizes(prompts)) if size > self.length]

    def noise(self, seed: int) -> np.ndarray:
        """Standard normal numbers of that shape, float32: those of torch for the seed, as diffusers draws them."""
        import numpy as np
        import torch

        drawn = torch.randn(self.noise_shape, generator=torch.Generator().manual_seed(seed))
        return np.asarray(drawn.numpy())


def load_prompt_processor(folder: Path) -> PromptProcessor:
    """What prepares prompts for the parts in ``folder``, and the size of its pictures. Raises `ModelError`."""
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
    return PromptProcessor(tokenizer, noise_shape(folder), picture_shape(folder))


def empty_ids(folder: Path) -> np.ndarray:
    """The empty prompt of the parts in ``folder``, [1, tokens] int64, without transformers where that can be.

    Raises `ModelError`.
    """
    import numpy as np

    file, config = folder / TOKENIZER / "tokenizer.json", read_json(folder / TOKENIZER / "tokenizer_config.json")
    pad, length = config.get("pad_token"), config.get("model_max_length")
    if not file.is_file() or not isinstance(length, int) or config.get("padding_side", "right") != "right":
        return load_prompt_processor(folder).ids([""])
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    filled = tokenizer.token_to_id(str(pad.get("content") if isinstance(pad, dict) else pad))
    tokenizer.no_padding()
    ids = tokenizer.encode("").ids
    if filled is None or len(ids) > length:
        return load_prompt_processor(folder).ids([""])
    return np.array([[*ids, *[filled] * (length - len(ids))]], dtype=np.int64)


def load_scheduler(folder: Path) -> SchedulerMixin:
    """diffusers' scheduler of the class and config in ``folder``. Raises `ModelError`, `MissingExtraError`."""
    from compress.models.config_checks import load_error_types

    said = read_json(folder / SCHEDULER / "scheduler_config.json")
    made = getattr(import_diffusers(), str(said.get("_class_name")), None)
    if made is None or not hasattr(made, "step"):
        raise ModelError(
            f"diffusers has no scheduler {said.get('_class_name')!r}.",
            where=str(folder / SCHEDULER),
            expected="the class of one of its schedulers as _class_name",
        )
    try:
        return made.from_config(said)
    except load_error_types() as error:
        raise ModelError(f"The scheduler cannot be made: {first_line(error)}", where=str(folder / SCHEDULER)) from error


def import_diffusers() -> Any:
    """The package, imported without torchao, which takes seconds and isn't needed; it logs errors alone.

    Raises `MissingExtraError`.
    """
    hidden = _TORCHAO not in sys.modules
    if hidden:
        sys.modules[_TORCHAO] = None  # type: ignore[assignment]  # so that it is taken for not installed
    try:
        import diffusers.utils.import_utils
    except ModuleNotFoundError as error:
        raise MissingExtraError("diffusers", "diffusion", "A model that draws pictures") from error
    finally:
        if hidden:
            del sys.modules[_TORCHAO]
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    return diffusers
