"""openvino-genai: a language model and its draft in the pipeline in which apps run them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from compress.formats.openvino.model import TOKENIZER
from compress.runtimes.decoder import Written

KV_CACHE_PRECISION = "KV_CACHE_PRECISION"
AHEAD = 5
"""Tokens that a draft writes for a reading of the model."""
DRAFTING = {"PERFORMANCE_HINT": "LATENCY", KV_CACHE_PRECISION: "u8"}
"""Of a draft: in bf16 where the processor is faster so. What that rounds costs acceptance, and never a token."""


class Pipeline:
    """openvino-genai's own, greedy, whose draft writes `ahead` tokens at a time."""

    def __init__(
        self, folder: Path, draft: Path | None, settings: Mapping[str, Any], threads: int, ahead: int = AHEAD
    ) -> None:
        """``settings`` are those that the model is compiled by; ``draft`` is a folder. Raises `RuntimeError`."""
        import openvino_genai

        own = {"INFERENCE_NUM_THREADS": threads}
        beside: dict[str, Any] = {}
        if draft is not None:
            beside["draft_model"] = openvino_genai.draft_model(str(draft), "CPU", **DRAFTING, **own)
        paged = openvino_genai.SchedulerConfig()
        self._pipeline = openvino_genai.LLMPipeline(
            str(folder), "CPU", scheduler_config=paged, **{**settings, **own, **beside}
        )
        self._ahead = ahead if draft is not None else None

    def write(self, ids: Sequence[int], tokens: int, ends: bool = False) -> Written:
        """The likeliest ``tokens`` behind ``ids``; fewer if one ``ends`` the text by the model's own settings."""
        import openvino
        import openvino_genai

        chosen = openvino_genai.GenerationConfig(max_new_tokens=tokens, do_sample=False, apply_chat_template=False)
        if ends:
            chosen.eos_token_id = self._pipeline.get_tokenizer().get_eos_token_id()
        else:
            chosen.ignore_eos = True
        if self._ahead is not None:
            chosen.num_assistant_tokens = self._ahead
        found = self._pipeline.generate(openvino.Tensor(np.array([ids], np.int64)), chosen)
        times, draft = found.perf_metrics, None if self._ahead is None else found.extended_perf_metrics
        counts = (0, 0) if draft is None else (draft.get_num_draft_tokens(), draft.get_num_accepted_tokens())
        return Written(list(found.tokens[0]), times.get_ttft().mean, times.get_generate_duration().mean, *counts)


def opens(graph: Path) -> bool:
    """Whether openvino-genai is there, and the folder of ``graph`` has the tokenizer as IR, which it asks for."""
    return find_spec("openvino_genai") is not None and (graph.parent / TOKENIZER).is_file()
