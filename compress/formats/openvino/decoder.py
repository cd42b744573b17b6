"""A checkpoint of a language model as a folder that openvino-genai and optimum-intel open, proven against torch."""

from __future__ import annotations

import importlib.util
import re
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.formats.onnx.decoder.attention_calls import CAUSAL
from compress.formats.onnx.decoder.export import companions_of
from compress.formats.onnx.decoder.insert_weights import write_graph
from compress.formats.onnx.decoder.parity import DecoderParity, Pairs, check_limits, reading_orders, torch_logits
from compress.formats.onnx.decoder.trace import Trace, trace_part
from compress.formats.onnx.decoder.traced_parts import decoder_with_positions
from compress.formats.onnx.decoder.weights import GraphSettings
from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel
from compress.formats.openvino.conversion import Precision, in_eight_bits, written
from compress.formats.openvino.genai import EXACT, KV_CACHE_PRECISION, reason
from compress.formats.openvino.model import DETOKENIZER, IR_FILE, TOKENIZER, OpenVinoModel
from compress.formats.openvino.runtime import open_stateful
from compress.formats.openvino.stateful import read_stateful
from compress.formats.quiet_output import suppress_output
from compress.models.checkpoint import Checkpoint
from compress.models.processor import load_tokenizer
from compress.utils.errors import IntegrityError, MissingExtraError, StageError, first_line

_ROUNDING_LIMIT = 0.2
"""Largest accepted effect of rounded inputs and keys, as a share of the logits' spread."""
_GROUPED, _PLAIN_INPUTS = "GroupQueryAttention", 7
_MEND = "keep more matrices in more bits"

AT_ONCE = 64
"""Texts that are written together; more win little, and their keys and values take memory."""
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class ProvenDecoder:
    """A language model with its proof; ``unfused``: why its attention is not one operator, or nothing."""

    model: OpenVinoModel
    equality: DecoderParity
    unfused: str

    def __str__(self) -> str:
        attention = f"attention is not fused: {self.unfused}" if self.unfused else "attention is one operator"
        return f"{self.equality}; {attention}"


def write_decoder(
    checkpoint: Checkpoint,
    precision: Precision,
    table_bits: int,
    windows: np.ndarray,
    tolerance: float,
    cache: str | None = None,
) -> ProvenDecoder:
    """The decoder of ``checkpoint``: its integers as they are, and what is float in ``precision``.

    ``cache`` is the type of keys and values that the file asks OpenVINO for, by its own name; None leaves it to it.

    Proven on ``windows`` [2, length] of token ids: within ``tolerance`` of torch where weights are exact and arithmetic
    is fp32, and at its default settings within a share of the logits' spread. Raises `ModelError` for what cannot be
    traced or stored, `StageError` where OpenVINO cannot take it, `IntegrityError` for other answers.
    """
    companions = {**companions_of(checkpoint)[0], **_tokenizer(checkpoint.folder)}
    expected = torch_logits(checkpoint, windows)

    def proven(graph: OnnxModel, unfused: str) -> ProvenDecoder:
        plain, made = _converted(graph, precision, table_bits, cache)
        exact = _answers(plain, windows, expected, exact=True)
        shipped = _answers(made, windows, expected, exact=False)
        found = check_limits(exact, shipped, tolerance, _ROUNDING_LIMIT, _MEND)
        return ProvenDecoder(OpenVinoModel(made, companions), found, unfused)

    graph, unfused = _placed(checkpoint, None)
    try:
        return proven(graph, unfused)
    except IntegrityError:
        if unfused:
            raise
        # The operator may not be what the model's attention is.
        return proven(*_placed(checkpoint, False))


def _placed(checkpoint: Checkpoint, fused: bool | None) -> tuple[OnnxModel, str]:
    """Return the graph without operators that only ONNX Runtime has, except attention and few-bit products."""
    trace = trace_part(checkpoint, decoder_with_positions, fused)
    special = "" if trace.unfused else _special_attention(trace)
    if special:
        trace = trace_part(checkpoint, decoder_with_positions, False)
    graph = write_graph(checkpoint, trace, GraphSettings(planes=False))
    return OnnxModel(graph, FLOAT_GRAPH, {}), special or trace.unfused


def _special_attention(trace: Trace) -> str:
    """Return the attention features that OpenVINO's operators lack, as text, or an empty string."""
    sinks = any(node.op_type == _GROUPED and len(node.inputs) > _PLAIN_INPUTS for node in trace.program.graph)
    found = ((call.module, sinks, call.softcap, call.window != CAUSAL) for call in trace.calls)
    for module, *special in found:
        names = [name for name, so in zip(("has sinks", "caps scores", "has a window"), special, strict=True) if so]
        if names:
            return f"{module}: it {' and '.join(names)}"
    return ""


def _converted(
    graph: OnnxModel, precision: Precision, table_bits: int, cache: str | None
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Return the IR with its original float weights, and the IR as it ships; raise `StageError` on failure."""
    with tempfile.TemporaryDirectory() as folder:
        graph.save(Path(folder))
        try:
            model = read_stateful(next(Path(folder).rglob("*.onnx")))
        except RuntimeError as error:
            raise StageError(
                f"OpenVINO cannot read the decoder: {str(error).strip().splitlines()[-1]}",
                expected="operators that OpenVINO knows",
                hint="ship the model as ONNX or GGUF instead",
            ) from error
        plain = written(model, IR_FILE)
        if precision == "fp32" and cache is None:
            return plain, plain
        made = in_eight_bits(model, table_bits) if precision == "int8" else model
        if cache is not None:
            made.set_rt_info(cache, ["runtime_options", KV_CACHE_PRECISION])
        return plain, written(made, IR_FILE, precision == "fp16")


def _answers(files: dict[str, bytes], windows: np.ndarray, expected: np.ndarray, exact: bool) -> Pairs:
    with tempfile.TemporaryDirectory() as folder:
        OpenVinoModel(files, {}).save(Path(folder))
        yield from reading_orders(open_stateful(Path(folder) / IR_FILE, 1, exact), windows, expected)


def _tokenizer(folder: Path) -> dict[str, bytes]:
    """Return the IR of the tokenizer and detokenizer; raise `StageError` for an unsupported tokenizer."""
    if importlib.util.find_spec("openvino_tokenizers") is None:
        raise MissingExtraError("openvino-tokenizers", "openvino", "A language model in OpenVINO's format")
    with suppress_output("prints"):
        import openvino_tokenizers

        try:
            found = openvino_tokenizers.convert_tokenizer(load_tokenizer(folder), with_detokenizer=True)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
            raise StageError(
                f"openvino-tokenizers cannot follow the tokenizer: {first_line(error)}",
                where=str(folder),
                expected="a tokenizer of transformers that it knows",
                hint="ship the model as ONNX or GGUF instead",
            ) from error
    tokenizer, detokenizer = found
    files = {**written(tokenizer, TOKENIZER), **written(detokenizer, DETOKENIZER)}
    return {name: _counted_anew(data) if name in (TOKENIZER, DETOKENIZER) else data for name, data in files.items()}


def _counted_anew(xml: bytes) -> bytes:
    """Return the XML with the counters in names renumbered, because OpenVINO counts on through the whole process."""
    numbers: dict[bytes, bytes] = {}

    def renamed(match: re.Match[bytes]) -> bytes:
        return numbers.setdefault(match[0], match[1] + b"_%d" % len(numbers))

    return re.sub(rb'names?="[^"]*"', lambda names: re.sub(rb"\b([A-Z]\w*?)_\d+", renamed, names[0]), xml)


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
