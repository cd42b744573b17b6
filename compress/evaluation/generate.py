"""Greedy continuations of test texts, through the runtime of the target.

Decoding is greedy, so that two models differ by their weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from compress.data.judged import Instruction
from compress.evaluation.evaluate import open_reader, share_row
from compress.formats.generation.decoder import open_decoder, written_tokens
from compress.formats.runtime import get_runtime
from compress.formats.target_profile import Target
from compress.models.json_file import read_json
from compress.models.processor import load_tokenizer
from compress.numerics.calibration import mean_interval
from compress.numerics.token_metrics import log_probabilities, loop_length, repeated_share
from compress.results.report import Measurement
from compress.tasks.evaluation import Evaluation
from compress.tasks.task import Examples
from compress.tasks.text_generation import perplexity_row
from compress.tasks.token_sequences import has_template, render_question, spread
from compress.utils.progress import Progress

_SEED = 0
_CONFIGS = ("generation_config.json", "config.json")
_FALLEN, _BEFORE = 12, 16
"""Number of tokens shown whose probability fell most, and number of tokens shown before each."""
_NOTABLE = 0.1
"""Excess of repeated 4-grams over the baseline's that a note mentions."""


def choose_prompts(examples: Examples, evaluation: Evaluation) -> list[list[int]]:
    """Return the beginnings of some sequences, spread evenly."""
    indices = spread(len(examples), evaluation.prompts) if evaluation.prompts else []
    return [examples.inputs[index]["input_ids"][: evaluation.prompt_tokens].tolist() for index in indices]


def continue_prompts(
    artifact: Path,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    target: Target,
    threads: int,
    progress: Progress,
    description: str,
) -> list[list[int]]:
    """Return the greedy continuation of each prompt, shorter if the model ends the text.

    Raises the errors of opening and running the model.

    Args:
        artifact: Model folder or file.
        prompts: Token ids of the prompts.
        tokens: Number of tokens of a continuation.
        target: Target that runs the model.
        threads: Number of threads.
        progress: Progress display.
        description: Text of the progress bar.
    """
    writer = open_decoder(get_runtime(target.runtime).open(artifact, target, threads), str(artifact))
    stop_ids = end_tokens(artifact)
    tracked = progress.track(prompts, description, len(prompts))
    return [list(written_tokens(writer, prompt, tokens, stop_ids)) for prompt in tracked]


def end_tokens(artifact: Path) -> set[int]:
    """Return the ids that end a text by the model's configuration, or none."""
    for name in _CONFIGS:
        ids = read_json(artifact / name).get("eos_token_id") if (artifact / name).is_file() else None
        if ids is not None:
            return set(ids) if isinstance(ids, list) else {int(ids)}
    return set()


class TokenProbability(NamedTuple):
    """Generated token, the likeliest other token at its position, and their probabilities."""

    token: int
    probability: float
    other: int
    other_probability: float


def token_probabilities(
    artifact: Path,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    target: Target,
    threads: int,
    progress: Progress,
    description: str,
) -> list[list[TokenProbability]]:
    """Return a model's probability of every token of ``texts``, each after its prompt, in one forward pass.

    Raises the errors of opening and running the model.

    Args:
        artifact: Model folder or file.
        prompts: Token ids of the prompts.
        texts: Token ids of the texts.
        target: Target that runs the model.
        threads: Number of threads.
        progress: Progress display.
        description: Text of the progress bar.
    """
    read, steps = open_reader(artifact, target, threads), []
    for prompt, text in progress.track(list(zip(prompts, texts, strict=True)), description, len(prompts)):
        logits = read(np.array([*prompt, *text[:-1]], dtype=np.int64))
        probabilities = np.exp(log_probabilities(logits[len(prompt) - 1 :]))
        positions, chosen_ids = np.arange(len(text)), np.array(text)
        chosen = probabilities[positions, chosen_ids].copy()
        probabilities[positions, chosen_ids] = -1.0
        others = probabilities.argmax(axis=-1)
        columns = (chosen_ids, chosen, others, probabilities[positions, others])
        steps.append([*map(TokenProbability._make, zip(*(column.tolist() for column in columns), strict=True))])
    return steps


def looping_row(written: Sequence[Sequence[int]], model: str, target: str) -> Measurement:
    """Return the share of continuations that end in a loop, with its Wilson interval."""
    return share_row("looping", [float(loop_length(np.asarray(tokens)) > 0) for tokens in written], model, target)


def repetition_row(written: Sequence[Sequence[int]], model: str, target: str) -> Measurement:
    """Return the mean share of repeated 4-grams, with its interval over prompts."""
    shares = [repeated_share(np.asarray(tokens)) for tokens in written]
    value, low, high = mean_interval(shares, _SEED)
    samples = {"n": len(shares), "raw": tuple(shares), **({"low": low, "high": high} if len(shares) > 1 else {})}
    return Measurement(model=model, metric="repetition", target=target, value=value, unit="ratio", **samples)


