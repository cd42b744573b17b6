"""What a model writes after the beginnings of test texts, through the runtime that will run it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from compress.evaluation.evaluate import share_row
from compress.formats.runtimes import get_runtime
from compress.formats.target_profile import Target
from compress.models.json_file import read_json
from compress.models.processor import load_tokenizer
from compress.numerics.calibration import mean_interval
from compress.numerics.next_token import log_probabilities, loop_length, repeated_share
from compress.results.measurement import Measurement
from compress.runtimes.decoder import feeder, open_decoder, written_tokens
from compress.tasks.evaluation import Evaluation
from compress.tasks.sequences import spread
from compress.tasks.task import Examples
from compress.utils.errors import ModelError
from compress.utils.progress import Progress

_SEED = 0
_CONFIGS = ("generation_config.json", "config.json")
_FALLEN, _BEFORE = 12, 16
"""Tokens that are shown for having become less likely, and how many before each."""
_NOTABLE = 0.1
"""A share of repeated tokens that is more than the baseline's by so much is worth a word."""


def prompts_of(examples: Examples, evaluation: Evaluation) -> list[list[int]]:
    """The beginnings of some windows, spread evenly."""
    places = spread(len(examples), evaluation.prompts) if evaluation.prompts else []
    return [examples.inputs[place]["input_ids"][: evaluation.prompt_tokens].tolist() for place in places]


def continue_prompts(
    artifact: Path,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    target: Target,
    threads: int,
    progress: Progress,
    description: str,
) -> list[list[int]]:
    """The likeliest ``tokens`` tokens after each prompt, one by one, or fewer where the model ends the text.

    Raises what opening and running raise.
    """
    writer = open_decoder(get_runtime(target.runtime).open(artifact, target, threads), str(artifact))
    ends = end_tokens(artifact)
    asked = progress.track(prompts, description, len(prompts))
    return [list(written_tokens(writer, prompt, tokens, ends)) for prompt in asked]


def end_tokens(artifact: Path) -> set[int]:
    """The ids that end a text, as the configuration beside the model has them; none where it says nothing."""
    for name in _CONFIGS:
        if (artifact / name).is_file():
            found = read_json(artifact / name).get("eos_token_id")
            if found is not None:
                return set(found) if isinstance(found, list) else {int(found)}
    return set()


class Step(NamedTuple):
    """A token that a model wrote, the likeliest other one there, and how likely it finds them."""

    token: int
    probability: float
    other: int
    other_probability: float


def steps_of(
    artifact: Path,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    target: Target,
    threads: int,
    progress: Progress,
    description: str,
) -> list[list[Step]]:
    """What a model makes of every token of ``texts``, each behind its prompt, read in one go.

    Raises what opening and running raise.
    """
    session = get_runtime(target.runtime).open(artifact, target, threads)
    feed = feeder(session, str(artifact))
    found = []
    for prompt, text in progress.track(list(zip(prompts, texts, strict=True)), description, len(prompts)):
        ids = np.array([*prompt, *text[:-1]], dtype=np.int64)
        logits = session.predict(feed({"input_ids": ids[None], "attention_mask": np.ones_like(ids)[None]}))["logits"][0]
        if len(logits) != len(ids):
            raise ModelError("The model gives logits of the last token alone.", where=str(artifact))
        chances = np.exp(log_probabilities(logits[len(prompt) - 1 :]))
        places, written = np.arange(len(text)), np.array(text)
        own = chances[places, written].copy()
        chances[places, written] = -1.0
        others = chances.argmax(axis=-1)
        columns = (written, own, others, chances[places, others])
        found.append([Step(*values) for values in zip(*(column.tolist() for column in columns), strict=True)])
    return found


def loop_row(written: Sequence[Sequence[int]], model: str, target: str) -> Measurement:
    """How many continuations end in a loop, with its Wilson interval."""
    outcomes = [float(loop_length(np.asarray(tokens)) > 0) for tokens in written]
    return share_row("looping", outcomes, model, target)


def repetition_row(written: Sequence[Sequence[int]], model: str, target: str) -> Measurement:
    """The mean share of repeated runs of four tokens, with its interval over prompts."""
    shares = [repeated_share(np.asarray(tokens)) for tokens in written]
    value, low, high = mean_interval(shares, _SEED)
    known = {"low": low, "high": high} if len(shares) > 1 else {}
    return Measurement(
        model=model,
        metric="repetition",
        target=target,
        value=value,
        unit="ratio",
        n=len(shares),
        raw=tuple(shares),
        **known,
    )


def repetition_note(own: Measurement, baseline: Measurement) -> str | None:
    """A word on a model that repeats itself more than the baseline does after the same prompts, beyond chance."""
    if own.raw is None or baseline.raw is None:
        return None
    more = mean_interval(np.subtract(own.raw, baseline.raw), _SEED)
    if more.value < _NOTABLE or more.low <= 0:
        return None
    return (
        f"{own.model} repeats itself: {own.value:.0%} of its runs of four tokens stood there before, "
        f"{baseline.value:.0%} of the baseline's"
    )


class Fallen(NamedTuple):
    """A token behind others, and its probability by one model and by another."""

    before: list[int]
    token: int
    old: float
    new: float


def fallen(examples: Examples, old: np.ndarray, new: np.ndarray) -> list[Fallen]:
    """The tokens that models foretell with losses ``old`` and ``new`` [n, scored], by the fall of their probability."""
    chances = np.exp(-old.astype(np.float64)), np.exp(-new.astype(np.float64))
    falls = chances[0] - chances[1]
    found = []
    for place in np.argsort(-falls, axis=None, kind="stable")[:_FALLEN]:
        window, column = np.unravel_index(place, falls.shape)
        ids = examples.inputs[int(window)]["input_ids"].tolist()
        end = len(ids) - falls.shape[1] + int(column)
        if falls[window, column] > 0:
            known = (float(chance[window, column]) for chance in chances)
            found.append(Fallen(ids[max(0, end - _BEFORE) : end], ids[end], *known))
    return found


def as_text(artifact: Path, texts: Sequence[Sequence[int]]) -> list[str]:
    """Tokens as text, by the tokenizer beside the model; special tokens stay visible."""
    tokenizer = load_tokenizer(artifact)
    return [str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)) for tokens in texts]


def as_ids(artifact: Path, texts: Sequence[str]) -> list[list[int]]:
    """Text in which special tokens are visible as the tokens of the tokenizer beside the model."""
    tokenizer = load_tokenizer(artifact)
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
