"""Text generation with openvino-genai, the pipeline that runs a language model in apps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from compress.formats.generation.decoder import Generating, GreedyDecoder, Written
from compress.formats.openvino.model import TOKENIZER
from compress.formats.runtime import Batch, Session, TensorType
from compress.utils.errors import StageError

KV_CACHE_PRECISION = "KV_CACHE_PRECISION"
SETTINGS = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
"""Default settings.

Without the precision hint, processors with bf16 arithmetic compute in bf16, with errors of about 1%.
"""
EXACT = {KV_CACHE_PRECISION: "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
"""Settings without 8-bit rounding of keys, values and the inputs of integer products, which are the defaults."""


class Pipeline:
    """Greedy `openvino_genai.LLMPipeline` that measures each generation."""

    def __init__(self, folder: Path, settings: Mapping[str, object], threads: int) -> None:
        """Compile the model in ``folder`` with OpenVINO ``settings``; raise `RuntimeError` on failure."""
        import openvino_genai

        # Without a scheduler the pipeline caches prefixes, and would not read a prompt that is timed again.
        self.scheduler = openvino_genai.SchedulerConfig()
        self.scheduler.enable_prefix_caching = False
        properties = {**settings, "INFERENCE_NUM_THREADS": threads, "scheduler_config": self.scheduler}
        self._pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", **properties)

    def write(self, ids: Sequence[int], tokens: int) -> Written:
        """Return the most likely ``tokens`` after ``ids``, ignoring tokens that end a text."""
        import openvino
        import openvino_genai

        config = openvino_genai.GenerationConfig(
            max_new_tokens=tokens, do_sample=False, apply_chat_template=False, ignore_eos=True
        )
        result = self._pipeline.generate(openvino.Tensor(np.array([ids], np.int64)), config)
        # The pipeline itself measures the times.
        times = result.perf_metrics
        return Written(list(result.tokens[0]), times.get_ttft().mean, times.get_generate_duration().mean)


class DirectSession(Session, Generating, Protocol):
    """Session of the same model without openvino-genai."""


class GenaiSession:
    """Language model that generates with openvino-genai; other calls run without it."""

    inputs, provider = ("input_ids",), "CPU"

    def __init__(
        self,
        pipeline: Pipeline,
        vocabulary: int,
        told: Mapping[str, object],
        threads: int,
        own: Callable[[], DirectSession],
    ) -> None:
        """Store the pipeline and the way to open the model without it.

        Args:
            pipeline: Compiled pipeline.
            vocabulary: Number of tokens.
            told: Settings of ``pipeline``, for the report.
            threads: Number of threads.
            own: Function that opens the model without openvino-genai.
        """
        self.pipeline, self.vocabulary, self._open = pipeline, vocabulary, own
        self.settings: dict[str, Any] = {
            "runtime": f"openvino-genai {genai_version()}, openvino {version('openvino')}",
            "provider": self.provider,
            "intra_op_threads": threads,
            **{name.lower(): value for name, value in told.items()},
        }

    @functools.cached_property
    def direct(self) -> DirectSession:
        """Session of the model without openvino-genai."""
        return self._open()

    @property
    def input_types(self) -> Mapping[str, TensorType]:
        """See `Session.input_types`."""
        return self.direct.input_types

    @property
    def output_types(self) -> Mapping[str, TensorType]:
        """See `Session.output_types`."""
        return self.direct.output_types

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """See `Session.predict`."""
        return self.direct.predict(batch)

    def decoder(self) -> GenaiDecoder:
        """Return a greedy decoder."""
        return GenaiDecoder(self)


class GenaiDecoder:
    """Greedy decoder: openvino-genai generates whole texts, and our own loop generates token by token."""

    cached = True

    def __init__(self, session: GenaiSession) -> None:
        self._session = session
        self.vocabulary = session.vocabulary

    def write(self, ids: Sequence[int], tokens: int) -> Written:
        """Generate a text; see `compress.formats.generation.decoder.WritesItself`. Raises `StageError` on failure."""
        try:
            return self._session.pipeline.write(ids, tokens)
        except RuntimeError as error:
            raise StageError(f"openvino-genai failed on a text: {reason(error)}") from error

    def prefill(self, ids: Sequence[int]) -> int:
        """Start a new text with one or more ``ids`` and return the next token."""
        return self._loop.prefill(ids)

    def step(self, token: int) -> int:
        """Append ``token`` and return the next token."""
        return self._loop.step(token)

    @functools.cached_property
    def _loop(self) -> GreedyDecoder:
        return self._session.direct.decoder()


def genai_can_open(graph: Path) -> bool:
    """Return whether openvino-genai is installed and finds the tokenizer as IR beside ``graph``."""
    return genai_version() is not None and (graph.parent / TOKENIZER).is_file()


def genai_version() -> str | None:
    """Return the version of openvino-genai, or None if it is not installed."""
    return version("openvino-genai") if find_spec("openvino_genai") is not None else None


def reason(error: Exception) -> str:
    """Return the last line of OpenVINO's message; the lines before it locate the error in OpenVINO's source."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
