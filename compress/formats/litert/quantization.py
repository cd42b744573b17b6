"""A LiteRT file's weights in fewer bits, by ai-edge-quantizer."""

from __future__ import annotations

import re
from typing import Any

from compress.formats.litert.model import Blocks, Precision
from compress.formats.litert.names import LOOKED_UP
from compress.formats.silence import silence
from compress.utils.errors import StageError

_LOOK_UP = "EMBEDDING_LOOKUP"


def quantize_litert(
    content: bytes, precision: Precision, table: str | None, embedding_bits: int | None, block: Blocks | None
) -> bytes:
    """The same file with its weights in ``precision``; the same bytes each time. Raises `StageError`.

    ``int8``: weights with a scale for each channel, and inputs of products rounded in each call, row by row;
    ``int8_weights``: the same weights, made float again where they are used. Tables have 8 bits and a scale a row.
    ``embedding_bits``, 4 or 8, is for the ``table`` of words alone: 4 bits with a scale for each ``block`` of a row, a
    divisor of its length, or for the whole row.
    """
    from ai_edge_quantizer import quantizer

    if precision == "fp32" and embedding_bits is None:
        return content
    recipe = _recipe(precision, table, embedding_bits, block)
    try:
        with silence("prints"):  # it has a bar that nothing turns off
            quantized = quantizer.Quantizer(content, recipe).quantize(
                enable_progress_bar=False, enable_progress_report=False
            )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise StageError(
            f"The model cannot be quantized for LiteRT: {error}", hint="set precision: fp32, or leave this target out"
        ) from error
    return bytes(quantized.quantized_model)


def _recipe(precision: Precision, table: str | None, bits: int | None, block: Blocks | None) -> list[dict[str, Any]]:
    """Return the recipe for ai-edge-quantizer; of two entries for an operator the later one applies."""
    from ai_edge_quantizer import algorithm_manager, qtyping, recipe_manager

    manager = recipe_manager.RecipeManager()
    every, look_up = qtyping.TFLOperationName.ALL_SUPPORTED, qtyping.TFLOperationName(_LOOK_UP)
    names = algorithm_manager.AlgorithmName
    if precision == "fp16":
        manager.add_weight_only_config(".*", every, 16, algorithm_key=names.FLOAT_CASTING)
    elif precision == "int8":
        manager.add_dynamic_config(".*", every, 8)
    elif precision == "int8_weights":
        manager.add_weight_only_config(".*", every, 8)
        # A table is looked up in its integers either way.
        manager.add_dynamic_config(f"{re.escape(LOOKED_UP)}", look_up, 8)
    if table is not None and bits is not None:
        granularity = qtyping.QuantGranularity
        by = granularity(f"BLOCKWISE_{block}") if bits == 4 and block else granularity.CHANNELWISE
        manager.add_dynamic_config(f"{re.escape(table + LOOKED_UP)}", look_up, bits, by)
    entries: list[dict[str, Any]] = manager.get_quantization_recipe()
    return entries
