"""Instruction following: answers of a chat model that a program checks (IFEval)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from compress.data.instructions import Instruction
from compress.evaluation.evaluate import share_row
from compress.evaluation.generate import TokenProbability, continue_prompts
from compress.formats.target_profile import Target
from compress.models.processor import load_tokenizer
from compress.results.measurement import Measurement
from compress.tasks.conversations import asked, has_template
from compress.tasks.text_generation import perplexity_row
from compress.utils.progress import Progress


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
    texts = [asked(question, tokenizer) for question in questions]
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
    probabilities = ([max(step.probability, least) for step in answer] for answer in steps)
    nats = [
        -float(np.log(answer_probabilities).sum()) / count
        for answer_probabilities, count in zip(probabilities, tokens, strict=True)
    ]
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
    passed = [
        list(instruction.passed(answer).values()) for instruction, answer in zip(instructions, answers, strict=True)
    ]
    return [
        share_row("instructions_followed", [float(all(checks)) for checks in passed], model, target),
        share_row("checks_passed", [float(check) for checks in passed for check in checks], model, target),
    ]
