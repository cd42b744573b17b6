"""How a model draws pictures, and how prompts become what its text encoder reads. Importing this imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoints.json_file import read_json
from compress.errors import ModelError

if TYPE_CHECKING:
    import numpy as np

SAMPLING = "sampling_config.json"
"""Beside model_index.json: diffusers' arguments of a call, where the model's maker has an opinion on them."""
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
    """A tokenizer, and the shape [channels, height, width] of the noise that a picture begins as."""

    tokenizer: Any
    noise_shape: tuple[int, int, int]

    @property
    def length(self) -> int:
        """Tokens of a prompt, shorter ones padded to it."""
        return int(self.tokenizer.model_max_length)

    def ids(self, prompts: Sequence[str]) -> np.ndarray:
        """[prompts, length] int64, padded and cut as diffusers does it."""
        import numpy as np

        found = self.tokenizer(list(prompts), padding="max_length", max_length=self.length, truncation=True)
        return np.array(found["input_ids"], dtype=np.int64)

    def cut(self, prompts: Sequence[str]) -> list[int]:
        """Places of the prompts that `ids` cuts."""
        found = self.tokenizer(list(prompts), padding=False, truncation=False, verbose=False)["input_ids"]
        return [place for place, ids in enumerate(found) if len(ids) > self.length]

    def noise(self, seed: int) -> np.ndarray:
        """Standard normal numbers of that shape, float32: those of torch for the seed, as diffusers draws them."""
        import numpy as np
        import torch

        drawn = torch.randn(self.noise_shape, generator=torch.Generator().manual_seed(seed))
        return np.asarray(drawn.numpy())
