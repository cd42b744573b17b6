"""Text generation by openvino-genai, the pipeline in which apps run a language model."""

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
"""On processors with bf16 arithmetic it would compute in that by default, and be a hundredth off."""
EXACT = {KV_CACHE_PRECISION: "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
"""By default keys, values and what is multiplied with integers are rounded to 8 bits."""


class Pipeline:
    """Greedy `openvino_genai.LLMPipeline` that times each generation."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], threads: int) -> None:
        """Compile the model in ``folder`` with ``settings`` of OpenVINO. Raises `RuntimeError`."""
        import openvino_genai

        # Without a scheduler of its own the pipeline caches prefixes, and a prompt that is timed again is not read.
        self.scheduler = openvino_genai.SchedulerConfig()
        self.scheduler.enable_prefix_caching = False
        properties = {**settings, "INFERENCE_NUM_THREADS": threads, "scheduler_config": self.scheduler}
        self._pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", **properties)

    def write(self, ids: Sequence[int], tokens: int) -> Written:
        """Return the likeliest ``tokens`` after ``ids``, whichever of them ends a text."""
        import openvino
        import openvino_genai

        config = openvino_genai.GenerationConfig(
            max_new_tokens=tokens, do_sample=False, apply_chat_template=False, ignore_eos=True
        )
        result = self._pipeline.generate(openvino.Tensor(np.array([ids], np.int64)), config)
        times = result.perf_metrics
        return Written(list(result.tokens[0]), times.get_ttft().mean, times.get_generate_duration().mean)


class Own(Session, Generating, Protocol):
    """What runs the same model without openvino-genai."""


class GenaiSession:
    """A language model whose texts openvino-genai writes; what else it is asked is answered without."""

    inputs, provider = ("input_ids",), "CPU"

    def __init__(
        self, pipeline: Pipeline, vocabulary: int, told: Mapping[str, Any], threads: int, own: Callable[[], Own]
    ) -> None:
        """``told`` are the settings of ``pipeline``, for the record; ``own`` opens the model without it."""
        self.pipeline, self.vocabulary, self._open = pipeline, vocabulary, own
        self.settings: dict[str, Any] = {
            "runtime": f"openvino-genai {genai_version()}, openvino {version('openvino')}",
            "provider": self.provider,
            "intra_op_threads": threads,
            **{name.lower(): value for name, value in told.items()},
        }

    @functools.cached_property
    def own(self) -> Own:
        """The model without openvino-genai."""
        return self._open()

    @property
    def input_types(self) -> Mapping[str, TensorType]:
        """See `Session.input_types`."""
        return self.own.input_types

    @property
    def output_types(self) -> Mapping[str, TensorType]:
        """See `Session.output_types`."""
        return self.own.output_types

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """See `Session.predict`."""
        return self.own.predict(batch)

    def decoder(self) -> GenaiDecoder:
        """Return a greedy decoder."""
        return GenaiDecoder(self)


class GenaiDecoder:
    """Text generation by openvino-genai, and by our own loop where a text comes token by token."""

    cached = True

    def __init__(self, session: GenaiSession) -> None:
        self._session = session
        self.vocabulary = session.vocabulary

    def write(self, ids: Sequence[int], tokens: int) -> Written:
        """See `runtimes.decoder.WritesItself`. Raises `StageError`."""
        try:
            return self._session.pipeline.write(ids, tokens)
        except RuntimeError as error:
            raise StageError(f"openvino-genai failed on a text: {reason(error)}") from error

    def prefill(self, ids: Sequence[int]) -> int:
        """Begin anew with ``ids``, one or more, and give the token that follows."""
        return self._loop.prefill(ids)

    def step(self, token: int) -> int:
        """Append ``token`` and give the one that follows."""
        return self._loop.step(token)

    @functools.cached_property
    def _loop(self) -> GreedyDecoder:
        return self._session.own.decoder()


def opens(graph: Path) -> bool:
    """Whether openvino-genai is there, and the folder of ``graph`` has the tokenizer as IR, which it asks for."""
    return genai_version() is not None and (graph.parent / TOKENIZER).is_file()


def genai_version() -> str | None:
    """That of the package, where it is installed."""
    return version("openvino-genai") if find_spec("openvino_genai") is not None else None


def reason(error: Exception) -> str:
    """OpenVINO's last line, since those before it say where in its source."""
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
