"""Decoders as GGUF files, which llama.cpp answers as transformers does, or not.

Each is exported in 32 bits and asked for the logits of every place of two texts and for 24 greedy tokens. llama.cpp
keeps keys and values in float16, and ends the process at what it doesn't expect.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tiny_decoders import DECODERS, save, some_ids
from trials import Trial

from compress.formats.gguf.export import GgufTypes, compare_gguf, write_gguf
from compress.formats.gguf.families import FAMILIES
from compress.formats.gguf.runtime import RUNTIME, LlamaCppSession
from compress.formats.targets import TARGETS
from compress.models.checkpoint import Checkpoint
from compress.utils.errors import CompressError

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
        write_gguf(checkpoint, folder / "tiny.gguf", GgufTypes("f32"))
        worst = max(
            comparison.largest - comparison.allowed
            for comparison in compare_gguf(folder / "tiny.gguf", checkpoint, GgufTypes("f32"))
        )
        if worst > 0:
            return False, f"a tensor came back {worst:.1e} off"
        session = RUNTIME.open(folder / "tiny.gguf", TARGETS["llama-cpp"], 1)
    except CompressError as error:
        return False, str(error).splitlines()[0]
    ids = some_ids(2, _LENGTH)
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    logits = session.predict({"input_ids": ids.numpy()})["logits"]
    share = _WITH_EXPERTS if hasattr(model.config, "num_experts_per_tok") else 1.0
    off = float(np.quantile(np.abs(logits - expected).max(axis=-1), share) / expected.std())
    greedy = _greedy(session, ids[0, :7].tolist())
    with torch.no_grad():
        expected_tokens = model.generate(
            ids[:1, :7], max_new_tokens=_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    same = greedy == expected_tokens[0, 7:].tolist()
    return off < _ALLOWED and same, f"logits {off:.1e} off{'' if same else ', other tokens'}"


def _greedy(session: LlamaCppSession, prompt: list[int]) -> list[int]:
    decoder = session.decoder()
    logits = [decoder.prefill(prompt)]
    while len(logits) < _TOKENS:
        logits.append(decoder.step(logits[-1]))
    return logits


def _row(name: str, folder: Path) -> dict[str, str]:
    equal, differences = judge(name, folder)
    kind = DECODERS[name][0]
    return {"GGUF": FAMILIES[kind].name if equal and kind in FAMILIES else f"no: {differences}"}


TRIAL = Trial(("GGUF",), _row)