def repetition_note(measured: Measurement, baseline: Measurement) -> str | None:
    """Return a note on a model that repeats itself significantly more than the baseline after the same prompts."""
    if measured.raw is None or baseline.raw is None:
        return None
    more = mean_interval(np.subtract(measured.raw, baseline.raw), _SEED)
    if more.value < _NOTABLE or more.low <= 0:
        return None
    return (
        f"{measured.model} repeats itself: {measured.value:.0%} of its 4-grams are repetitions, "
        f"{baseline.value:.0%} of the baseline's"
    )


class FallenToken(NamedTuple):
    """Token with those before it, and its probability by two models."""

    before: list[int]
    token: int
    old: float
    new: float


def find_fallen_tokens(examples: Examples, old: np.ndarray, new: np.ndarray) -> list[FallenToken]:
    """Return the tokens whose probability fell most from the losses ``old`` to ``new`` [n, scored]."""
    probabilities = np.exp(-old.astype(np.float64)), np.exp(-new.astype(np.float64))
    falls = probabilities[0] - probabilities[1]
    tokens = []
    for position in np.argsort(-falls, axis=None, kind="stable")[:_FALLEN]:
        sequence, column = np.unravel_index(position, falls.shape)
        ids = examples.inputs[int(sequence)]["input_ids"].tolist()
        end = len(ids) - falls.shape[1] + int(column)
        if falls[sequence, column] > 0:
            values = (float(probability[sequence, column]) for probability in probabilities)
            tokens.append(FallenToken(ids[max(0, end - _BEFORE) : end], ids[end], *values))
    return tokens


def decode_tokens(artifact: Path, texts: Sequence[Sequence[int]]) -> list[str]:
    """Return tokens as text with the model's tokenizer. Special tokens remain visible."""
    tokenizer = load_tokenizer(artifact)
    return [str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)) for tokens in texts]


def encode_texts(artifact: Path, texts: Sequence[str]) -> list[list[int]]:
    """Return text with visible special tokens as token ids of the model's tokenizer."""
    tokenizer = load_tokenizer(artifact)
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def answer_instructions(
    artifact: Path,
    instructions: Sequence[Instruction],
    tokens: int,
    target: Target,
    threads: int,
    progress: Progress,
    description: str,
) -> list[str]:
    """Return the greedy answer to each instruction in the model's chat template.

    Raises the errors of opening and running the model, and `DataError` for a tokenizer without a template.

    Args:
        artifact: Model folder or file.
        instructions: Instructions with their checks.
        tokens: Largest number of tokens of an answer.
        target: Target that runs the model.
        threads: Number of threads.
        progress: Progress display.
        description: Text of the progress bar.
    """
    prompts = encode_chats(artifact, [instruction.prompt for instruction in instructions])
    answers = continue_prompts(artifact, prompts, tokens, target, threads, progress, description)
    tokenizer = load_tokenizer(artifact)
    return [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in answers]


def has_chat_template(artifact: Path) -> bool:
    """Return whether a model's tokenizer has a chat template."""
    return has_template(load_tokenizer(artifact))


def encode_chats(artifact: Path, questions: Sequence[str]) -> list[list[int]]:
    """Return each question as a chat, up to the start of the answer. Raises `DataError` without a template."""
    tokenizer = load_tokenizer(artifact)
    texts = [render_question(question, tokenizer) for question in questions]
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def answer_perplexity(
    steps: Sequence[Sequence[TokenProbability]], tokens: Sequence[int], model: str, target: str
) -> Measurement:
    """Return a model's perplexity of the baseline's answers. The interval is over answers; see `perplexity_row`.

    Args:
        steps: The model's probabilities of the answers' tokens. Those below the smallest float32 count as that number.
        tokens: Number of tokens of each answer by the baseline's tokenizer.
        model: Label of the model.
        target: Name of the target.
    """
    least = float(np.finfo(np.float32).tiny)
    logarithms = (np.log([max(step.probability, least) for step in answer]) for answer in steps)
    nats = [-float(values.sum()) / count for values, count in zip(logarithms, tokens, strict=True)]
    return perplexity_row("answer_perplexity", np.array(nats), model, target)


def instruction_rows(
    instructions: Sequence[Instruction], answers: Sequence[str], model: str, target: str
) -> list[Measurement]:
    """Return the share of instructions whose checks all pass, and the share of passed checks, with Wilson intervals.

    They are the prompt-level and instruction-level strict accuracies of Zhou et al. 2023, section 2.

    Args:
        instructions: Instructions with their checks.
        answers: Answer to each.
        model: Label of the model.
        target: Name of the target.
    """
    pairs = zip(instructions, answers, strict=True)
    passed = [list(instruction.passed(answer).values()) for instruction, answer in pairs]
    return [
        share_row("instructions_followed", [float(all(checks)) for checks in passed], model, target),
        share_row("checks_passed", [float(check) for checks in passed for check in checks], model, target),
    ]
