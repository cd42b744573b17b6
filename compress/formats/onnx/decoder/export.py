"""Export of a checkpoint's folder as graphs and the small files that clients of the folder read.

transformers.js reads `config.json`, `generation_config.json` and the tokenizer's files. onnxruntime-genai reads
`genai_config.json`, which names the graph, and the tokenizer's files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from compress.formats.onnx.decoder.graph_builder import GraphBuilder
from compress.formats.onnx.decoder.insert_weights import write_graph
from compress.formats.onnx.decoder.parity import DecoderParity, verify_decoder
from compress.formats.onnx.decoder.stored_weight import INTEGERS
from compress.formats.onnx.decoder.trace import Trace, trace_part
from compress.formats.onnx.decoder.traced_parts import (
    BATCH,
    EMBEDS,
    IDS,
    MASK,
    TracedPart,
    decoder_of_embeddings,
    decoder_of_pair,
    decoder_only,
    encoder_of_pair,
    export_vision_encoder,
)
from compress.formats.onnx.decoder.weights import GraphSettings, Weights
from compress.formats.onnx.model import (
    DECODER,
    EMBED_TOKENS,
    ENCODER,
    EXTERNAL_DATA_FROM_BYTES,
    FLOAT_GRAPH,
    GENAI_CONFIG,
    GRAPH_FOLDER,
    VISION,
    OnnxModel,
    weight_only_name,
)
from compress.models.checkpoint import Checkpoint
from compress.models.folder_checks import INDEX
from compress.models.json_file import read_json
from compress.models.meta_model import build_on_meta
from compress.models.model import minified_content
from compress.tasks.task import Examples
from compress.utils.errors import IntegrityError

_COMPANION_PATTERNS = ("*.json", "*.txt", "*.jinja", "*.model", "*.spm")
_EXCLUDED_COMPANIONS = (INDEX, "config.json", "quantize_config.json", GENAI_CONFIG)
_GENERATION = "generation_config.json"


def _model(checkpoint: Checkpoint, parts: Mapping[str, onnx.ModelProto]) -> OnnxModel:
    """Return the graphs with names that follow from their ``parts``, and every file that a client reads."""
    # That of a float graph, or what transformers.js opens for `dtype: "q4"`; the bits of each weight are its own.
    graphs = {
        weight_only_name(name, 4) if any(INTEGERS in tensor.name for tensor in graph.graph.initializer) else name: graph
        for name, graph in ((f"{part}.onnx", graph) for part, graph in parts.items())
    }
    files, config = companions_of(checkpoint)
    outside = {name: True for name, graph in graphs.items() if graph.ByteSize() > EXTERNAL_DATA_FROM_BYTES}
    if outside:
        config["transformers.js_config"] = {"use_external_data_format": outside}
    (name, first), *others = graphs.items()
    return OnnxModel(first, name, {**files, "config.json": _json(config)}, dict(others))


def companions_of(checkpoint: Checkpoint) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return the small files beside a checkpoint's weights, by name, and the config of a graph made from it."""
    paths = (path for pattern in _COMPANION_PATTERNS for path in checkpoint.folder.glob(pattern))
    names = sorted(path for path in paths if path.name not in _EXCLUDED_COMPANIONS)
    # The graph holds its own quantization; the config would make transformers look for another.
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    config["dtype"] = "float32"
    files = {path.name: minified_content(path) for path in names}
    return {**files, "config.json": _json(config)}, config


