"""How well a chat model does what it is told, by answers that a program checks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from compress.data.instructions import Instruction
from compress.evaluation.evaluate import share_row
from compress.evaluation.generate import Step, continue_prompts
from compress.formats.target_profile import Target
from compress.models.processor import load_tokenizer
from compress.results.measurement import Measurement
from compress.tasks.conversations import asked, has_template
from compress.tasks.text_generation import perplexity_row
from compress.utils.progress import Progress


def answers_of(
    artifact: Path,
    instructions: Sequence[Instruction],
    tokens: int,
    target: Target,
    threads: int,
    progress: Progress,
    description: str,
) -> list[str]:
    """The likeliest answer of ``tokens`` tokens at most to each instruction, asked in the model's chat template.

    Raises what opening and running raise, and `DataError` for a tokenizer without a template.
    """
    prompts = turns_of(artifact, [one.prompt for one in instructions])
    written = continue_prompts(artifact, prompts, tokens, target, threads, progress, description)
    tokenizer = load_tokenizer(artifact)
    return [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in written]


def chats(artifact: Path) -> bool:
    """Whether a model's tokenizer says how a chat with it is written."""
    return has_template(load_tokenizer(artifact))


def turns_of(artifact: Path, questions: Sequence[str]) -> list[list[int]]:
    """Each question as a chat of its own, up to where the answer begins. Raises `DataError` without a template."""
    tokenizer = load_tokenizer(artifact)
    texts = [asked(question, tokenizer) for question in questions]
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def answer_perplexity(steps: Sequence[Sequence[Step]], tokens: Sequence[int], model: str, target: str) -> Measurement:
    """How perplexed a model is by answers whose ``steps`` it gave, by token of the ``tokens`` that the baseline wrote.

    See `perplexity_row`; the interval is over answers. What is unlikelier than float32 holds counts as its smallest
    number.
    """
    least = float(np.finfo(np.float32).tiny)
    chances = ([max(step.probability, least) for step in answer] for answer in steps)
    nats = [-float(np.log(found).sum()) / count for found, count in zip(chances, tokens, strict=True)]
    return perplexity_row("answer_perplexity", np.array(nats), model, target)


def instruction_rows(
    instructions: Sequence[Instruction], answers: Sequence[str], model: str, target: str
) -> list[Measurement]:
    """The share of instructions all of whose checks hold, and the share of checks, each with its Wilson interval.

    Those are the prompt-level and instruction-level strict accuracies of Zhou et al. 2023, section 2.
    """
    passed = [list(one.passed(answer).values()) for one, answer in zip(instructions, answers, strict=True)]
    return [
        share_row("instructions_followed", [float(all(each)) for each in passed], model, target),
        share_row("checks_passed", [float(holds) for each in passed for holds in each], model, target),
    ]
