"""The draft head of EAGLE-3 (Li et al. 2025): one block that goes on with what a model knows, in its authors' format.

A folder of `config.json` and safetensors under the authors' names, which vLLM and SGLang read, and the model's
tokenizer. The head has no table of tokens: it reads them by the model's own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.checkpoints.checkpoint import Checkpoint
from compress.checkpoints.head_checkpoint import HeadCheckpoint, heard_blocks
from compress.checkpoints.model import link_or_copy
from compress.checkpoints.safetensors_file import read_tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import LlamaConfig, PreTrainedModel

ARCHITECTURE = "LlamaForCausalLMEagle3"
WEIGHTS = "model.safetensors"
_VOCABULARY = "draft_vocab_size"
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
)
Pair = tuple[torch.Tensor, torch.Tensor]


class _Norm(nn.RMSNorm):
    """In float32, whatever is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float())


class _Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width, size = config.hidden_size, config.head_dim
        heads, shared = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(2 * width, heads * size, bias=False)
        self.k_proj = nn.Linear(2 * width, shared * size, bias=False)
        self.v_proj = nn.Linear(2 * width, shared * size, bias=False)
        self.o_proj = nn.Linear(heads * size, width, bias=False)


class _Block(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        from transformers.models.llama.modeling_llama import LlamaMLP

        width, epsilon = config.hidden_size, config.rms_norm_eps
        self.self_attn, self.mlp = _Attention(config), LlamaMLP(config)
        self.input_layernorm, self.hidden_norm = _Norm(width, epsilon), _Norm(width, epsilon)
        self.post_attention_layernorm = _Norm(width, epsilon)


class DraftHead(nn.Module):
    """From a model's states at three depths, and the token behind each, the token after that; and so on, by its own.

    ``tokens`` [v] are the model's ids of those that the head knows.
    """

    tokens: torch.Tensor

    def __init__(self, config: LlamaConfig, tokens: torch.Tensor) -> None:
        super().__init__()
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        self.config = config
        self.fc = nn.Linear(3 * config.hidden_size, config.hidden_size, bias=False)
        self.midlayer = _Block(config)
        self.norm = _Norm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, len(tokens), bias=False)
        self.register_buffer("tokens", tokens, persistent=False)
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, embedded: torch.Tensor, heard: torch.Tensor, ahead: int) -> list[torch.Tensor]:
        """Logits [batch, length, v] of ``ahead`` tokens behind each place, the last as if the others had been right.

        ``embedded`` [batch, length, width] are the text's tokens, ``heard`` [batch, length, 3 width] what the model
        has at each. Row r of the k-th is about the token at r + 1 + k; the last k rows of it are about none. The head
        goes on with its own states there, as it does when it drafts (training-time test, section 3.2).
        """
        states, past, found = self.fc(heard).float(), list[Pair](), []
        places = torch.arange(embedded.shape[1], device=embedded.device)[None]
        for step in range(1, ahead + 1):
            states, past = self.block(embedded.roll(-step, 1), states, places + step - 1, past)
            found.append(self.lm_head(self.norm(states)))
        return found

    def block(
        self, embedded: torch.Tensor, states: torch.Tensor, places: torch.Tensor, past: Sequence[Pair]
    ) -> tuple[torch.Tensor, list[Pair]]:
        """The block's states, and keys and values of all steps.

        A row sees the rows up to its own of the first step, which are about what the model knows, and of each later one
        its own alone.
        """
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        config, layer = self.config, self.midlayer
        given = torch.cat((layer.input_layernorm(embedded), layer.hidden_norm(states)), -1)
        attention = layer.self_attn
        query, key, value = (
            projected(given).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
            for projected in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *self.rotary(query, places))
        times = config.num_attention_heads // config.num_key_value_heads
        pairs = [*past, (key.repeat_interleave(times, 1), value.repeat_interleave(times, 1))]
        keys, values = pairs[0]
        hidden = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).triu(1)
        scores = [(query @ keys.transpose(-1, -2)).masked_fill(hidden, -torch.inf)]
        scores += [(query * own).sum(-1, keepdim=True) for own, _ in pairs[1:]]
        weights = (torch.cat(scores, -1).float() * config.head_dim**-0.5).softmax(-1).to(query.dtype)
        length = query.shape[2]
        mixed = weights[..., :length] @ values
        for step, (_, own) in enumerate(pairs[1:]):
            mixed = mixed + weights[..., length + step, None] * own
        states = states + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        return states + layer.mlp(layer.post_attention_layernorm(states)), pairs


