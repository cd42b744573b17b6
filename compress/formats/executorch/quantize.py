"""A model in 8 bits for ExecuTorch, before it is lowered: by torchao, or by PT2E where there are convolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch

EmbeddingBits = Literal[4, 8]
_GROUP = 32
"""Weights that share a scale in a table of 4 bits."""


def has_convolutions(module: torch.nn.Module) -> bool:
    """Whether 8 bits need ranges of inputs that were seen: XNNPACK has no convolution that finds them by itself."""
    kinds = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d)
    return any(isinstance(layer, kinds) for layer in module.modules())


def quantize_dynamic(module: torch.nn.Module, embedding_bits: EmbeddingBits) -> None:
    """Linear layers and embedding tables, in place.

    Products have 8-bit weights, a scale a channel, and inputs rounded in each call, a scale a token. Tables have a
    scale a row; the one with most rows has ``embedding_bits`` bits, where 4 have a scale for every 32 weights.
    """
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, MappingType, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    tables = [layer for layer in module.modules() if isinstance(layer, torch.nn.Embedding)]
    largest = max(tables, key=lambda table: table.num_embeddings, default=None)
    for table in tables:
        # It only matters to training, and keeps the operator for quantized tables from being found.
        table.padding_idx = None
        few = table is largest and embedding_bits == 4 and table.embedding_dim % _GROUP == 0
        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, "int4" if few else "int8"),
            granularity=PerGroup(_GROUP) if few else PerAxis(0),
        )
        quantize_(module, config, _only(table))
    products = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int8, weight_granularity=PerAxis(0), weight_mapping_type=MappingType.SYMMETRIC
    )
    quantize_(module, products)


def _only(table: torch.nn.Module) -> Callable[[torch.nn.Module, str], bool]:
    return lambda layer, name: layer is table


def quantize_static(
    graph: torch.fx.GraphModule, calibration: Iterable[tuple[torch.Tensor, ...]]
) -> torch.fx.GraphModule:
    """Convolutions and products of a traced model, with ranges of what ``calibration`` leads to (PT2E)."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(graph, quantizer)
    with torch.no_grad():
        for inputs in calibration:
            prepared(*inputs)
    made: torch.fx.GraphModule = convert_pt2e(prepared)
    return made
