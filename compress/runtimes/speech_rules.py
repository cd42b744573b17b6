"""What a Whisper folder says of how its decoder is asked: the prompt, what ends a text and what may not be said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.checkpoints.json_file import read_json
from compress.errors import ModelError

GENERATION_CONFIG = "generation_config.json"
_POSITIONS = 448
_LANGUAGE, _TASK = "en", "transcribe"
"""Of a model for many languages whose generation config names none."""


@dataclass(frozen=True)
class SpeechRules:
    """Greedy transcription, as transformers' `generate` does it without timestamps.

    ``prompt`` are the tokens that each window begins with; ``ends`` end it. Tokens ``never`` are not said, and those
    of ``not_first`` not at once. ``longest`` counts the prompt.
    """

    prompt: tuple[int, ...]
    ends: frozenset[int]
    never: np.ndarray
    not_first: np.ndarray
    longest: int


def read_rules(folder: Path) -> SpeechRules:
    """The rules that generation_config.json and config.json of a folder give. Raises `ModelError`."""
    said = read_json(folder / "config.json")
    if (folder / GENERATION_CONFIG).is_file():
        said = said | {key: value for key, value in read_json(folder / GENERATION_CONFIG).items() if value is not None}
    ends = said.get("eos_token_id")
    start = said.get("decoder_start_token_id")
    if start is None or ends is None:
        raise ModelError(
            "Nothing says with which token a transcript begins and ends.",
            where=str(folder / GENERATION_CONFIG),
            expected="decoder_start_token_id and eos_token_id",
            mend=f"copy {GENERATION_CONFIG} of the model that the graphs were made of",
        )
    prompt = (start, *_after_start(said, folder))
    positions = said.get("max_target_positions") or _POSITIONS
    return SpeechRules(
        prompt=prompt,
        ends=frozenset(ends if isinstance(ends, list) else [ends]),
        never=_tokens(said, "suppress_tokens"),
        not_first=_tokens(said, "begin_suppress_tokens"),
        # transformers' `generate` counts the prompt on top of max_length.
        longest=min(positions, (said.get("max_length") or _POSITIONS) + len(prompt)),
    )


def _after_start(said: Mapping[str, Any], folder: Path) -> list[int]:
    """Language and task, where the model has several, and the token against timestamps, where it has one."""
    prompt = []
    if said.get("is_multilingual"):
        names = (f"<|{said.get('language') or _LANGUAGE}|>", said.get("task") or _TASK)
        for name, key in zip(names, ("lang_to_id", "task_to_id"), strict=True):
            ids = said.get(key) or {}
            if name not in ids:
                raise ModelError(
                    f"The model has no {name!r}.",
                    where=str(folder / GENERATION_CONFIG),
                    expected=f"one of {', '.join(ids) or 'none'}, as {key} has them",
                )
            prompt.append(ids[name])
    if (silent := said.get("no_timestamps_token_id")) is not None:
        prompt.append(silent)
    return prompt


def _tokens(said: Mapping[str, Any], key: str) -> np.ndarray:
    return np.array(said.get(key) or [], dtype=np.int64)
