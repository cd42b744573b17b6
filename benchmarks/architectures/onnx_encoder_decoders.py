"""Encoders with their decoders as two ONNX graphs: equal to torch, in fp32 and in 4 bits, fused, and INT8 right.

Answers are read in one go, and again token by token. The error of INT8 is a share of the spread of the logits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import numpy as np
import onnx_ir as ir
from onnx_decoders import in_four_bits
from tiny_encoder_decoders import answered, examples, save
from trials import Trial

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

if TYPE_CHECKING:
    from compress.stages.base import Context

_TOLERANCE, _MORE = 1e-3, 10
_RIGHT = 0.2
"""Of the spread of the logits, which INT8 may be off."""
_ANSWERS, _ANSWER_LENGTH = 8, 6


def judge(name: str, folder: Path) -> dict[str, str]:
    """The largest difference of a logit in fp32 and in 4 bits, how attention is written, and the error of INT8."""
    module, source = save(name, folder / "float"), Checkpoint(folder / "float")
    model, difference = _proven(name, source, GraphSettings())
    nodes = Counter(
        node.op_type
        for graph in model.graphs.values()
        for node in ir.traversal.RecursiveGraphIterator(ir.from_proto(graph).graph)
    )
    # Attention to the encoder stands in both branches of an If.
    cells = {"ONNX": difference, "attention": f"{nodes['MultiHeadAttention'] - nodes['If']} fused"}
    quietly = cast("Context", SimpleNamespace(note=lambda _: None))
    for column, built_graph in (
        ("4 bits", lambda: _in_four_bits(name, module, source, folder / "few")),
        ("INT8 error", lambda: _int8_error(name, model, OnnxInt8().run(model, quietly))),
    ):
        try:
            cells[column] = built_graph()
        except CompressError as error:
            cells[column] = f"no: {error.what}"
    return cells


TRIAL = Trial(("ONNX", "4 bits", "attention", "INT8 error"), judge)


def _proven(name: str, source: Checkpoint, settings: GraphSettings) -> tuple[OnnxModel, str]:
    model = export_encoder_decoder(source, settings)
    given, start = examples(name)
    equality = verify_encoder_decoder(model, source, [given], [start], _TOLERANCE, 1.0, more=_MORE)
    return model, f"{equality.difference:.0e}"


def _in_four_bits(name: str, module: object, source: Checkpoint, folder: Path) -> str:
    return _proven(name, in_four_bits(module, source, folder), GraphSettings(accuracy_level=1))[1]


def _int8_error(name: str, model: OnnxModel, made: OnnxModel) -> str:
    expected, answers = (_answers(name, candidate) for candidate in (model, made))
    spread = np.sqrt(((expected - expected.mean(0)) ** 2).mean())
    error = np.sqrt(((answers - expected) ** 2).mean()) / spread
    return f"{error:.1%}" if error < _RIGHT else f"no: {error:.0%} of the spread"


def _answers(name: str, model: OnnxModel) -> np.ndarray:
    """Logits [answers * tokens, vocabulary]."""
    given, _ = examples(name, _ANSWERS, seed=1)
    rows: Sequence[np.ndarray] = answered(_ANSWERS, _ANSWER_LENGTH)
    one_by_one = ({key: array[row] for key, array in given.items()} for row in range(_ANSWERS))
    return np.concatenate([teacher_forced_logits(model, *pair) for pair in zip(one_by_one, rows, strict=True)])
