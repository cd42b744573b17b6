"""Tiny checkpoints of each decoder that is exported to ONNX, and their outputs in transformers and ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from quantized import SIZES, VOCABULARY, rounded, tiny_llama_config, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from compress.formats.generation.decoder import Decoder
from compress.models.checkpoint import Checkpoint
from compress.numerics.integer_grid import QuantizedWeight
from compress.utils.errors import InputError

_FIELDS: dict[str, Any] = {**SIZES, "intermediate_size": 96}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
_LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": tiny_llama_config(),
    "llama with biases": tiny_llama_config(tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "llama 3": tiny_llama_config(rope_parameters=_LLAMA3, num_key_value_heads=4, head_dim=32),
    "mistral": MistralConfig(**_FIELDS, sliding_window=8, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**_FIELDS, tie_word_embeddings=True),
    "qwen2 with windows": Qwen2Config(**_FIELDS, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3": Qwen3Config(**_FIELDS, head_dim=32, tie_word_embeddings=True),
}


def save_decoder(folder: Path, config: PreTrainedConfig, seed: int = 0) -> Checkpoint:
    """Save a model with random biases and norms, whose large weights make the logits depend on positions and masks."""
    torch.manual_seed(seed)
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter * 4 if parameter.ndim == 2 else parameter + 0.3 * torch.randn_like(parameter))
    folder.mkdir(parents=True, exist_ok=True)
    module.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Checkpoint(folder)


@dataclass(frozen=True)
class FewBitsCheckpoint(Checkpoint):
    """A float checkpoint that presents chosen modules as quantized, rounded to nearest in groups of 32.

    ``bits`` has pairs of a module name suffix and a number of bits; widths outside the GPTQ format are possible too.
    """

    bits: tuple[tuple[str, int], ...] = ()

    def quantized(self, module: str) -> QuantizedWeight | None:
        """Return the weight rounded to nearest, or None if the module is not quantized."""
        found = [bits for ending, bits in self.bits if module.endswith(ending)]
        return rounded(self.stored(f"{module}.weight").float(), found[0], 32) if found else None


def by_transformers(source: Checkpoint, weights: Checkpoint | None = None) -> PreTrainedModel:
    """Load ``source`` as a float model in transformers, with the dequantized weights of ``weights`` if given."""
    module: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    if weights is not None:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                owner, _, kind = name.rpartition(".")
                parameter.copy_(weights.weight(owner) if kind == "weight" else weights.stored(name).float())
    return module


def logits_of(module: PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """Return logits [rows, length, vocabulary]."""
    with torch.inference_mode():
        logits: np.ndarray = module(torch.from_numpy(ids)).logits.numpy()
    return logits


def random_ids(rows: int, length: int, seed: int = 0) -> np.ndarray:
    """Return token ids [rows, length] without special tokens."""
    return np.random.default_rng(seed).integers(3, VOCABULARY, (rows, length))


class Graph:
    """An ONNX Runtime session of a decoder, with the input and output names that clients rely on."""

    def __init__(self, graph: onnx.ModelProto) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(graph.SerializeToString(), options, ["CPUExecutionProvider"])
        self.inputs = {entry.name: entry.shape for entry in self.session.get_inputs()}
        self.outputs = [entry.name for entry in self.session.get_outputs()]

    def run(
        self, ids: np.ndarray, mask: np.ndarray | None = None, past: dict[str, np.ndarray] | None = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the logits, and the key-value cache under the input names of the next call."""
        names = [name for name in self.inputs if name.startswith("past_key_values.")]
        if past is None:
            past = {name: np.zeros((len(ids), self.inputs[name][1], 0, self.inputs[name][3]), "f4") for name in names}
        seen = next(iter(past.values())).shape[2]
        mask = np.ones((len(ids), seen + ids.shape[1]), np.int64) if mask is None else mask
        found = self.session.run(None, {"input_ids": ids, "attention_mask": mask, **past})
        values = dict(zip(self.outputs, found, strict=True))
        return values["logits"], {name: values[f"present.{name.removeprefix('past_key_values.')}"] for name in names}


def greedy_tokens(decoder: Decoder, prompt: list[int], count: int) -> list[int]:
    """Return ``count`` tokens that follow a prompt under greedy decoding, one decoder step each."""
    tokens = [decoder.prefill(prompt)]
    while len(tokens) < count:
        tokens.append(decoder.step(tokens[-1]))
    return tokens


def tokens_of_transformers(module: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """Return ``count`` greedy tokens by transformers, without a stop at the end-of-text token."""
    ids = torch.tensor([prompt])
    sequences = module.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None,
        pad_token_id=2,
    )  # fmt: skip
    return sequences[0, len(prompt) :].tolist()


def check_refused_batches(session: Any, vocabulary: int) -> None:
    """Check that a session refuses padding, unknown token ids, a wrong input name and a row without a batch axis."""
    tokens = random_ids(2, 8)
    mask = np.ones_like(tokens)
    mask[0, -1] = 0
    for batch, message in (
        ({"input_ids": tokens, "attention_mask": mask}, "no padding"),
        ({"input_ids": np.full((1, 3), vocabulary)}, f"id {vocabulary}"),
        ({"tokens": tokens}, "lacks the model's input input_ids"),
        ({"input_ids": tokens[0]}, r"shape \[8\]"),
    ):
        with pytest.raises(InputError, match=message):
            session.predict(batch)
    with pytest.raises(InputError, match="id -1"):
        session.decoder().prefill([3, -1])