def _genai_config(checkpoint: Checkpoint, trace: Trace, file_name: str) -> Mapping[str, Any]:
    """Return onnxruntime-genai's config. A missing padding token is replaced by the end of the text."""
    config, call, path = trace.model.config, trace.calls[0], checkpoint.folder / _GENERATION
    generation = {key: value for key, value in (read_json(path) if path.is_file() else {}).items() if value is not None}
    token_settings = checkpoint.config | generation
    tokens = {name: token_settings.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # onnxruntime-genai requires a padding token.
    if tokens["pad_token_id"] is None:
        ends = tokens["eos_token_id"]
        tokens["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    kinds = ("key", "value")
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": f"{GRAPH_FOLDER}/{file_name}",
        "head_size": call.size,
        "hidden_size": config.hidden_size,
        "inputs": {IDS: IDS, MASK: MASK, **{f"past_{kind}_names": f"past_key_values.%d.{kind}" for kind in kinds}},
        "outputs": {"logits": "logits", **{f"present_{kind}_names": f"present.%d.{kind}" for kind in kinds}},
        "num_attention_heads": call.heads,
        "num_hidden_layers": len(trace.blocks),
        "num_key_value_heads": call.key_value_heads,
    }
    model = {
        "type": config.model_type,
        "context_length": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "decoder": decoder,
        **{name: value for name, value in tokens.items() if value is not None},
    }
    defaults = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
    chosen = {name: generation.get(name, default) for name, default in defaults.items()}
    search = {"max_length": config.max_position_embeddings, "past_present_share_buffer": True, **chosen}
    return {"model": model, "search": search}


def _json(content: Mapping[str, object]) -> bytes:
    """Return compact JSON."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


@dataclass(frozen=True)
class VerifiedDecoder:
    """A decoder and its comparison with torch; ``unfused`` is why its attention is not one operator, or ""."""

    model: OnnxModel
    equality: DecoderParity
    unfused: str

    @property
    def attention(self) -> str:
        """Description of the attention for messages."""
        return f"attention is not fused: {self.unfused}" if self.unfused else "attention is one operator"


def export_verified_decoder(
    checkpoint: Checkpoint, settings: GraphSettings, sequences: np.ndarray, tolerance: float, rounding_limit: float
) -> VerifiedDecoder:
    """Export the decoder of a checkpoint and compare it with torch by `verify_decoder`.

    If the graph with fused attention is wrong, the model's own attention is traced instead.

    Args:
        checkpoint: The checkpoint.
        settings: Settings of the graph.
        sequences: Token ids [2 or more, length].
        tolerance: Largest accepted difference of a logit, computed in fp32.
        rounding_limit: Largest accepted effect of 8-bit activations.

    Raises:
        ModelError: The model cannot be exported.
        IntegrityError: The graph without fused attention is wrong too.
    """
    model, unfused = _export(checkpoint, settings)
    try:
        return VerifiedDecoder(model, verify_decoder(model, checkpoint, sequences, tolerance, rounding_limit), unfused)
    # The operator may differ from the model in a way that the dry run cannot detect.
    except IntegrityError as error:
        if unfused:
            raise
        model, _ = _export(checkpoint, settings, fused=False)
        equality = verify_decoder(model, checkpoint, sequences, tolerance, rounding_limit)
        return VerifiedDecoder(model, equality, error.what)


def export_decoder(checkpoint: Checkpoint, settings: GraphSettings | None = None) -> OnnxModel:
    """Export the decoder of a float or quantized checkpoint without a comparison; `verify_decoder` compares it.

    Raises `ModelError` for a model that cannot be traced or a weight that cannot be written.
    """
    return _export(checkpoint, settings or GraphSettings())[0]


def export_encoder_decoder(checkpoint: Checkpoint, settings: GraphSettings | None = None) -> OnnxModel:
    """Export encoder and decoder of a checkpoint without a comparison; `verify_encoder_decoder` compares them.

    Raises `ModelError` for a model that cannot be traced or a weight that cannot be written.
    """
    # Both are traced from the same checkpoint, with its tied weights stored in each.
    parts = {ENCODER: encoder_of_pair, DECODER: decoder_of_pair}
    return _model(
        checkpoint, {name: _written(checkpoint, part, settings or GraphSettings())[1] for name, part in parts.items()}
    )


def _export(checkpoint: Checkpoint, settings: GraphSettings, fused: bool | None = None) -> tuple[OnnxModel, str]:
    """Return the decoder of a checkpoint, and why its attention is not one operator."""
    trace, graph = _written(checkpoint, decoder_only, settings, fused)
    model = _model(checkpoint, {FLOAT_GRAPH.removesuffix(".onnx"): graph})
    sizes = {(call.heads, call.key_value_heads, call.size) for call in trace.calls}
    # onnxruntime-genai supports one head size for all layers and no states.
    if len(sizes) == 1 and not trace.keeps_states:
        config = _json(_genai_config(checkpoint, trace, model.file_name))
        model = replace(model, companions={**model.companions, GENAI_CONFIG: config})
    return model, trace.unfused


def _written(
    checkpoint: Checkpoint, part: Callable[[Any], TracedPart], settings: GraphSettings, fused: bool | None = None
) -> tuple[Trace, onnx.ModelProto]:
    """Return the trace and the graph of one part."""
    trace = trace_part(checkpoint, part, fused)
    return trace, write_graph(checkpoint, trace, settings)


@dataclass(frozen=True)
class ImageReaderExport:
    """Three graphs; ``difference`` is that of image features from torch; ``unfused``: why attention is no operator."""

    model: OnnxModel
    difference: float
    unfused: str


def export_image_reader(
    checkpoint: Checkpoint, examples: Examples, settings: GraphSettings, tolerance: float
) -> ImageReaderExport:
    """Export the graphs of a vision-language model; `verify_image_reader` compares the whole.

    Args:
        checkpoint: The checkpoint.
        examples: Examples whose pixels the vision encoder is compared on.
        settings: Settings of the decoder's graph.
        tolerance: Largest accepted difference of an image feature.

    Raises:
        ModelError: The model cannot be traced.
        IntegrityError: Image features differ.
    """
    vision, difference = export_vision_encoder(checkpoint, examples, tolerance)
    trace, decoder = _written(checkpoint, decoder_of_embeddings, settings)
    parts = {VISION: vision.graph, EMBED_TOKENS: _table(checkpoint, settings), DECODER: decoder}
    model = _model(checkpoint, parts)
    return ImageReaderExport(model, difference, trace.unfused or vision.unfused)


def _table(checkpoint: Checkpoint, settings: GraphSettings) -> onnx.ModelProto:
    """Return the graph that embeds `input_ids`, with the scale that the embedding's class applies."""
    model = build_on_meta(checkpoint.folder)
    table = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is table)
    nodes = GraphBuilder()
    ids = nodes.input(IDS, ir.DataType.INT64, [BATCH, "sequence_length"])
    rows = Weights(checkpoint, nodes, settings).look_up(name, ids)
    scale = getattr(table, "scalar_embed_scale", getattr(table, "embed_scale", None))
    if scale is not None:
        rows = nodes.op("Mul", name, [rows, nodes.constant(f"{name}.scale", np.array(float(scale), np.float32))])
    nodes.output(rows, EMBEDS, ir.DataType.FLOAT, [BATCH, "sequence_length", table.embedding_dim])
    return ir.to_proto(nodes.model(type(table).__name__))
