"""openvino-genai: a language model, with a draft or without, in the pipeline in which apps run it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from compress.errors import StageError
from compress.formats.openvino.model import DRAFT_FOLDER, TOKENIZER
from compress.formats.pair import WRITTEN, beginnings, told
from compress.runtimes.decoder import Generating, GreedyDecoder, Written
from compress.runtimes.runtime import Batch, Session, TensorType

if TYPE_CHECKING:
    from compress.stage.stage import Context

KV_CACHE_PRECISION = "KV_CACHE_PRECISION"
SETTINGS = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
"""On processors with bf16 arithmetic it would compute in that by default, and be a hundredth off."""
EXACT = {KV_CACHE_PRECISION: "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
"""By default keys, values and what is multiplied with integers are rounded to 8 bits."""
AHEAD, AHEAD_OF_HEAD = 5, 2
"""Tokens that a draft writes for a reading of the model, and that a draft head does, which is right more seldom."""
DRAFTING = {"PERFORMANCE_HINT": "LATENCY", KV_CACHE_PRECISION: "u8"}
"""Of a draft: in bf16 where the processor is faster so. What that rounds costs acceptance, and never a token."""


class Pipeline:
    """openvino-genai's own, greedy, whose draft writes `ahead` tokens at a time, or finds them in the text so far."""

    def __init__(
        self,
        folder: Path,
        draft: Path | None,
        settings: Mapping[str, Any],
        threads: int,
        ahead: int = AHEAD,
        lookup: int = 0,
    ) -> None:
        """``settings`` are those that the model is compiled by; ``draft`` is a folder. Raises `RuntimeError`.

        Without a draft what stood behind the last ``lookup`` tokens, where the text had them before, may stand for one
        (prompt lookup).
        """
        import openvino_genai

        own = {"INFERENCE_NUM_THREADS": threads}
        beside: dict[str, Any] = {}
        if draft is not None:
            beside["draft_model"] = openvino_genai.draft_model(str(draft), "CPU", **DRAFTING, **own)
        # Without one of its own a pipeline keeps what it has read, and reads a prompt that it is timed by only once.
        self.scheduler = openvino_genai.SchedulerConfig()
        self.scheduler.enable_prefix_caching = False
        beside |= {"prompt_lookup": True} if lookup else {}
        named = {**settings, **own, **beside, "scheduler_config": self.scheduler}
        self._pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", **named)
        self.ahead = ahead if draft is not None or lookup else None
        self._lookup = lookup

    def write(self, ids: Sequence[int], tokens: int, ends: bool = False) -> Written:
        """The likeliest ``tokens`` behind ``ids``; fewer if one ``ends`` the text by the model's own settings."""
        import openvino
        import openvino_genai

        chosen = openvino_genai.GenerationConfig(max_new_tokens=tokens, do_sample=False, apply_chat_template=False)
        if ends:
            chosen.eos_token_id = self._pipeline.get_tokenizer().get_eos_token_id()
        else:
            chosen.ignore_eos = True
        if self.ahead is not None:
            chosen.num_assistant_tokens, chosen.max_ngram_size = self.ahead, self._lookup
        found = self._pipeline.generate(openvino.Tensor(np.array([ids], np.int64)), chosen)
        times, draft, written = found.perf_metrics, found.extended_perf_metrics, list(found.tokens[0])
        counts = (0, len(written) - len(times.raw_metrics.m_batch_sizes))
        if draft is not None:
            counts = draft.get_num_draft_tokens(), draft.get_num_accepted_tokens()
        return Written(written, times.get_ttft().mean, times.get_generate_duration().mean, *counts)


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
            **({} if pipeline.ahead is None else {"draft": DRAFT_FOLDER, "drafted_tokens": pipeline.ahead}),
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
        """Greedy generation, by speculation where a draft lies beside the file."""
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


def prove_in_genai(folder: Path, threads: int, context: Context) -> str:
    """Go on with a few texts, by the model and by the pair in ``folder``, and say what `formats.pair.prove_pair` does.

    Raises `StageError` where openvino-genai cannot open the pair.
    """
    try:
        alone = Pipeline(folder, None, SETTINGS, threads)
        pair = Pipeline(folder, folder / DRAFT_FOLDER, SETTINGS, threads, AHEAD_OF_HEAD)
        begun, both = beginnings(folder, context), []
        for ids in context.progress.track(begun, "the pair writes", len(begun)):
            both.append((alone.write(ids, WRITTEN), pair.write(ids, WRITTEN)))
    except RuntimeError as error:
        raise StageError(f"openvino-genai cannot run the pair: {reason(error)}", where="draft_of") from error
    same = sum(one.tokens == other.tokens for one, other in both)
    drafted, accepted = sum(one.drafted for _, one in both), sum(one.accepted for _, one in both)
    return told(len(begun), same, drafted, accepted, len(begun) * (WRITTEN - 1) - accepted)


def opens(graph: Path) -> bool:
    """Whether openvino-genai is there, and the folder of ``graph`` has the tokenizer as IR, which it asks for."""
    return genai_version() is not None and (graph.parent / TOKENIZER).is_file()


def genai_version() -> str | None:
    """That of the package, where it is installed."""
    return version("openvino-genai") if find_spec("openvino_genai") is not None else None


def reason(error: Exception) -> str:
    """OpenVINO's last line, since those before it say where in its source."""
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
