"""Encoders with decoders of many families: what each has that Whisper hasn't, against transformers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from compress.formats.onnx.decoder import export_encoder_decoder, verify_encoder_decoder
from compress.models.checkpoint import Checkpoint

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
BART = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "scale_embedding": True,
    "forced_eos_token_id": None,
    **TOKENS,
}
T5 = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 24,  # more in all than the model is wide
    "d_ff": 48,
    "num_layers": 1,
    "num_decoder_layers": 3,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    **TOKENS,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "t5": T5,  # positions as a bias that the first block makes for all, a head that is the table, scaled
    "marian": BART,  # positions that no file has, a bias of logits, tables scaled
}


def saved(kind: str, folder: Any, fields: dict[str, Any]) -> Checkpoint:
    """A model whose norms are off 1 and biases off 0, and whose logits spread."""
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **fields)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_positions" not in name:
                parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1) + (parameter == 1))
        for name, buffer in model.named_buffers():
            if name.endswith("final_logits_bias"):
                buffer.normal_()
    model.save_pretrained(folder)
    return Checkpoint(folder)


def some_texts() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Two rows of which one is padded, and where their answers begin."""
    ids = np.random.default_rng(0).integers(4, 96, (2, 11))
    mask = np.ones_like(ids)
    ids[1, 6:], mask[1, 6:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}, np.full((2, 1), 3)


@pytest.mark.parametrize("kind", FAMILIES)
def test_each_family_equals_torch_over_a_prompt_and_ten_tokens(kind: str, tmp_path) -> None:
    checkpoint = saved(kind, tmp_path, FAMILIES[kind])
    model = export_encoder_decoder(checkpoint)
    inputs, start = some_texts()
    parity = verify_encoder_decoder(model, checkpoint, [inputs], [start], 1e-4, 0.2, more=10)
    assert parity.difference < 1e-4
    layers = [
        FAMILIES[kind].get(name) or FAMILIES[kind][other]
        for name, other in (("encoder_layers", "num_layers"), ("decoder_layers", "num_decoder_layers"))
    ]
    encoder, decoder = (Counter(node.op_type for node in graph.graph.node) for graph in model.graphs.values())
    assert (encoder["MultiHeadAttention"], encoder["Softmax"]) == (layers[0], 0)
    assert (decoder["MultiHeadAttention"], decoder["If"], decoder["Softmax"]) == (layers[1], layers[1], 0)
