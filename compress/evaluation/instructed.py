"""How well a chat model does what it is told, by answers that a program checks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compress.checkpoints.processor import load_tokenizer
from compress.data.instructions import Instruction
from compress.evaluation.evaluate import share_row
from compress.evaluation.generate import continue_prompts
from compress.measurement import Measurement
from compress.progress import Progress
from compress.targets import Target
from compress.tasks.conversations import asked


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
    tokenizer = load_tokenizer(artifact)
    texts = [asked(one.prompt, tokenizer) for one in instructions]
    prompts = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    written = continue_prompts(artifact, prompts, tokens, target, threads, progress, description)
    return [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in written]


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
