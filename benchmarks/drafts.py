"""A language model with a small draft of it beside it: whether it says the same, how much is taken, and how fast.

    python benchmarks/drafts.py TARGET DRAFT                      # 20 prompts in turns, both OpenVINO's or both GGUF
    python benchmarks/drafts.py TARGET DRAFT --ahead 3 --output drafts.json
    python benchmarks/drafts.py PAIR                              # what `gguf: {draft_of: ...}` wrote
    python benchmarks/drafts.py TARGET --lookup 2                 # OpenVINO's, with no draft but its own text

TARGET and DRAFT are artifacts as the stages `openvino` or `gguf` write them, with the same tokenizer. The draft writes
some tokens ahead, the target reads them at once and keeps those that it would have written itself: openvino-genai's and
llama.cpp's own speculative decoding, greedy. With `--lookup` the tokens ahead are those that stood behind the same last
tokens before (prompt lookup), which costs next to nothing. Each prompt is answered by the target alone and by the pair,
who takes the first turn changes; seconds are of the whole call, prompt included. Exit code 1: the pair said something
else.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol
from urllib.request import Request, urlopen

import numpy as np
import typer

from compress.checkpoints.processor import load_tokenizer
from compress.environment import environment
from compress.errors import CompressError, InputError
from compress.formats.gguf.model import find_draft as find_draft_file
from compress.formats.gguf.model import find_gguf
from compress.formats.model_file import format_of, model_file
from compress.formats.openvino.genai import EXACT, SETTINGS, Pipeline
from compress.formats.openvino.model import find_draft as find_draft_graph
from compress.formats.pair import check_tokens
from compress.formats.silence import quiet_libraries, silence
from compress.numerics.differences import paired_bootstrap
from compress.numerics.ratio import ratio_interval
from compress.numerics.statistics import Estimate

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
    """``tokens`` that were written in so many ``seconds``; ``accepted`` of those that were ``drafted``.

    How many were drafted is 0 where the runtime doesn't tell.
    """

    tokens: list[int]
    seconds: float
    drafted: int = 0
    accepted: int = 0


class Writer(Protocol):
    """A model, alone or with a draft, that answers."""

    def __call__(self, ids: Sequence[int], tokens: int) -> Reply:
        """What follows ``ids``, at most so many tokens."""


def in_openvino(target: Path, draft: Path | None, ahead: int, threads: int, lookup: int = 0) -> Writer:
    """openvino-genai's pipeline; see its ``lookup``."""
    # What is multiplied with integers would be rounded to 8 bits otherwise where several tokens are read at once, and
    # keys and values always: 3 of 20 answers of the pair were others. Of the draft that costs acceptance alone.
    pipeline = Pipeline(target, draft, SETTINGS | EXACT, threads, ahead, lookup)

    def write(ids: Sequence[int], tokens: int) -> Reply:
        start = time.perf_counter()
        found = pipeline.write(ids, tokens, ends=True)
        return Reply(found.tokens, time.perf_counter() - start, found.drafted, found.accepted)

    return write


