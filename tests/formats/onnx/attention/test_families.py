"""Tiny encoders and image models of several families: one operator for each attention, equal to torch at any shape."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from exports import run
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification
from transformers.models.modernbert import modeling_modernbert

from compress.formats.onnx.export import export_onnx
from compress.models.model import TorchModel
from compress.tasks.task import Examples

LAYERS, VOCABULARY, POSITIONS = 2, 60, 64
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWED = {"local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}
DISENTANGLED = {
    "relative_attention": True,
    "position_buckets": 8,
    "pos_att_type": ["c2p", "p2c"],
    "share_att_key": True,
}
RELATIVE = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 1,
    "num_heads": 4,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 0,
    "eos_token_id": 2,
}
WINDOWS = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4}
FAMILIES: dict[str, tuple[dict[str, Any], str, int]] = {
    "mpnet": (TEXT, "MultiHeadAttention", LAYERS),
    "modernbert": (TEXT | WINDOWED, "MultiHeadAttention", LAYERS),
    "eurobert": (TEXT | {"num_key_value_heads": 2}, "MultiHeadAttention", LAYERS),
    "rembert": (TEXT | {"input_embedding_size": 16, "output_embedding_size": 32}, "Attention", LAYERS),
    "deberta-v2": (TEXT | DISENTANGLED, "MultiHeadAttention", LAYERS),
    # An encoder layer, and a decoder layer that attends to itself and to the encoder.
    "t5": (RELATIVE, "MultiHeadAttention", 3),
    "swin": (WINDOWS, "MultiHeadAttention", LAYERS),
}
SLOW = ("deberta-v2", "t5", "rembert")


def model_of(name: str) -> TorchModel:
    changes = FAMILIES[name][0]
    config = AutoConfig.for_model(name, **changes, num_labels=3)
    kind = AutoModelForImageClassification if "image_size" in changes else AutoModelForSequenceClassification
    torch.manual_seed(0)
    module = kind._model_mapping[type(config)](config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return TorchModel(module, None)


def texts(lengths: list[int], seed: int = 0) -> Examples:
    generator = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        ids = generator.integers(5, VOCABULARY, length)
        ids[-1] = 2
        rows.append({"input_ids": ids, "attention_mask": np.ones(length, np.int64)})
    return Examples(rows, {"input_ids": 0.0, "attention_mask": 0.0})


def images(count: int, seed: int = 0) -> Examples:
    pixels = np.random.default_rng(seed).normal(size=(count, 3, 32, 32)).astype(np.float32)
    return Examples([{"pixel_values": image} for image in pixels], {"pixel_values": None})


def test_bytes_do_not_hang_on_what_strings_hash_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """ModernBERT goes over a set of its kinds of layers, whose order is another in every process."""

    class Reversed(set):
        def __iter__(self):
            return iter(sorted(super().__iter__(), reverse=True))

    def made() -> bytes:
        graph = export_onnx(model_of("modernbert"), texts([4, 9]), None, fusions=True).graph.graph
        return graph.SerializeToString(deterministic=True)

    first = made()
    monkeypatch.setattr(modeling_modernbert, "set", Reversed, raising=False)
    assert made() == first


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in FAMILIES])
def test_every_attention_is_one_operator_and_equal_to_torch(name: str):
    model, (_, operator, count) = model_of(name), FAMILIES[name]
    pictures = name == "swin"
    exported = export_onnx(model, images(3) if pictures else texts([4, 9, 17]), None, fusions=True)
    operators = Counter(node.op_type for node in exported.graph.graph.node)
    assert operators[operator] == count == exported.rewrites["attention"] and operators["Softmax"] == 0
    assert exported.unfused == "" and {entry.domain for entry in exported.graph.opset_import} <= {"", "com.microsoft"}
    cases = [images(1, 1), images(5, 2)] if pictures else [texts([7], 1), texts([3, 30, 12, 5], 2), texts([50, 21], 3)]
    for examples in cases:
        batch = examples.batch(range(len(examples)))
        with torch.no_grad():
            expected = model.module(**{key: torch.from_numpy(array) for key, array in batch.items()}).logits.numpy()
        np.testing.assert_allclose(run(exported.graph, **batch), expected, atol=3e-5)
    assert np.ptp(expected, axis=0).max() > 0.01
