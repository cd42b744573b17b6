"""Static models: one vector per token, pooled by their mean, with an optional classifier.

transformers has no such architecture, so these classes are registered with its auto classes. The folder has the layout
of model2vec, which sentence-transformers reads as `StaticEmbedding`.
"""

from __future__ import annotations

from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn.functional import pad
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

from compress.models.config_checks import STATIC_MODEL_TYPE
from compress.models.processor import read_tokenizer
from compress.models.safetensors_file import read_header, read_tensor
from compress.numerics.pooling import pool

_TABLE = "embeddings"
"""Name of the vectors in the weights, which model2vec and sentence-transformers read."""
_ROWS = "mapping"
"""Name of the row of each token in model2vec's tables with fewer rows than tokens."""
_SCALES = "weights"
"""Name of the factor of each token in such tables."""


@strict
class StaticConfig(PreTrainedConfig):  # type: ignore[misc]
    """Config of a static model. A classifier has ``filters`` of ``window`` tokens, or without filters a linear head."""

    model_type = STATIC_MODEL_TYPE
    attribute_map = {"hidden_dim": "hidden_size"}

    vocab_size: int | None = None
    hidden_size: int = 256
    num_hidden_layers: int = 0
    filters: int = 0
    window: int = 3
    normalize: bool = True
    pad_token_id: int | None = 0
    unk_token_id: int | None = None


class StaticPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """Base class of static models."""

    config_class = StaticConfig

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str], *inputs: Any, config: StaticConfig, **options: Any) -> Any:
        """Return the model of a folder. Configs of model2vec name neither the size of the vocabulary nor its tokens."""
        path = Path(folder, "model.safetensors")
        shapes = {tensor.name: tensor.shape for tensor in read_header(path)} if path.is_file() else {}
        if config.vocab_size is None and _TABLE in shapes:
            config.vocab_size = shapes[_TABLE][0]
        loaded = super().from_pretrained(folder, *inputs, config=config, **options)
        # `output_loading_info` returns a pair.
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        table = model.embeddings.weight.detach()
        if _ROWS in shapes:
            table = table[read_tensor(path, _ROWS).long()]
        if _SCALES in shapes:
            table = table * read_tensor(path, _SCALES).to(table.dtype)[:, None]
        if shapes.keys() & {_ROWS, _SCALES}:
            model.embeddings = nn.Embedding(table.shape[0], table.shape[1], _weight=table)
            model.config.vocab_size = len(table)
        if config.unk_token_id is None:
            _drop_unknown(model, Path(folder, "tokenizer.json"))
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


class StaticModel(StaticPreTrainedModel):
    """One vector per token, whatever the other tokens are. The unknown token's is zero."""

    def __init__(self, config: StaticConfig) -> None:
        super().__init__(config)
        assert config.vocab_size is not None, f"neither the config nor a tensor {_TABLE!r} gives the vocab_size"
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.unk_token_id)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token vectors."""
        return self.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token vectors."""
        self.embeddings = value

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> BaseModelOutput:
        """Return the vectors of the tokens [B, L, D]."""
        return BaseModelOutput(last_hidden_state=self.embeddings(input_ids))


class StaticForSequenceClassification(StaticModel):
    """Classifier of token vectors: linear of their mean, or of a convolution's mean and maximum (Kim 2014)."""

    def __init__(self, config: StaticConfig) -> None:
        super().__init__(config)
        filters, width = config.filters, config.hidden_size
        # A matrix, which INT8 quantizes like any other: a convolution of one dimension would stay in float.
        self.convolution = nn.Linear(config.window * width, filters) if filters else None
        self.classifier = nn.Linear(2 * filters or width, config.num_labels)
        self.post_init()

    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any
    ) -> SequenceClassifierOutput:
        """Return the logits [B, classes]."""
        vectors = self.embeddings(input_ids)
        if self.convolution is None:
            return SequenceClassifierOutput(logits=self.classifier(pool(vectors, attention_mask, ("mean",))))
        mask = attention_mask[:, :, None].to(vectors.dtype)
        window = self.config.window
        padded = pad(vectors * mask, (0, 0, (window - 1) // 2, window // 2))
        # Counted from the end, so that the graph need not compute the length.
        windows = torch.cat([padded[:, start : start + 1 - window or None] for start in range(window)], dim=-1)
        # No activation is below 0, so that the zeros of padding do not change the maximum.
        active = torch.relu(self.convolution(windows)) * mask
        pooled = torch.cat([active.sum(dim=1) / mask.sum(dim=1).clamp(min=1), active.amax(dim=1)], dim=-1)
        return SequenceClassifierOutput(logits=self.classifier(pooled))


def _drop_unknown(model: StaticPreTrainedModel, tokenizer_file: Path) -> None:
    """Set the vector of the unknown token to zero: model2vec leaves the token out, as its configs do not say."""
    if not tokenizer_file.is_file():
        return
    tokenizer = read_tokenizer(tokenizer_file)
    token = getattr(tokenizer.model, "unk_token", None)
    row = tokenizer.token_to_id(token) if token else None
    if row is not None and row < model.embeddings.num_embeddings:
        model.config.unk_token_id = row
        with torch.no_grad():
            model.embeddings.weight[row] = 0


@cache
def register_static_models() -> None:
    """Make transformers' auto classes load static models."""
    AutoConfig.register(StaticConfig.model_type, StaticConfig)
    AutoModel.register(StaticConfig, StaticModel)
    AutoModelForSequenceClassification.register(StaticConfig, StaticForSequenceClassification)
    renaming = WeightRenaming(_TABLE, "embeddings.weight")
    register_checkpoint_conversion_mapping(StaticConfig.model_type, [renaming])