def new_head(model: PreTrainedModel, tokens: torch.Tensor) -> DraftHead:
    """An untrained head for a causal model: as its last block where that is a Llama's, and drawn where it isn't."""
    from transformers import LlamaConfig

    config = model.config.get_text_config()
    told = config.to_dict()
    names = ("hidden_size", "num_attention_heads", "max_position_embeddings", "vocab_size", "rope_parameters")
    kept = {name: told[name] for name in names if told.get(name) is not None}
    own = LlamaConfig(
        **kept,
        num_key_value_heads=told.get("num_key_value_heads") or config.num_attention_heads,
        head_dim=told.get("head_dim") or config.hidden_size // config.num_attention_heads,
        intermediate_size=told.get("intermediate_size") or 4 * config.hidden_size,
        rms_norm_eps=told.get("rms_norm_eps") or 1e-6,
        num_hidden_layers=1,
        tie_word_embeddings=False,
    )
    head = DraftHead(own, tokens)
    last = next(
        (one for one in reversed([*model.modules()]) if hasattr(one, "self_attn") and hasattr(one, "mlp")), None
    )
    _begin(head, model, last)
    return head


@torch.no_grad()
def _begin(head: DraftHead, model: PreTrainedModel, last: nn.Module | None) -> None:
    """Weights that are there already: states of the late block pass, and the block behind them is the model's last."""
    width = head.config.hidden_size
    head.fc.weight.zero_()
    head.fc.weight[:, 2 * width :] = torch.eye(width)
    head.lm_head.weight.copy_(model.get_output_embeddings().weight[head.tokens])
    for name, weight in head.midlayer.named_parameters():
        owner, _, leaf = name.replace("hidden_norm", "input_layernorm").rpartition(".")
        found = getattr(_submodule(last, owner), leaf, None)
        if found is None or name.startswith("input_layernorm"):
            continue
        if found.shape == weight.shape:
            weight.copy_(found)
        elif weight.ndim == 2 and found.shape == (weight.shape[0], weight.shape[1] // 2):
            weight[:, width:] = found


def _submodule(module: nn.Module | None, name: str) -> nn.Module | None:
    for part in name.split("."):
        module = getattr(module, part, None)
    return module


def write_head(head: DraftHead, model: Checkpoint, folder: Path) -> HeadCheckpoint:
    """Put a head into a new ``folder``, with the tokenizer of the ``model`` whose it is."""
    from safetensors.torch import save_file

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for pattern in _TOKENIZER:
        for path in model.folder.glob(pattern):
            link_or_copy(path, folder / path.name)
    every = head.config.vocab_size
    known = torch.zeros(every, dtype=torch.bool)
    known[head.tokens] = True
    offsets = head.tokens.cpu() - torch.arange(len(head.tokens))
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in head.state_dict().items()}
    save_file({**tensors, "d2t": offsets, "t2d": known}, folder / WEIGHTS, {"format": "pt"})
    heard = heard_blocks((model.config.get("text_config") or model.config)["num_hidden_layers"])
    config: dict[str, Any] = {
        **head.config.to_dict(),
        "architectures": [ARCHITECTURE],
        _VOCABULARY: len(head.tokens),
        # Unless told, both listen to what goes into these blocks. vLLM counts that, SGLang what comes out of a block.
        "eagle_aux_hidden_state_layer_ids": [place + 1 for place in heard],
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [*heard]},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return HeadCheckpoint(folder)


def read_head(checkpoint: Checkpoint) -> DraftHead:
    """What `write_head` wrote."""
    from transformers import LlamaConfig

    offsets = read_tensor(checkpoint.folder / WEIGHTS, "d2t")
    config = LlamaConfig.from_dict({name: value for name, value in checkpoint.config.items() if name != _VOCABULARY})
    head = DraftHead(config, offsets + torch.arange(len(offsets)))
    head.load_state_dict({name: checkpoint.stored(name) for name in head.state_dict()})
    return head.eval().requires_grad_(False)
