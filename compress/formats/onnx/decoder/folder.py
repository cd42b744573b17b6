"""From a checkpoint's folder to graphs and the small files that lie beside them, for whoever opens the folder.

transformers.js reads `config.json`, `generation_config.json` and the tokenizer's files; onnxruntime-genai reads
`genai_config.json`, which names the graph, and the tokenizer's files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from compress.checkpoints.checkpoint import Checkpoint
from compress.checkpoints.checks import INDEX
from compress.checkpoints.json_file import read_json
from compress.checkpoints.torch_model import compact
from compress.errors import IntegrityError
from compress.formats.onnx.decoder.fill import GraphSettings, write_graph
from compress.formats.onnx.decoder.parity import Equality, prove_decoder
from compress.formats.onnx.decoder.parts import Part, alone, decoder_part, encoder_part
from compress.formats.onnx.decoder.sections import NotRepeatableError
from compress.formats.onnx.decoder.stored_weight import INTEGERS
from compress.formats.onnx.decoder.trace import Trace, trace_part
from compress.formats.onnx.model import (
    DECODER,
    ENCODER,
    EXTERNAL_DATA_FROM_BYTES,
    FLOAT_GRAPH,
    GENAI_CONFIG,
    GRAPH_FOLDER,
    OnnxModel,
    few_bits_name,
)

_KEPT = ("*.json", "*.txt", "*.jinja", "*.model", "*.spm")
_LEFT_OUT = (INDEX, "config.json", "quantize_config.json", GENAI_CONFIG)
_GENERATION = "generation_config.json"


def companions(checkpoint: Checkpoint, graphs: Mapping[str, onnx.ModelProto]) -> dict[str, bytes]:
    """Name -> content of every file that any client reads beside ``graphs``, which are given by their files' names."""
    names = sorted(path for pattern in _KEPT for path in checkpoint.folder.glob(pattern) if path.name not in _LEFT_OUT)
    files = {path.name: compact(path) for path in names}
    files["config.json"] = _json(_config(checkpoint, graphs))
    return files


def _config(checkpoint: Checkpoint, graphs: Mapping[str, onnx.ModelProto]) -> Mapping[str, Any]:
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    config["dtype"] = "float32"
    outside = {name: True for name, graph in graphs.items() if graph.ByteSize() > EXTERNAL_DATA_FROM_BYTES}
    if outside:
        config["transformers.js_config"] = {"use_external_data_format": outside}
    return config


def _genai_config(checkpoint: Checkpoint, trace: Trace, file_name: str) -> Mapping[str, Any]:
    tokens, config, call = _special_tokens(checkpoint), trace.model.config, trace.calls[0]
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": f"{GRAPH_FOLDER}/{file_name}",
        "head_size": call.size,
        "hidden_size": config.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": call.heads,
        "num_hidden_layers": len(trace.blocks),
        "num_key_value_heads": call.key_value_heads,
    }
    model = {
        "type": config.model_type,
        "context_length": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "decoder": decoder,
        **tokens,
    }
    return {"model": model, "search": _search(checkpoint, config.max_position_embeddings)}


def _special_tokens(checkpoint: Checkpoint) -> dict[str, Any]:
    """What generation_config.json says, else config.json. Without padding the end of the text takes its place."""
    said = checkpoint.config | _generation(checkpoint.folder)
    found = {name: said.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ends = found["eos_token_id"]
    if found["pad_token_id"] is None:
        found["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    return {name: value for name, value in found.items() if value is not None}


def _search(checkpoint: Checkpoint, positions: int) -> dict[str, Any]:
    said = _generation(checkpoint.folder)
    defaults = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
    chosen = {name: default if said.get(name) is None else said[name] for name, default in defaults.items()}
    return {"max_length": positions, "past_present_share_buffer": True, **chosen}


def _generation(folder: Path) -> dict[str, Any]:
    said = read_json(folder / _GENERATION) if (folder / _GENERATION).is_file() else {}
    return {key: value for key, value in said.items() if value is not None}


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Proven:
    """A decoder with its proof; ``unfused``: why its attention is not one operator, or nothing."""

    model: OnnxModel
    equality: Equality
    unfused: str

    @property
    def attention(self) -> str:
        """How it is computed, in words."""
        return f"attention is not fused: {self.unfused}" if self.unfused else "attention is one operator"


def export_proven(
    checkpoint: Checkpoint, settings: GraphSettings, windows: np.ndarray, tolerance: float, rounding_limit: float
) -> Proven:
    """The decoder of a checkpoint, proven on ``windows`` by `prove_decoder`.

    Where the graph with attention in one operator is wrong, the model's own attention is traced instead. Raises
    `ModelError` for what cannot be written, and `IntegrityError` where the plain graph is wrong too.
    """
    model, unfused = _export(checkpoint, settings)
    try:
        return Proven(model, prove_decoder(model, checkpoint, windows, tolerance, rounding_limit), unfused)
    except IntegrityError as error:
        if unfused:
            raise
        model, _ = _export(checkpoint, settings, fused=False)
        equality = prove_decoder(model, checkpoint, windows, tolerance, rounding_limit)
        return Proven(model, equality, error.what)


def export_decoder(checkpoint: Checkpoint, settings: GraphSettings | None = None) -> OnnxModel:
    """The decoder of a float or quantized checkpoint, proven by nothing yet: `prove_decoder` does that.

    Raises `ModelError` for a model that cannot be traced or a weight that cannot be written.
    """
    return _export(checkpoint, settings or GraphSettings())[0]


def export_encoder_decoder(checkpoint: Checkpoint, settings: GraphSettings | None = None) -> OnnxModel:
    """Encoder and decoder of a checkpoint, proven by nothing yet: `prove_encoder_decoder` does that.

    Raises `ModelError` for a model that cannot be traced or a weight that cannot be written.
    """
    graphs = {}
    for name, part in ((ENCODER, encoder_part), (DECODER, decoder_part)):
        _, graph = written(checkpoint, part, settings or GraphSettings())
        graphs[file_name(f"{name}.onnx", graph)] = graph
    (name, encoder), decoder = graphs.items()
    return OnnxModel(encoder, name, companions(checkpoint, graphs), dict([decoder]))


def _export(checkpoint: Checkpoint, settings: GraphSettings, fused: bool | None = None) -> tuple[OnnxModel, str]:
    trace, graph = written(checkpoint, alone, settings, fused)
    name = file_name(FLOAT_GRAPH, graph)
    files = companions(checkpoint, {name: graph})
    sizes = {(call.heads, call.key_value_heads, call.size) for call in trace.calls}
    if len(sizes) == 1 and not trace.keeps_states:
        files[GENAI_CONFIG] = _json(_genai_config(checkpoint, trace, name))
    return OnnxModel(graph, name, files), trace.unfused


def written(
    checkpoint: Checkpoint, part: Callable[[Any], Part], settings: GraphSettings, fused: bool | None = None
) -> tuple[Trace, onnx.ModelProto]:
    """A part of a checkpoint's model, traced and filled with its weights. Raises `ModelError`."""
    trace = trace_part(checkpoint, part, fused)
    try:
        return trace, write_graph(checkpoint, trace, settings)
    except NotRepeatableError:
        trace = trace_part(checkpoint, part, fused, whole=True)
        return trace, write_graph(checkpoint, trace, settings)


def file_name(name: str, graph: onnx.ModelProto) -> str:
    """That of a float graph, or what transformers.js opens for `dtype: "q4"`; the bits of each weight are its own."""
    return few_bits_name(name, 4) if any(INTEGERS in one.name for one in graph.graph.initializer) else name
