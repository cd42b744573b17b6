"""Test encoder-decoders as two ONNX graphs: equality with torch in fp32 and 4 bits, fusion, and the error of INT8.

Decoders are run both as one prefill and token by token. The error of INT8 is relative to the spread of the logits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_decoders import quantize_checkpoint
from tiny_encoder_decoders import decoder_ids, examples, save
from trials import SILENT, Trial

from compress.formats.onnx.decoder import (
    GraphSettings,
    export_encoder_decoder,
    teacher_forced_logits,
    verify_encoder_decoder,
)
from compress.formats.onnx.model import OnnxModel
from compress.models.checkpoint import Checkpoint
from compress.stages.onnx_int8.stage import OnnxInt8
from compress.utils.errors import CompressError

_TOLERANCE, _STEPS = 1e-3, 10
_MAX_INT8_ERROR = 0.2
"""Relative to the spread of the logits."""
_SEQUENCES, _LENGTH = 8, 6


def judge(name: str, folder: Path) -> dict[str, str]:
    """Return the largest difference of a logit in fp32 and in 4 bits, the form of attention, and the error of INT8."""
    module, source = save(name, folder / "float"), Checkpoint(folder / "float")
    model, difference = _export_verified(name, source, GraphSettings())
    nodes = Counter(
        node.op_type
        for graph in model.graphs.values()
        for node in ir.traversal.RecursiveGraphIterator(ir.from_proto(graph).graph)
    )
    # Both branches of an If node have the cross-attention.
    cells = {"ONNX": difference, "attention": f"{nodes['MultiHeadAttention'] - nodes['If']} fused"}
    for column, measure in (
        ("4 bits", lambda: _four_bit_error(name, module, source, folder / "quantized")),
        ("INT8 error", lambda: _int8_error(name, model, OnnxInt8().run(model, SILENT))),
    ):
        try:
            cells[column] = measure()
        except CompressError as error:
            cells[column] = f"no: {error.what}"
    return cells


TRIAL = Trial(("ONNX", "4 bits", "attention", "INT8 error"), judge)


def _export_verified(name: str, source: Checkpoint, settings: GraphSettings) -> tuple[OnnxModel, str]:
    model = export_encoder_decoder(source, settings)
    inputs, start = examples(name)
    equality = verify_encoder_decoder(model, source, [inputs], [start], _TOLERANCE, 1.0, more=_STEPS)
    return model, f"{equality.difference:.0e}"


def _four_bit_error(name: str, module: object, source: Checkpoint, folder: Path) -> str:
    return _export_verified(name, quantize_checkpoint(module, source, folder), GraphSettings(accuracy_level=1))[1]


def _int8_error(name: str, model: OnnxModel, quantized: OnnxModel) -> str:
    expected, logits = (_logits(name, candidate) for candidate in (model, quantized))
    spread = np.sqrt(((expected - expected.mean(0)) ** 2).mean())
    error = np.sqrt(((logits - expected) ** 2).mean()) / spread
    return f"{error:.1%}" if error < _MAX_INT8_ERROR else f"no: {error:.0%} of the spread"


def _logits(name: str, model: OnnxModel) -> np.ndarray:
    """Return the logits [sequences * tokens, vocabulary]."""
    inputs, _ = examples(name, _SEQUENCES, seed=1)
    targets: Sequence[np.ndarray] = decoder_ids(_SEQUENCES, _LENGTH)
    rows = ({key: array[row] for key, array in inputs.items()} for row in range(_SEQUENCES))
    return np.concatenate([teacher_forced_logits(model, *pair) for pair in zip(rows, targets, strict=True)])
