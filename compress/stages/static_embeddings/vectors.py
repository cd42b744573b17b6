"""Token vectors of an encoder, and the static model that is made of them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from compress.models.model import TorchModel
from compress.models.processor import SentenceProcessor
from compress.models.sentence_modules import Normalize, SentenceModules
from compress.models.static_model import (
    StaticConfig,
    StaticForSequenceClassification,
    StaticModel,
    register_static_models,
)
from compress.stages.base import Context
from compress.tasks.capability import EMBEDS
from compress.tasks.task import Examples
from compress.utils.progress import Progress

_BATCH = 512


@torch.inference_mode()
def token_vectors(model: TorchModel, progress: Progress) -> np.ndarray:
    """Return the embedding of each token by itself, [vocabulary, dimensions].

    It is what the pooling modules make of it, before a normalization. Without modules, as in a classifier, it is the
    mean of the last hidden states.
    """
    body = model.module.base_model.eval()
    modules = getattr(model.processor, "modules", None) or SentenceModules(body.config.hidden_size)
    modules = replace(modules, steps=tuple(step for step in modules.steps if not isinstance(step, Normalize)))
    encoded = model.tokenizer("a", return_special_tokens_mask=True)
    (positions,) = np.nonzero(np.array(encoded["special_tokens_mask"]) == 0)
    prefix, suffix = encoded["input_ids"][: positions[0]], encoded["input_ids"][positions[-1] + 1 :]
    size = len(model.tokenizer)
    vectors = []
    for start in progress.track(range(0, size, _BATCH), "static_embeddings: token vectors", -(-size // _BATCH)):
        rows = [[*prefix, token, *suffix] for token in range(start, min(start + _BATCH, size))]
        input_ids = torch.tensor(rows)
        attention_mask = torch.ones_like(input_ids)
        hidden = body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        vectors.append(modules.embed(hidden, attention_mask).float().numpy())
    return np.concatenate(vectors)


def principal_components(vectors: np.ndarray, dimensions: int, whiten: bool) -> tuple[np.ndarray, float]:
    """Return vectors [n, d] in ``dimensions`` principal components, and the share of the variance that they hold.

    With all dimensions and no whitening the axes stay as they are, so that the vectors can learn from the encoder's.

    Args:
        vectors: The vectors, of any mean.
        dimensions: Number of components.
        whiten: Divide each component by its standard deviation.
    """
    centered = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    variances, rotation = np.linalg.eigh(centered.T @ centered / len(centered))
    if dimensions == vectors.shape[1] and not whiten:
        return centered.astype(np.float32), 1.0
    # `eigh` returns eigenvalues in ascending order.
    variances, rotation = variances[::-1].clip(min=0), rotation[:, ::-1]
    components = centered @ rotation[:, :dimensions]
    if whiten:
        components /= np.sqrt(variances[:dimensions]).clip(min=1e-9)
    return components.astype(np.float32), float(variances[:dimensions].sum() / variances.sum())


def token_weights(examples: Examples, size: int, sif: float) -> np.ndarray:
    """Return a / (a + frequency) for each token [size] float32 (Arora et al. 2017, equation 3); ones for a = 0.

    Args:
        examples: Texts in which the tokens are counted.
        size: Size of the vocabulary.
        sif: The parameter a.
    """
    if not sif:
        return np.ones(size, dtype=np.float32)
    counts = sum(np.bincount(row["input_ids"], minlength=size) for row in examples.inputs)
    frequencies = counts / max(np.sum(counts), 1)
    return np.asarray(sif / (sif + frequencies), dtype=np.float32)


def make_static_model(model: TorchModel, table: np.ndarray, filters: int, window: int, context: Context) -> TorchModel:
    """Return a static model with the token vectors of ``table``, and a random head if the task has classes.

    The vector of the unknown token is zero, since it says nothing about the text.
    """
    register_static_models()
    tokenizer = _plain_tokenizer(model.tokenizer)
    config = StaticConfig(
        vocab_size=len(table),
        hidden_size=table.shape[1],
        filters=filters,
        window=window,
        pad_token_id=tokenizer.pad_token_id,
        unk_token_id=tokenizer.unk_token_id,
    )
    embeds = EMBEDS in context.task.capabilities
    if not embeds:
        old = model.module.config
        config.id2label, config.label2id = dict(old.id2label), dict(old.label2id)
    torch.manual_seed(context.seed)
    module = StaticModel(config) if embeds else StaticForSequenceClassification(config)
    with torch.no_grad():
        module.embeddings.weight.copy_(torch.from_numpy(table))
        if config.unk_token_id is not None:
            module.embeddings.weight[config.unk_token_id] = 0
    modules = SentenceModules(table.shape[1], steps=(Normalize(),), static=True)
    return TorchModel(module.eval(), SentenceProcessor(tokenizer, modules) if embeds else tokenizer)


def _plain_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return the tokenizer without the special tokens that it puts around a text."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    definition |= {"post_processor": None, "padding": None, "truncation": None}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(definition)),
        pad_token=tokenizer.pad_token,
        unk_token=tokenizer.unk_token,
        model_max_length=tokenizer.model_max_length,
        model_input_names=["input_ids", "attention_mask"],
    )
