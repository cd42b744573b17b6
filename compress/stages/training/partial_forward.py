"""A forward pass without what a step need not compute: the frozen layers, and in the last layer all tokens but one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from compress.models.structure import Linear, TransformerBlock, blocks
from compress.models.transformer_pruning import layer_list, replaced_layers
from compress.stages.training.length import KEPT_STATES_BYTES
from compress.tasks.task import Examples
from compress.tasks.tokens import by_length
from compress.utils.errors import StageError
from compress.utils.progress import Progress

BERT_FAMILIES = ("bert", "roberta", "xlm-roberta", "electra")
"""Architectures built like BERT, whose classifiers read the first token."""
_BATCH = 64


class FrozenLayers(nn.Module):
    """Stands for the lowest layers of a model, which are not trained: gives the states that they gave to an example.

    States [length, width] are computed once, without dropout, and kept in memory as long as those of all examples take
    no more than a gigabyte and no example is varied; else each step computes them.
    """

    def __init__(self, module: PreTrainedModel, count: int) -> None:
        super().__init__()
        layers = layer_list(module)
        if count >= len(layers):
            raise StageError(
                f"Cannot freeze {count} of {len(layers)} layers.",
                expected=f"at most {len(layers) - 1}, so that one learns",
            )
        self._module = [module]  # a list, so that it is no part of this one
        self._layers = list(layers)[:count]
        self._parameters_left = [*module.base_model.embeddings.parameters()]
        self._parameters_left += [parameter for layer in self._layers for parameter in layer.parameters()]
        self.count = count
        self._states: list[torch.Tensor] = []
        self._chosen: Sequence[int] | None = None

    def requires_grad_(self, requires_grad: bool = True) -> FrozenLayers:
        """Freeze the embeddings and the layers, or let them learn again."""
        for parameter in self._parameters_left:
            parameter.requires_grad_(requires_grad)
        return self

    @torch.no_grad()
    def keep_states(self, examples: Examples, bf16: bool, progress: Progress, description: str) -> None:
        """Compute the states of every example, unless they are too large to be kept.

        Args:
            examples: Examples of the training.
            bf16: Compute in bfloat16.
            progress: Progress bars and messages.
            description: Name of the stage in messages.
        """
        (module,) = self._module
        lengths = examples.lengths()
        if 4 * int(lengths.sum()) * module.config.hidden_size > KEPT_STATES_BYTES:
            return
        module.eval()
        states: list[torch.Tensor] = [torch.empty(0)] * len(examples)
        batches = by_length(examples, _BATCH)
        for indices in progress.track(batches, f"{description}: frozen layers", len(batches)):
            inputs = {name: torch.from_numpy(array) for name, array in examples.batch(indices).items()}
            inputs = {name: tensor.to(module.device) for name, tensor in inputs.items()}
            last = _Last()
            with (
                replaced_layers(module, [*self._layers, last]),
                torch.autocast(module.device.type, torch.bfloat16, bf16),
            ):
                module.base_model(**inputs)
            for row, index in enumerate(indices):
                states[index] = last.states[row, : lengths[index]].float().clone()
        self._states = states

    def choose(self, indices: Sequence[int]) -> None:
        """Select the examples of the next batch."""
        self._chosen = indices

    def forward(self, hidden: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        """Return the states of the chosen examples, padded to ``hidden``'s length; ``hidden`` are embeddings."""
        if self._states:
            assert self._chosen is not None
            states = pad_sequence([self._states[index] for index in self._chosen], batch_first=True)
            return states.to(hidden.device)
        with torch.no_grad():
            for layer in self._layers:
                hidden = layer.eval()(hidden, *arguments, **options)
        return hidden


class _Last(nn.Module):
    """Remembers what the layer before it gave."""

    states: torch.Tensor

    def forward(self, hidden: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        self.states = hidden
        return hidden


class FirstTokenLayer(nn.Module):
    """A layer of BERT's kind that gives the first token's state alone, [B, 1, width], from those of all tokens."""

    def __init__(self, block: TransformerBlock) -> None:
        super().__init__()
        self._block = [block]

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None = None, *_: object, **__: object) -> torch.Tensor:
        """``mask`` is what attention adds or allows, [B, 1, length, length], or ``None``."""
        (block,) = self._block
        layer: Any = block.module
        first, attention = hidden[:, :1], block.require_attention()

        def by_head(states: torch.Tensor, projection: Linear) -> torch.Tensor:
            heads: torch.Tensor = projection(states).unflatten(-1, (attention.heads, attention.head_size))
            return heads.transpose(1, 2)

        attended = scaled_dot_product_attention(
            by_head(first, attention.query),
            by_head(hidden, attention.key),
            by_head(hidden, attention.value),
            attn_mask=None if mask is None else mask[:, :, :1],
            dropout_p=layer.attention.self.dropout.p if layer.training else 0.0,
        )
        return layer.feed_forward_chunk(layer.attention.output(attended.transpose(1, 2).flatten(2), first))  # type: ignore[no-any-return]


@contextlib.contextmanager
def shortened(module: PreTrainedModel, frozen: FrozenLayers | None = None, first_token: bool = False) -> Iterator[None]:
    """Let ``module`` compute no more than a step needs: not what is ``frozen``; of the last layer the first token.

    Raises `StageError` for an architecture whose classifier reads other tokens too.
    """
    layers: list[nn.Module] = list(layer_list(module)) if frozen is not None or first_token else []
    if first_token:
        if module.config.model_type not in BERT_FAMILIES:
            raise StageError(
                f"Whether a {module.config.model_type!r} model's classifier reads the first token alone is not known.",
                expected=f"one of {', '.join(BERT_FAMILIES)}",
                hint="leave first_token_only out",
            )
        layers[-1] = FirstTokenLayer(blocks(module)[-1])
    if frozen is not None:
        layers[: frozen.count] = [frozen]
    with replaced_layers(module, layers) if layers else contextlib.nullcontext():
        yield
