"""Linear layers after pooling: one is added where a student's embeddings have another width, and all are trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from compress.models.model import TorchModel
from compress.models.processor import SentenceProcessor
from compress.models.sentence_modules import Dense, Normalize


def pooled_like(processor: SentenceProcessor, hidden_size: int) -> SentenceProcessor:
    """Return a processor with the pooling of another one, for a model of ``hidden_size`` and without linear layers."""
    modules = processor.modules
    if modules.width == hidden_size:
        return processor
    steps = tuple(step for step in modules.steps if isinstance(step, Normalize))
    return SentenceProcessor(processor.tokenizer, replace(modules, width=hidden_size, steps=steps))


def projected(processor: SentenceProcessor, dimensions: int) -> SentenceProcessor:
    """Return a processor whose embeddings have ``dimensions``, by a new linear layer with random weights if needed."""
    modules = processor.modules
    if modules.dimensions == dimensions:
        return processor
    layer = nn.Linear(modules.dimensions, dimensions, bias=False)
    dense = Dense(layer.weight.detach().numpy())
    return SentenceProcessor(processor.tokenizer, modules.followed_by(dense))


@contextlib.contextmanager
def trained_layers(model: TorchModel) -> Iterator[None]:
    """Make the linear layers after pooling parameters of the model, so that they are trained with it.

    Models without pooling have none.
    """
    if not isinstance(model.processor, SentenceProcessor):
        yield
        return
    modules, tokenizer = model.processor.modules, model.processor.tokenizer
    trained = [_parameters(step) if isinstance(step, Dense) else step for step in modules.steps]
    layers = {f"dense_{index}": step for index, step in enumerate(trained) if isinstance(step, Dense)}
    for name, layer in layers.items():
        model.module.add_module(name, nn.ParameterList(part for part in (layer.weight, layer.bias) if part is not None))
    # Another model may have the same processor.
    model.processor = SentenceProcessor(tokenizer, replace(modules, steps=tuple(trained)))
    try:
        yield
    finally:
        for name in layers:
            delattr(model.module, name)
    steps = tuple(_arrays(step) if isinstance(step, Dense) else step for step in trained)
    model.processor = SentenceProcessor(tokenizer, replace(modules, steps=steps))


def _parameters(layer: Dense) -> Dense:
    bias = None if layer.bias is None else nn.Parameter(torch.as_tensor(layer.bias).clone())
    return Dense(nn.Parameter(torch.as_tensor(layer.weight).clone()), bias, layer.activation)


def _arrays(layer: Dense) -> Dense:
    bias = None if layer.bias is None else torch.as_tensor(layer.bias).detach().numpy()
    return Dense(torch.as_tensor(layer.weight).detach().numpy(), bias, layer.activation)
