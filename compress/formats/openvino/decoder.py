"""Export of a language model as a folder for openvino-genai and optimum-intel, and batched generation with it."""

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
from compress.formats.openvino.conversion import Precision, compress_to_int8, serialize_ir
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
_HINT = "keep more matrices in more bits"

AT_ONCE = 64
"""Texts that are generated together. More gain little speed, and their keys and values take memory."""
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class VerifiedIrDecoder:
    """Exported language model with its comparison, and the reason why its attention is not fused, if any."""

    model: OpenVinoModel
    parity: DecoderParity
    unfused: str

    def __str__(self) -> str:
        attention = f"attention is not fused: {self.unfused}" if self.unfused else "attention is one operator"
        return f"{self.parity}; {attention}"


def write_decoder(
    checkpoint: Checkpoint, precision: Precision, table_bits: int, windows: np.ndarray, tolerance: float
) -> VerifiedIrDecoder:
    """Export a checkpoint's decoder with its integers unchanged and floats in ``precision``, and compare it with torch.

    Answers must be within ``tolerance`` of torch with float weights and fp32 arithmetic. With OpenVINO's default
    settings they must be within a share of the logits' spread.

    Args:
        checkpoint: Language model.
        precision: Type of the float weights.
        table_bits: Bits of float embedding tables in int8.
        windows: Token ids [2, length] to compare on.
        tolerance: Largest accepted difference in fp32.

    Raises:
        ModelError: The model cannot be traced or stored.
        StageError: OpenVINO does not support the model.
        IntegrityError: The answers differ too much.
    """
    companions = {**companions_of(checkpoint)[0], **_tokenizer(checkpoint.folder)}
    expected = torch_logits(checkpoint, windows)

    def verified(graph: OnnxModel, unfused: str) -> VerifiedIrDecoder:
        plain, shipped_files = _converted(graph, precision, table_bits)
        exact_pairs = _answers(plain, windows, expected, exact=True)
        shipped_pairs = _answers(shipped_files, windows, expected, exact=False)
        parity = check_limits(exact_pairs, shipped_pairs, tolerance, _ROUNDING_LIMIT, _HINT)
        return VerifiedIrDecoder(OpenVinoModel(shipped_files, companions), parity, unfused)

    graph, unfused = _export_graph(checkpoint, None)
    try:
        return verified(graph, unfused)
    except IntegrityError:
        if unfused:
            raise
        # The fused operator may compute another attention than the model's. Export it unfused and compare again.
        return verified(*_export_graph(checkpoint, False))


def _export_graph(checkpoint: Checkpoint, fused: bool | None) -> tuple[OnnxModel, str]:
    """Return the graph without operators that only ONNX Runtime has, except attention and few-bit products."""
    trace = trace_part(checkpoint, decoder_with_positions, fused)
    unsupported = "" if trace.unfused else _special_attention(trace)
    if unsupported:
        trace = trace_part(checkpoint, decoder_with_positions, False)
    graph = write_graph(checkpoint, trace, GraphSettings(planes=False))
    return OnnxModel(graph, FLOAT_GRAPH, {}), unsupported or trace.unfused


def _special_attention(trace: Trace) -> str:
    """Return the attention features that OpenVINO's operators lack, as text, or an empty string."""
    sinks = any(node.op_type == _GROUPED and len(node.inputs) > _PLAIN_INPUTS for node in trace.program.graph)
    for call in trace.calls:
        features = {"has sinks": sinks, "caps scores": call.softcap, "has a window": call.window != CAUSAL}
        if names := [name for name, present in features.items() if present]:
            return f"{call.module}: it {' and '.join(names)}"
    return ""


def _converted(graph: OnnxModel, precision: Precision, table_bits: int) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Return the IR with its original float weights, and the IR as it ships; raise `StageError` on failure."""
    with tempfile.TemporaryDirectory() as folder:
        graph.save(Path(folder))
        try:
            model = read_stateful(next(Path(folder).rglob("*.onnx")))
        except RuntimeError as error:
            raise StageError(
                f"OpenVINO cannot read the decoder: {reason(error)}",
                expected="operators that OpenVINO supports",
                hint="ship the model as ONNX or GGUF instead",
            ) from error
        plain = serialize_ir(model, IR_FILE)
        if precision == "fp32":
            return plain, plain
        quantized = compress_to_int8(model, table_bits) if precision == "int8" else model
        return plain, serialize_ir(quantized, IR_FILE, precision == "fp16")


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
            converted = openvino_tokenizers.convert_tokenizer(load_tokenizer(folder), with_detokenizer=True)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
            raise StageError(
                f"openvino-tokenizers cannot convert the tokenizer: {first_line(error)}",
                where=str(folder),
                expected="a tokenizer of transformers that it supports",
                hint="ship the model as ONNX or GGUF instead",
            ) from error
    files: dict[str, bytes] = {}
    for name, model in zip((TOKENIZER, DETOKENIZER), converted, strict=True):
        files |= serialize_ir(model, name)
        files[name] = _renumber_names(files[name])
    return files


def _renumber_names(xml: bytes) -> bytes:
    """Return the XML with the counters in names renumbered, because OpenVINO counts on through the whole process."""
    numbers: dict[bytes, bytes] = {}

    def renamed(match: re.Match[bytes]) -> bytes:
        return numbers.setdefault(match[0], match[1] + b"_%d" % len(numbers))

    return re.sub(rb'names?="[^"]*"', lambda names: re.sub(rb"\b([A-Z]\w*?)_\d+", renamed, names[0]), xml)


class GenaiTexts:
    """`ManyTexts` by continuous batching on the processor (Yu et al. 2022, Orca, section 3.1)."""

    def __init__(
        self, checkpoint: Checkpoint, folder: Path, windows: np.ndarray, threads: int, bf16: bool, ends: Collection[int]
    ) -> None:
        """Export a checkpoint as IR and open it in openvino-genai.

        Args:
            checkpoint: Language model.
            folder: Empty folder for the IR.
            windows: Token ids [2, length] for the comparison with torch.
            threads: Number of threads.
            bf16: Whether to compute in bfloat16.
            ends: Tokens that end a text.

        Raises:
            StageError: OpenVINO does not support the model.
            ModelError: The model cannot be traced or stored.
        """
        import openvino_genai

        write_decoder(checkpoint, "fp32", 8, windows, _TOLERANCE).model.save(folder)
        float_type = "bf16" if bf16 else "f32"
        exact = {**EXACT, KV_CACHE_PRECISION: float_type, "INFERENCE_PRECISION_HINT": float_type}
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
        """Generate continuations; see `compress.formats.generation.decoder.ManyTexts`. Raises `StageError` on failure.

        Args:
            begun: Token ids of each prompt.
            room: Largest number of new tokens.
            temperature: Sampling temperature, or None for greedy decoding.
            seed: Seed of the sampling.
        """
        import openvino
        import openvino_genai

        def chosen(index: int) -> openvino_genai.GenerationConfig:
            config = openvino_genai.GenerationConfig(max_new_tokens=room, apply_chat_template=False)
            config.stop_token_ids = self._ends
            config.do_sample = temperature is not None
            if temperature is not None:
                config.temperature, config.rng_seed = temperature, (seed << 16) + index
            return config

        prompts = [openvino.Tensor(ids[None].astype(np.int64)) for ids in begun]
        try:
            results = self._pipeline.generate(prompts, [chosen(index) for index in range(len(begun))])
        except RuntimeError as error:
            raise StageError(f"openvino-genai failed on a text: {reason(error)}") from error
        return [np.array(result.m_generation_ids[0], np.int64) for result in results]
