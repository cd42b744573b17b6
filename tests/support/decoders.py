"""Tiny causal decoders of several architectures, with calibration texts and stage contexts for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers
from quantized import SIZES, VOCABULARY, tiny_tokenizer
from stage_context import Notes as Notes
from stage_context import stage_context

from compress.data.dataset import Dataset
from compress.models.checkpoint import Checkpoint
from compress.stages.base import Context
from compress.tasks.registry import TASKS
from compress.utils.progress import Progress

SMALL = {**SIZES, "intermediate_size": 96, "max_position_embeddings": 128, "pad_token_id": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaConfig": {"tie_word_embeddings": True},
    "MistralConfig": {"sliding_window": 8},
    "Qwen2Config": {"tie_word_embeddings": True},
    "Qwen3Config": {"head_dim": 32},
    "Gemma2Config": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "Gemma3TextConfig": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2},
    "PhiConfig": {"partial_rotary_factor": 0.5},
    "Phi3Config": {},
    "StableLmConfig": {"use_parallel_residual": True, "qk_layernorm": True},
    "OlmoConfig": {},
    "GraniteConfig": {"embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "BloomConfig": {"n_layer": 2, "n_head": 4},
}
_ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SHARED = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
_LATENT = {"kv_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 16, "v_head_dim": 16}
MIXTURES: dict[str, dict[str, Any]] = {
    "MixtralConfig": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
    "Qwen2MoeConfig": {**_ROUTED, "num_experts": 4, "shared_expert_intermediate_size": 32},
    "Qwen3MoeConfig": {**_ROUTED, "num_experts": 4, "head_dim": 16},
    "OlmoeConfig": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
    "DeepseekV2Config": {**_ROUTED, **_SHARED, **_LATENT, "num_key_value_heads": 4, "q_lora_rank": None},
    "DeepseekV3Config": {**_ROUTED, **_SHARED, **_LATENT, "num_key_value_heads": 4, "q_lora_rank": 32},
}
"""Mixtures of four experts, two of which are active per token; DeepSeek's first block is dense."""
ARCHITECTURES |= MIXTURES


def save_decoder(
    folder: Path, config: str = "LlamaConfig", seed: int = 0, dtype: Any = None, **changes: Any
) -> Checkpoint:
    """Save a decoder with random weights large enough for outputs to differ between inputs."""
    fields = SMALL | ARCHITECTURES[config] | changes
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**fields)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype or torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Checkpoint(folder)


def module_of(checkpoint: Checkpoint) -> Any:
    """Load the checkpoint in transformers in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()


def inputs_of_layers(module: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return name -> inputs [tokens, columns] of every linear layer in a forward pass."""
    seen: dict[str, torch.Tensor] = {}
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.Linear | transformers.pytorch_utils.Conv1D):
            part.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0].flatten(0, -2)}))
    with torch.no_grad():
        module(input_ids=ids)
    return seen


def some_ids(windows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(seed))


def text(tokens: int, seed: int = 0) -> str:
    """Return letters that each depend on the previous one, so that inputs are correlated; one token each."""
    generator = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnop ETAOIN"))
    letter_index, chosen_letters = 0, []
    for _ in range(tokens):
        letter_index = int(letter_index + generator.geometric(0.4)) % len(letters)
        chosen_letters.append(str(letters[letter_index]))
    return "".join(chosen_letters)


def context(
    scratch: Path, train: str | None = None, progress: Progress | None = None, seed: int = 0, length: int = 16
) -> Context:
    """Return a stage context whose train split has the single row ``train``."""
    tables = {"train": pa.table({"text": [text(2000) if train is None else train]})}
    data = Dataset(TASKS["text-generation"].columns, tables, ())
    return stage_context("text-generation", data, length, seed, progress, scratch=scratch)


def layers_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the layers of `quantized_layers.json` by name."""
    layer_fields = json.loads((folder / "quantized_layers.json").read_text())
    return {layer["name"]: layer for layer in layer_fields["layers"]}
