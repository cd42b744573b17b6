"""Test whether llama.cpp has the same outputs as transformers for decoders exported to GGUF.

Each decoder is exported in 32 bits. The logits at every position of two texts and 24 greedy tokens are compared.
llama.cpp stores keys and values in float16, and aborts the process on models that it does not support.
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
_TOLERANCE = 1e-2
"""Largest difference, relative to the standard deviation of transformers' logits."""
_QUANTILE_WITH_EXPERTS = 0.9
"""Share of positions compared for mixtures of experts, since rounded keys change the routing of some tokens."""


def judge(name: str, folder: Path) -> tuple[bool, str]:
    """Return whether llama.cpp's outputs equal those of transformers, and the differences or the failure."""
    model = save(name, folder)
    try:
        checkpoint = Checkpoint(folder)
        write_gguf(checkpoint, folder / "tiny.gguf", GgufTypes("f32"))
        worst = max(
            comparison.largest - comparison.allowed
            for comparison in compare_gguf(folder / "tiny.gguf", checkpoint, GgufTypes("f32"))
        )
        if worst > 0:
            return False, f"a tensor differs by {worst:.1e} after export"
        session = RUNTIME.open(folder / "tiny.gguf", TARGETS["llama-cpp"], 1)
    except CompressError as error:
        return False, str(error).splitlines()[0]
    ids = some_ids(2, _LENGTH)
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    logits = session.predict({"input_ids": ids.numpy()})["logits"]
    quantile = _QUANTILE_WITH_EXPERTS if hasattr(model.config, "num_experts_per_tok") else 1.0
    difference = float(np.quantile(np.abs(logits - expected).max(axis=-1), quantile) / expected.std())
    greedy = _greedy(session, ids[0, :7].tolist())
    with torch.no_grad():
        expected_tokens = model.generate(
            ids[:1, :7], max_new_tokens=_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    same = greedy == expected_tokens[0, 7:].tolist()
    return difference < _TOLERANCE and same, f"logits differ by {difference:.1e}{'' if same else ', different tokens'}"


def _greedy(session: LlamaCppSession, prompt: list[int]) -> list[int]:
    decoder = session.decoder()
    tokens = [decoder.prefill(prompt)]
    while len(tokens) < _TOKENS:
        tokens.append(decoder.step(tokens[-1]))
    return tokens


def _row(name: str, folder: Path) -> dict[str, str]:
    equal, differences = judge(name, folder)
    kind = DECODERS[name][0]
    return {"GGUF": FAMILIES[kind].name if equal and kind in FAMILIES else f"no: {differences}"}


TRIAL = Trial(("GGUF",), _row)
