"""A tiny decoder in fp32 and in GPTQ format, rounded to nearest, for tests that read such checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compress.models.checkpoint import TABLES, Checkpoint, QuantizedCheckpoint, write_shards
from compress.models.gptq_layout import pack_layer
from compress.numerics.integer_grid import QuantizedWeight

VOCABULARY = 160
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2}
"""Sizes common to all tiny decoders."""


def tiny_llama_config(**changes: Any) -> LlamaConfig:
    """Return the config of a two-layer Llama with grouped-query attention and tied embeddings."""
    return LlamaConfig(**{**SIZES, "intermediate_size": 128, "tie_word_embeddings": True} | changes)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with one token per ASCII byte and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for letter in alphabet[: VOCABULARY - 3]:
        words[letter] = len(words)
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"
    return fast


def save_tiny_llama(folder: Path, seed: int = 0, **changes: Any) -> Checkpoint:
    """Save an fp32 model with weights large enough for outputs to differ between inputs."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_llama_config(**changes)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Checkpoint(folder)


def rounded(weight: torch.Tensor, bits: int, group_size: int) -> QuantizedWeight:
    """Quantize symmetrically by rounding to nearest; ``group_size`` divides the number of columns."""
    rows, columns = weight.shape
    middle = 1 << (bits - 1)
    groups = weight.float().reshape(rows, columns // group_size, group_size)
    scales = (groups.abs().amax(-1) / (middle - 1)).clamp(min=1e-6).half().float()
    integers = (groups / scales[..., None]).round().clamp(-middle, middle - 1) + middle
    zeros = torch.full_like(scales, middle).to(torch.uint8)
    return QuantizedWeight(integers.reshape(rows, columns).to(torch.uint8), scales, zeros, bits, group_size)


def quantize_tiny_llama(
    source: Checkpoint, folder: Path, bits: int = 4, group_size: int = 32, table_bits: int | None = 4
) -> QuantizedCheckpoint:
    """Save ``source`` with all linear layers of the blocks quantized, and the embedding if ``table_bits`` is given."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: list[tuple[str, torch.Tensor]] = []
    tables: dict[str, torch.Tensor] = {}
    about: dict[str, dict[str, int]] = {}
    for name in sorted(source.files):
        module, tensor = name.removesuffix(".weight"), source.stored(name)
        if module.endswith("_proj"):
            packed = pack_layer(rounded(tensor, bits, group_size), stored_less_one=True)
            tensors += [(f"{module}.{part}", value) for part, value in packed.items()]
        elif module.endswith("embed_tokens") and table_bits is not None:
            table = rounded(tensor, table_bits, group_size)
            tensors.append((name, table.dequantize().half()))
            tables |= {f"{module}.{part}": value for part, value in pack_layer(table, False).items()}
            about[module] = {"bits": table_bits, "group_size": group_size, "rows": len(tensor)}
        else:
            tensors.append((name, tensor.half()))
    write_shards(folder, tensors)
    if tables:
        save_file(tables, folder / TABLES, metadata={"tables": json.dumps(about)})
    quantization = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": True, "desc_act": False}
    quantization["checkpoint_format"] = "gptq"
    config = source.config | {"dtype": "float16", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tiny_tokenizer().save_pretrained(folder)
    return QuantizedCheckpoint(folder)
