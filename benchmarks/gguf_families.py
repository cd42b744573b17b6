"""Which families' GGUF files llama.cpp answers as transformers does: tiny models with random weights, all of them.

    .venv/bin/python benchmarks/gguf_families.py [NAME ...]

Each is exported in 32 bits and asked for the logits of every place of two texts and for 24 greedy tokens, in a process
of its own, since llama.cpp ends the process at what it doesn't expect. It keeps keys and values in float16.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from tiny_decoders import DECODERS, save, some_ids

from compress.checkpoints.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.formats.gguf.export import write_gguf
from compress.formats.gguf.families import FAMILIES
from compress.formats.gguf.proof import compare_gguf
from compress.formats.gguf.runtime import RUNTIME, LlamaCppSession
from compress.formats.targets import TARGETS

_LENGTH, _TOKENS = 40, 24
_ALLOWED = 1e-2
"""Of the standard deviation of transformers' logits."""
_WITH_EXPERTS = 0.9
"""Of the places, where a router sends tokens: rounded keys tip the balance of some."""


def judge(name: str, folder: Path) -> tuple[bool, str]:
    """Whether llama.cpp's answers are transformers' own, and how far they are, or what stands against the family."""
    model = save(name, folder)
    try:
        checkpoint = Checkpoint(folder)
        write_gguf(checkpoint, folder / "tiny.gguf", "f32")
        worst = max(one.largest - one.allowed for one in compare_gguf(folder / "tiny.gguf", checkpoint, "f32"))
        if worst > 0:
            return False, f"a tensor came back {worst:.1e} off"
        session = RUNTIME.open(folder / "tiny.gguf", TARGETS["llama-cpp"], 1)
    except CompressError as error:
        return False, str(error).splitlines()[0]
    ids = some_ids(2, _LENGTH)
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    found = session.predict({"input_ids": ids.numpy()})["logits"]
    share = _WITH_EXPERTS if hasattr(model.config, "num_experts_per_tok") else 1.0
    off = float(np.quantile(np.abs(found - expected).max(axis=-1), share) / expected.std())
    greedy = _greedy(session, ids[0, :7].tolist())
    with torch.no_grad():
        wanted = model.generate(ids[:1, :7], max_new_tokens=_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    same = greedy == wanted[0, 7:].tolist()
    return off < _ALLOWED and same, f"logits {off:.1e} off{'' if same else ', other tokens'}"


def _greedy(session: LlamaCppSession, prompt: list[int]) -> list[int]:
    decoder = session.decoder()
    found = [decoder.prefill(prompt)]
    while len(found) < _TOKENS:
        found.append(decoder.step(found[-1]))
    return found


def in_a_process(name: str) -> tuple[bool, str]:
    """`judge` where nothing that ends the process ends this one."""
    with tempfile.TemporaryDirectory() as folder:
        here, there = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=_answer, args=(name, Path(folder), there))
        process.start()
        there.close()
        try:
            equal, reason = here.recv()
        except EOFError:
            lines = (Path(folder) / "said.txt").read_text(errors="replace").strip().splitlines()
            said = [line for line in lines if "ASSERT" in line or "Error" in line]
            equal, reason = False, said[-1] if said else "the process ended"
        process.join()
    return equal, reason


def _answer(name: str, folder: Path, connection: Connection) -> None:
    with (folder / "said.txt").open("w") as said:
        os.dup2(said.fileno(), 2)
        connection.send(judge(name, folder / "model"))


def main(names: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Print a row for each model; ends with 1 where a family of `FAMILIES` is not as transformers has it."""
    typer.echo("| model | GGUF | equal | |\n|---|---|---|---|")
    equal: set[str] = set()
    missed = []
    for name in names or list(DECODERS):
        kind = DECODERS[name][0]
        good, reason = in_a_process(name)
        family = FAMILIES[kind].name if kind in FAMILIES else ""
        typer.echo(f"| {name} | {family} | {'yes' if good else 'no'} | {reason} |")
        equal |= {family} if good else set()
        missed += [] if good or not family else [name]
    typer.echo(f"\n{len(equal)} families of llama.cpp are equal." + (f" Not: {', '.join(missed)}." if missed else ""))
    raise typer.Exit(1 if missed else 0)


if __name__ == "__main__":
    typer.run(main)
