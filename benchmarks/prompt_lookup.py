"""Speed-up of a language model by prompt lookup in openvino-genai.

    python benchmarks/prompt_lookup.py artifacts/runs/smollm2-openvino/latest/model --lookup 2 --ahead 4 --tokens 256

The argument is a folder that the stage `openvino` wrote. Where the last `--lookup` tokens occurred before in the text,
the `--ahead` tokens that followed them there are verified in one forward pass. Each of 20 prompts is answered by greedy
decoding with and without prompt lookup, in alternating order. Seconds include the prefill. The exit code is 1 if prompt
lookup changes a reply.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer

from compress.formats.openvino.genai import EXACT, SETTINGS
from compress.formats.quiet_output import quiet_libraries
from compress.models.processor import load_tokenizer
from compress.numerics.differences import paired_bootstrap
from compress.numerics.statistics import IntervalEstimate

PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
    "What is the capital of France, and what is it known for?",
    "List three things that a beginner should know about chess.",
    "Write a Python function that returns the largest number of a list.",
    "Give me a recipe for pancakes.",
    "What does a bank do with the money that people keep there?",
    "Tell a story about a dog who learns to swim.",
    "How do plants make food from light?",
    "Write a polite letter that declines an invitation.",
    "What are the differences between a frog and a toad?",
    "Name the planets of the solar system in their order.",
    "How can I fall asleep faster?",
    "Explain what a variable is in programming.",
    "What happened in the year 1969?",
    "Write four lines for a birthday card to my grandmother.",
    "Why do people laugh?",
    "Describe a forest in autumn.",
    "What should I pack for a week in the mountains?",
    "How does a bicycle stay upright?",
)


class Reply(NamedTuple):
    """Generated tokens and the seconds of the whole call."""

    tokens: list[int]
    seconds: float


Generate = Callable[[Sequence[int], int], Reply]


def open_pipeline(folder: Path, threads: int, lookup: int, ahead: int) -> Generate:
    """Return a function that generates tokens after a prompt, without prompt lookup if ``lookup`` is 0."""
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    # Without EXACT, activations and cached keys are rounded to 8 bits, and replies with prompt lookup differ.
    properties = {**SETTINGS, **EXACT, "INFERENCE_NUM_THREADS": threads, "scheduler_config": scheduler}
    if lookup:
        properties["prompt_lookup"] = True
    pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", **properties)

    def generate(ids: Sequence[int], tokens: int) -> Reply:
        config = openvino_genai.GenerationConfig(max_new_tokens=tokens, do_sample=False, apply_chat_template=False)
        config.eos_token_id = pipeline.get_tokenizer().get_eos_token_id()
        if lookup:
            config.num_assistant_tokens, config.max_ngram_size = ahead, lookup
        start = time.perf_counter()
        result = pipeline.generate(openvino.Tensor(np.array([ids], np.int64)), config)
        return Reply(list(result.tokens[0]), time.perf_counter() - start)

    return generate


def compare(plain: Generate, lookup: Generate, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[Reply]]:
    """Answer every prompt with both pipelines, after one untimed reply of each; return both replies per prompt."""
    for generate in (plain, lookup):
        generate(prompts[0], tokens)
    pairs = []
    for number, ids in enumerate(prompts):
        order = (plain, lookup) if number % 2 == 0 else (lookup, plain)
        replies = {generate: generate(ids, tokens) for generate in order}
        pairs.append([replies[plain], replies[lookup]])
    return pairs


def tokens_per_second(rows: np.ndarray) -> float:
    """Return total tokens over total seconds of rows [n, 2]."""
    return float(rows[:, 0].sum() / rows[:, 1].sum())


def speedup(pairs: Sequence[Sequence[Reply]]) -> IntervalEstimate:
    """Return the ratio of tokens per second, with a 95% bootstrap interval over prompts."""
    plain, lookup = (np.array([[len(pair[side].tokens), pair[side].seconds] for pair in pairs]) for side in (0, 1))
    return paired_bootstrap(plain, lookup, lambda a, b: tokens_per_second(b) / tokens_per_second(a), 0, confidence=0.95)


def encode(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each prompt, formatted with the chat template if there is one."""
    if not tokenizer.chat_template:
        return [tokenizer(prompt)["input_ids"] for prompt in prompts]
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"] for turn in turns]


def main(
    folder: Annotated[Path, typer.Argument(help="Folder that the stage openvino wrote.")],
    lookup: Annotated[int, typer.Option(min=1, help="Last tokens that are looked up.")] = 2,
    ahead: Annotated[int, typer.Option(min=1, help="Tokens that are checked together.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = 2,
) -> None:
    """Measure the speed-up by prompt lookup."""
    quiet_libraries()
    prompts = encode(load_tokenizer(folder), PROMPTS)
    pairs = compare(
        open_pipeline(folder, threads, 0, ahead), open_pipeline(folder, threads, lookup, ahead), prompts, tokens
    )
    differing = [number for number, (plain, fast) in enumerate(pairs) if plain.tokens != fast.tokens]
    typer.echo(f"equal answers: {len(pairs) - len(differing)} of {len(pairs)}")
    typer.echo("speed-up: {:.2f} ({:.2f} to {:.2f})".format(*speedup(pairs)))
    sys.exit(bool(differing))


if __name__ == "__main__":
    typer.run(main)
