"""A language model that writes many texts by openvino-genai: as one ends another takes its place."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from compress.formats.openvino.decoder import write_decoder
from compress.formats.openvino.genai import EXACT, KV_CACHE_PRECISION, reason
from compress.models.checkpoint import Checkpoint
from compress.utils.errors import StageError

AT_ONCE = 64
"""Texts that are written together; more win little, and their keys and values take memory."""
_TOLERANCE = 1e-2


class GenaiTexts:
    """`ManyTexts` by continuous batching (Yu et al. 2022, Orca, section 3.1), on the processor."""

    def __init__(
        self, checkpoint: Checkpoint, folder: Path, windows: np.ndarray, threads: int, bf16: bool, ends: Collection[int]
    ) -> None:
        """Write ``checkpoint`` into ``folder`` as IR, proven on ``windows`` [2, length] of ids, and open it.

        A text ends with one of ``ends``. Raises `StageError` for a model that OpenVINO doesn't run, and `ModelError`.
        """
        import openvino_genai

        write_decoder(checkpoint, "fp32", 8, windows, _TOLERANCE).model.save(folder)
        kind = "bf16" if bf16 else "f32"
        exact = {**EXACT, KV_CACHE_PRECISION: kind, "INFERENCE_PRECISION_HINT": kind}
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs, scheduler.enable_prefix_caching = AT_ONCE, False
        try:
            self._pipeline = openvino_genai.ContinuousBatchingPipeline(
                str(folder), scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads, **exact}
            )
        except RuntimeError as error:
            raise StageError(f"openvino-genai cannot open the model: {reason(error)}") from error
        self._ends = set(ends)

    def write(self, begun: Sequence[np.ndarray], room: int, temperature: float | None, seed: int) -> list[np.ndarray]:
        """See `runtimes.decoder.ManyTexts`. Raises `StageError`."""
        import openvino
        import openvino_genai

        def chosen(place: int) -> openvino_genai.GenerationConfig:
            config = openvino_genai.GenerationConfig(max_new_tokens=room, apply_chat_template=False)
            config.stop_token_ids = self._ends
            config.do_sample = temperature is not None
            if temperature is not None:
                config.temperature, config.rng_seed = temperature, (seed << 16) + place
            return config

        given = [openvino.Tensor(ids[None].astype(np.int64)) for ids in begun]
        try:
            found = self._pipeline.generate(given, [chosen(place) for place in range(len(begun))])
        except RuntimeError as error:
            raise StageError(f"openvino-genai failed on a text: {reason(error)}") from error
        return [np.array(one.m_generation_ids[0], np.int64) for one in found]
