"""Encoders and image models of many families, tiny and random: exported, attention fused, INT8, and how fast.

    python benchmarks/encoders.py                          # a table of all families, about half an hour on one core
    python benchmarks/encoders.py mpnet swin               # some of them
    python benchmarks/encoders.py --timed bert mpnet t5    # INT8 against the plain fp32 graph at a realistic width
    python benchmarks/encoders.py --output encoders.json   # everything as JSON too

A row says: the largest difference from torch on padded batches of several lengths; attention operators, and attention
layers of the model; error of INT8 (dynamic for texts, static for images) as a share of the logits' spread over
examples; bytes of INT8 over fp32. Nothing is downloaded.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

VOCABULARY, POSITIONS, CLASSES, PIXELS = 300, 128, 5, 64
_TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_REAL = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
_PATCHES = {"image_size": PIXELS, "patch_size": 16}
_BEIT = {"use_relative_position_bias": True, "use_mean_pooling": True}
_STAGES = {"hidden_sizes": [32, 64, 64, 128], "depths": [1, 1, 1, 1]}
_PYRAMID = {"num_attention_heads": [1, 2, 2, 4], "sr_ratios": [4, 2, 2, 1]}
_WINDOWS = {"patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 8}

TEXTS: dict[str, dict[str, Any]] = {
    "bert": {},
    "distilbert": {"_names": {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}},
    "roberta": {},
    "electra": {"embedding_size": 64},
    "albert": {"embedding_size": 32},
    "camembert": {},
    "xlm-roberta": {},
    "ernie": {},
    "layoutlm": {},
    "data2vec-text": {},
    "roberta-prelayernorm": {},
    "megatron-bert": {},
    "mpnet": {},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
    "deberta-v2": {
        **{"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"], "share_att_key": True},
        **{"norm_rel_ebd": "layer_norm", "position_biased_input": False},
    },
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2},
    "nomic_bert": {},
    "eurobert": {"num_key_value_heads": 2},
    "gte": {},
    "jina_embeddings_v3": {},
    "esm": {"position_embedding_type": "rotary", "token_dropout": False, "mask_token_id": 4},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 16, "use_bidirectional_attention": True, "sliding_window": 8},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "t5": {
        "d_kv": 16,
        "decoder_start_token_id": 0,
        "_names": {"hidden_size": "d_model", "num_hidden_layers": "num_layers"},
    },
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 64},
    "convbert": {"embedding_size": 64},
    "roformer": {"embedding_size": 64},
    "squeezebert": {"embedding_size": 64, "q_groups": 1, "k_groups": 1, "v_groups": 1},
    "xlnet": {"d_head": 16, "_names": {"hidden_size": "d_model", "num_hidden_layers": "n_layer"}},
    "mobilebert": {"intra_bottleneck_size": 32, "embedding_size": 32, "true_hidden_size": 32},
}
MORE_TEXTS: dict[str, dict[str, Any]] = {
    "funnel": {"_own_shape": True, "block_sizes": [1, 1], "d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 128},
    "bart": {
        **{"_own_shape": True},
        **{"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4},
        **{"decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128},
    },
    "xlm": {"_own_shape": True, "emb_dim": 64, "n_layers": 2, "n_heads": 4},
    "fnet": {},
}
"""Beside the thirty: attention over pooled queries, a decoder that reads its encoder, an old interface, none at all."""
IMAGES: dict[str, dict[str, Any]] = {
    "vit": {**_TINY, **_PATCHES},
    "deit": {**_TINY, **_PATCHES},
    "beit": {**_TINY, **_PATCHES, **_BEIT},
    "data2vec-vision": {**_TINY, **_PATCHES, **_BEIT},
    "dinov2": {**_TINY, **_PATCHES},
    "dinov2_with_registers": {**_TINY, **_PATCHES},
    "vit_msn": {**_TINY, **_PATCHES},
    "ijepa": {**_TINY, **_PATCHES},
    "siglip": {"vision_config": {**_TINY, **_PATCHES}},
    "clip": {"vision_config": {**_TINY, **_PATCHES}},
    "swin": _WINDOWS,
    "swinv2": _WINDOWS,
    "pvt": {"image_size": PIXELS, **_STAGES, **_PYRAMID, "sequence_reduction_ratios": [4, 2, 2, 1]},
    "segformer": {**_STAGES, **_PYRAMID},
    "levit": {"hidden_sizes": [32, 64, 96], "num_attention_heads": [2, 4, 6], "depths": [1, 1, 1]},
    "convnext": _STAGES,
    "convnextv2": _STAGES,
    "resnet": {**_STAGES, "embedding_size": 32},
    "regnet": {**_STAGES, "embedding_size": 32, "groups_width": 16},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.35},
    "focalnet": {"embed_dim": 32, "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3]},
    "poolformer": _STAGES,
}
_QUERIES = (
    "query",
    "q_proj",
    "q_lin",
    "q",
    "q_head",
    "queries",
    "qkv",
    "Wqkv",
    "in_proj",
    "query_key_value",
    "query_proj",
    "queries_keys_values",
)
_REAL_EXTRA = {"gemma3_text": {"head_dim": 32}, "qwen3": {"head_dim": 32}, "t5": {"d_kv": 32}}


@dataclass
class Row:
    """One family. ``fused`` are attention operators, ``layers`` what attends in the module tree."""

    name: str
    exported: bool = False
    refused: str | None = None
    difference: float | None = None
    fused: int = 0
    layers: int = 0
    rewrites: dict[str, int] = field(default_factory=dict)
    unfused: str | None = None
    int8_error: float | None = None
    int8_size: float | None = None
    seconds: float = 0.0
    plain_ms: float | None = None
    int8_ms: float | None = None

    @property
    def int8_right(self) -> bool:
        """INT8's error is below a fifth of the logits' spread."""
        return self.int8_error is not None and self.int8_error < 0.2


def build(name: str, real: bool = False) -> Any:
    """A classifier with random weights, large enough that its answers differ."""
    import torch
    from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification

    text = name in TEXTS or name in MORE_TEXTS
    changes = dict((TEXTS | MORE_TEXTS | IMAGES)[name])
    renamed, own = changes.pop("_names", {}), changes.pop("_own_shape", False)
    if text:
        shape = {} if own else {renamed.get(key, key): value for key, value in (_REAL if real else _TINY).items()}
        shape |= {"vocab_size": VOCABULARY, "pad_token_id": 0, "max_position_embeddings": POSITIONS * (1 + 3 * real)}
        if name == "distilbert":
            shape["hidden_dim"] = shape.pop("intermediate_size")
        if name in ("t5", "xlnet", "funnel", "bart", "xlm"):
            shape.pop("max_position_embeddings")
        if name in ("t5", "xlnet"):
            inner = {"t5": ("d_ff", "num_heads"), "xlnet": ("d_inner", "n_head")}[name]
            for new, old in zip(inner, ("intermediate_size", "num_attention_heads"), strict=True):
                shape[new] = shape.pop(old)
        changes = shape | changes | (_REAL_EXTRA.get(name, {}) if real else {})
        if real and "embedding_size" in changes:
            changes["embedding_size"] = changes["hidden_size"]
    config = AutoConfig.for_model(name, **changes, num_labels=CLASSES)
    for token in ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
        if getattr(config, token, None) is not None:
            setattr(config, token, 2)
    torch.manual_seed(0)
    kind = AutoModelForSequenceClassification if text else AutoModelForImageClassification
    chosen = kind._model_mapping[type(config)]
    module = (chosen[0] if isinstance(chosen, tuple) else chosen)(config).float().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            wide = parameter.ndim > 1
            parameter.add_(torch.randn_like(parameter) * (parameter[0].numel() ** -0.5 if wide else 0.1))
        norms = [part for part in module.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.momentum = None
            norm.train()
        if norms:  # running statistics of real activations, so that nothing vanishes on its way through
            module(torch.from_numpy(np.stack([row["pixel_values"] for row in examples_of(name, 16).inputs])))
        for norm in norms:  # one that hardly varies would only amplify rounding
            norm.running_var.clamp_(min=0.05)
        module.eval()
    return module


def examples_of(name: str, count: int = 48, longest: int = 40, seed: int = 0) -> Any:
    """Random texts of many lengths, or images of one size."""
    from compress.tasks.task import Examples

    generator = np.random.default_rng(seed)
    if name in IMAGES:
        size = 224 if name == "levit" else PIXELS
        images = generator.normal(0, 1, (count, 3, size, size)).astype(np.float32)
        images += generator.normal(0, 1, (count, 3, 1, 1)).astype(np.float32)
        return Examples([{"pixel_values": image} for image in images], {"pixel_values": None})
    rows = []
    for length in generator.integers(4, longest + 1, count):
        ids = generator.integers(5, VOCABULARY, length)
        ids[-1] = 2
        rows.append({"input_ids": ids, "attention_mask": np.ones(length, np.int64)})
    return Examples(rows, {"input_ids": 0.0, "attention_mask": 0.0})


def attention_calls(module: Any, examples: Any) -> int:
    """How often a forward attends: calls of modules with a projection of queries, or of all three, of their own."""
    import torch

    from compress.tasks.forward import tensors

    calls, handles = 0, []

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    for part in module.modules():
        if any(child in _QUERIES for child, _ in part.named_children()):
            handles.append(part.register_forward_hook(count))
    handles += [
        part.register_forward_hook(count)
        for part in module.modules()
        if isinstance(getattr(part, "q", None), torch.nn.Parameter)
    ]
    batch = {name: value for name, value in tensors(examples, [0, 1]).items() if name in examples.padding}
    with torch.no_grad():
        module(**batch)
    for handle in handles:
        handle.remove()
    return calls


def examine(name: str, timed: bool) -> Row:
    """Export a family, prove it, quantize it and compare."""
    import torch

    from compress.checkpoints.torch_model import TorchModel
    from compress.errors import CompressError
    from compress.formats.onnx.export import export_onnx
    from compress.formats.onnx.parity import prove_equal
    from compress.formats.silence import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(1)
    start, row = time.perf_counter(), Row(name)
    model = TorchModel(build(name), None)
    examples = examples_of(name)
    row.layers = attention_calls(model.module, examples)
    try:
        exported = export_onnx(model, examples, None, fusions=True)
        row.rewrites = dict(exported.rewrites)
        row.unfused = getattr(exported, "unfused", None)
        operators = Counter(node.op_type for node in exported.graph.graph.node)
        row.fused = sum(operators[kind] for kind in ("Attention", "MultiHeadAttention", "GroupQueryAttention"))
        row.difference = prove_equal(exported.graph, model, examples, 1e-3)
        row.exported = True
        row.int8_error, row.int8_size = _int8(name, exported.graph, model, examples)
        if timed:
            row.plain_ms, row.int8_ms = _timed(name)
    except CompressError as error:
        row.refused = " ".join(str(error).split())[:300]
    except Exception as error:  # noqa: BLE001 - a traceback is a finding here
        row.refused = f"TRACEBACK {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    row.seconds = time.perf_counter() - start
    return row


def quantized(name: str, graph: Any, examples: Any) -> Any:
    """INT8 as the stage `quantize` makes it: dynamic for texts, static for images."""
    from compress.formats.onnx.int8.settings import Int8Options
    from compress.formats.onnx.int8.static import StaticQuantizer
    from compress.formats.onnx.quantization import quantize_embeddings, quantize_products, quantize_rows_in_order

    if name in IMAGES:
        feeds = [examples.batch([place]) for place in range(32)]
        made = StaticQuantizer(graph, feeds, Int8Options(method="static")).quantize()
    else:
        made = quantize_products(graph, per_channel=True, reduce_range=False)
    quantize_rows_in_order(made)
    quantize_embeddings(made, 8)
    return made


def _int8(name: str, graph: Any, model: Any, examples: Any) -> tuple[float, float]:
    from compress.formats.onnx.probed import run_graph

    made = quantized(name, graph, examples)
    fresh = examples_of(name, count=64, seed=1)
    found, expected = (run_graph(each.SerializeToString(), fresh) for each in (made, graph))
    spread = np.sqrt(((expected - expected.mean(0)) ** 2).mean())
    sizes = [sum(len(tensor.raw_data) for tensor in each.graph.initializer) for each in (made, graph)]
    return float(np.sqrt(((found - expected) ** 2).mean()) / spread), sizes[0] / sizes[1]


def _session(graph: Any) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _timed(name: str, length: int = 128, seconds: float = 8.0) -> tuple[float, float]:
    """Medians in ms, one example at a time and in turns: the plain fp32 graph, and INT8 of the fused one."""
    from compress.checkpoints.torch_model import TorchModel
    from compress.formats.onnx.export import export_onnx

    model = TorchModel(build(name, real=True), None)
    examples = examples_of(name, 4, longest=length)
    plain = export_onnx(model, examples, None, fusions=False).graph
    sessions = [
        _session(plain),
        _session(quantized(name, export_onnx(model, examples, None, fusions=True).graph, examples)),
    ]
    ids = np.random.default_rng(0).integers(5, VOCABULARY, (1, length))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)} if name not in IMAGES else examples.batch([0])
    samples: list[list[float]] = [[], []]
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(samples[0]) < 12:
        for session, taken in zip(sessions, samples, strict=True):
            given = {entry.name: feed[entry.name] for entry in session.get_inputs()}
            start = time.perf_counter()
            session.run(None, given)
            taken.append(time.perf_counter() - start)
    plain_ms, int8_ms = (float(np.median(taken[2:]) * 1e3) for taken in samples)
    return plain_ms, int8_ms


def _line(row: Row) -> str:
    if row.refused and not row.exported:
        return f"{row.name:22s} {row.seconds:5.0f} s  {row.refused[:150]}"
    parts = [f"{row.name:22s} {row.seconds:5.0f} s  differs {row.difference:.0e}  fused {row.fused} of {row.layers}"]
    if row.int8_error is not None:
        right = "right" if row.int8_right else "WRONG"
        parts.append(f"INT8 {right} ({row.int8_error:.3f}), {row.int8_size:.0%} of the bytes")
    if row.plain_ms and row.int8_ms:
        parts.append(f"{row.plain_ms:.2f} -> {row.int8_ms:.2f} ms, {row.plain_ms / row.int8_ms:.2f}x")
    return "  ".join([*parts, *([row.refused[:120]] if row.refused else []), *([row.unfused] if row.unfused else [])])


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Families; default: all.")] = None,
    timed: Annotated[bool, typer.Option(help="Also time INT8 against plain fp32, at a realistic width.")] = False,
    output: Annotated[Path | None, typer.Option(help="Also write everything as JSON.")] = None,
) -> None:
    """A line for each family as it ends, then the counts."""
    rows = []
    for name in names or [*TEXTS, *MORE_TEXTS, *IMAGES]:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(examine, (name, timed)))
        sys.stdout.write(_line(rows[-1]) + "\n")
        sys.stdout.flush()
        if output:
            output.write_text(json.dumps([asdict(row) | {"int8_right": row.int8_right} for row in rows], indent=1))
    for kind, group in (("encoders", TEXTS), ("image models", IMAGES)):
        chosen = [row for row in rows if row.name in group]
        done = sum(row.exported for row in chosen)
        fused = sum(row.exported and row.fused > 0 and row.fused == row.layers for row in chosen)
        right = sum(row.int8_right for row in chosen)
        sys.stdout.write(f"{kind}: {done} of {len(chosen)} exported, fused {fused}, INT8 right {right}\n")


if __name__ == "__main__":
    typer.run(main)