def in_llama_cpp(target: Path, draft: Path | None, ahead: int, threads: int, sure: float = 0.0) -> Writer:
    """llama.cpp's server, within this process."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(model_file(target))
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers, parameters.warmup = 2048, 1, 0, False
    places = [parameters.cpuparams, parameters.cpuparams_batch]
    if draft is not None:
        beside = parameters.speculative.draft
        beside.mparams.path, beside.n_max, beside.n_min = str(model_file(draft)), ahead, 0
        beside.p_min = sure
        parameters.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        places += [beside.cpuparams, beside.cpuparams_batch]
    for place in places:
        place.n_threads = threads
    server = xllamacpp.Server(parameters)

    def write(ids: Sequence[int], tokens: int) -> Reply:
        asked = {"prompt": list(ids), "n_predict": tokens, "temperature": 0.0, "cache_prompt": False}
        content = json.dumps(asked | {"return_tokens": True}).encode()
        request = Request(f"{server.listening_address}/completion", content, {"Content-Type": "application/json"})
        start = time.perf_counter()
        with urlopen(request) as answer:  # this process's own
            found = json.load(answer)
        seconds, timings = time.perf_counter() - start, found["timings"]
        return Reply(found["tokens"], seconds, timings.get("draft_n", 0), timings.get("draft_n_accepted", 0))

    return write


FORMATS = ("openvino", "gguf")


@dataclass(frozen=True)
class Pair:
    """What was found; ``speedup`` is the pair's tokens a second over those of the target alone.

    ``differing``: numbers of the prompts that were not answered with the same tokens. ``acceptance`` is None where
    nobody tells how many tokens were drafted.
    """

    prompts: int
    differing: tuple[int, ...]
    acceptance: Estimate | None
    tokens_per_reading: float
    alone_tokens_per_second: float
    pair_tokens_per_second: float
    speedup: Estimate

    def __str__(self) -> str:
        same = self.prompts - len(self.differing)
        lines = [
            f"the same tokens: {same} of {self.prompts} prompts"
            + (f" (not {', '.join(map(str, self.differing))})" if self.differing else ""),
            f"tokens a reading of the target: {self.tokens_per_reading:.2f}",
            f"tokens/s: {self.alone_tokens_per_second:.1f} alone, {self.pair_tokens_per_second:.1f} with the draft",
            "speedup: {:.2f} ({:.2f} to {:.2f})".format(*self.speedup),
        ]
        if self.acceptance is not None:
            lines.insert(1, "accepted of what was drafted: {:.1%} ({:.1%} to {:.1%})".format(*self.acceptance))
        return "\n".join(lines)


def compare(alone: Writer, pair: Writer, prompts: Sequence[Sequence[int]], tokens: int) -> Pair:
    """Both on every prompt, in turns, once each after one that nobody counts."""
    for writer in (alone, pair):
        writer(prompts[0], tokens)
    replies: list[tuple[Reply, Reply]] = []
    for place, ids in enumerate(prompts):
        order = (alone, pair) if place % 2 == 0 else (pair, alone)
        found = {writer: writer(ids, tokens) for writer in order}
        replies.append((found[alone], found[pair]))
    return judged(replies)


def judged(replies: Sequence[tuple[Reply, Reply]]) -> Pair:
    """Figures of the target's own replies and the pair's, prompt by prompt; intervals are over prompts."""
    rates = [np.array([[len(one[who].tokens), one[who].seconds] for one in replies]) for who in range(2)]

    def speed(rows: np.ndarray) -> float:
        return float(rows[:, 0].sum() / rows[:, 1].sum())

    speedup = paired_bootstrap(
        rates[0], rates[1], lambda before, after: speed(after) / speed(before), 0, confidence=0.95
    )
    drafted, accepted = (np.array([getattr(both, name) for _, both in replies]) for name in ("drafted", "accepted"))
    if not (drafted.any() or accepted.any()):
        raise InputError("Nothing was drafted.", expected="a draft that the runtime takes, and answers of some tokens")
    acceptance = ratio_interval(accepted, drafted, seed=0) if drafted.any() else None
    written = rates[1][:, 0].sum()
    differing = tuple(place for place, (one, both) in enumerate(replies) if one.tokens != both.tokens)
    each = float(written / (written - accepted.sum()))
    return Pair(len(replies), differing, acceptance, each, speed(rates[0]), speed(rates[1]), speedup)


def draft_of(target: Path) -> Path | None:
    """What lies beside it for that."""
    if format_of(target) == "gguf":
        return find_draft_file(find_gguf(target))
    found = find_draft_graph(model_file(target))
    return None if found is None else found.parent


def check_pair(target: Path, draft: Path) -> Any:
    """The tokenizer of both. Raises `InputError` where they can't be a pair."""
    kinds = [format_of(target), format_of(draft)]
    if kinds[0] != kinds[1] or kinds[0] not in FORMATS:
        raise InputError(
            f"The target is {kinds[0].upper()} and the draft {kinds[1].upper()}.",
            expected=f"two of one format: {', '.join(FORMATS)}",
        )
    folders = [one.parent if one.is_file() else one for one in (target, draft)]
    check_tokens(*folders)
    return load_tokenizer(folders[0])


def encoded(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt, by the chat template if there is one."""
    if not tokenizer.chat_template:
        return [tokenizer(prompt)["input_ids"] for prompt in prompts]
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"] for turn in turns]


def main(
    target: Annotated[Path, typer.Argument(help="The artifact's folder.")],
    draft: Annotated[
        Path | None, typer.Argument(help="That of a small model with the same tokenizer, unless it lies beside.")
    ] = None,
    ahead: Annotated[int, typer.Option(min=1, help="Tokens that the draft writes ahead.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="Threads of both.")] = 2,
    lookup: Annotated[int, typer.Option(min=0, help="OpenVINO, without a draft: last tokens that are looked up.")] = 0,
    sure: Annotated[float, typer.Option(help="llama.cpp: the draft stops at tokens less probable.")] = 0.0,
    output: Annotated[Path | None, typer.Option(help="Where to write everything as JSON.")] = None,
) -> None:
    """Measure a pair and print what was found."""
    quiet_libraries()
    try:
        draft = draft_of(target) if draft is None and not lookup else draft
        if lookup and (draft is not None or format_of(target) != "openvino"):
            raise InputError("--lookup is another draft.", expected="an artifact of OpenVINO's, and no draft")
        if draft is None and not lookup:
            raise InputError("There is no draft.", where=str(target), expected="a second artifact, or a pair")
        prompts = encoded(check_pair(target, draft or target), PROMPTS)
        with silence("process"):
            opened = partial(in_llama_cpp, sure=sure) if format_of(target) == "gguf" else in_openvino
            told = {"lookup": lookup} if lookup else {}
            writers = opened(target, None, ahead, threads), opened(target, draft, ahead, threads, **told)
            found = compare(*writers, prompts, tokens)
    except CompressError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    if output is not None:
        settings = {"ahead": ahead, "tokens": tokens, "threads": threads, "sure": sure, "lookup": lookup}
        output.write_text(json.dumps({"pair": asdict(found), **settings, "environment": environment()}, indent=1))
    typer.echo(str(found))
    sys.exit(bool(found.differing))


if __name__ == "__main__":
    typer.run(main)
