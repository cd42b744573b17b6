"""Models that read an image as tokens of a text, as three graphs under transformers.js' names, and their proof."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from compress.checkpoints.adapter import load_adapted
from compress.checkpoints.checkpoint import Checkpoint
from compress.checkpoints.hollow import hollow_model
from compress.formats.onnx.decoder.fill import GraphSettings
from compress.formats.onnx.decoder.folder import companions, file_name, written
from compress.formats.onnx.decoder.nodes import Nodes
from compress.formats.onnx.decoder.parity import Equality, held_to, rounding_of, with_level
from compress.formats.onnx.decoder.parts import BATCH, EMBEDS, IDS, embedded
from compress.formats.onnx.decoder.sight import export_sight
from compress.formats.onnx.decoder.weights import Weights
from compress.formats.onnx.model import DECODER, EMBED_TOKENS, VISION, OnnxModel
from compress.formats.onnx.runtimes.onnxruntime import session_of
from compress.runtimes.image_answers import PIXELS, EmbeddedDecoder
from compress.tasks.task import Examples

if TYPE_CHECKING:
    pass

_LENGTH = "sequence_length"


@dataclass(frozen=True)
class ImageReader:
    """Three graphs; ``difference``: the largest of a feature from torch; ``unfused``: why attention is no operator."""

    model: OnnxModel
    difference: float
    unfused: str


def export_image_reader(
    checkpoint: Checkpoint, examples: Examples, settings: GraphSettings, tolerance: float
) -> ImageReader:
    """The graphs of a checkpoint; that which sees is proven on the pixels of ``examples``, `prove_image_reader` does
    the whole.

    Raises `ModelError` for a model that cannot be traced, `IntegrityError` for features that differ.
    """
    seen, difference = export_sight(checkpoint, examples, tolerance)
    trace, decoder = written(checkpoint, embedded, settings)
    parts = {VISION: seen.graph, EMBED_TOKENS: _table(checkpoint, settings), DECODER: decoder}
    graphs = {file_name(f"{name}.onnx", graph): graph for name, graph in parts.items()}
    (name, first), *others = graphs.items()
    model = OnnxModel(first, name, companions(checkpoint, graphs), dict(others))
    return ImageReader(model, difference, trace.unfused or seen.unfused)


def _table(checkpoint: Checkpoint, settings: GraphSettings) -> onnx.ModelProto:
    """Rows of the table by `input_ids`, times what the table's own class multiplies them by."""
    model = hollow_model(checkpoint.folder)
    table = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is table)
    nodes = Nodes()
    ids = nodes.input(IDS, ir.DataType.INT64, [BATCH, _LENGTH])
    rows = Weights(checkpoint, nodes, settings.accuracy_level).look_up(name, ids)
    scale = getattr(table, "scalar_embed_scale", getattr(table, "embed_scale", None))
    if scale is not None:
        rows = nodes.op("Mul", name, [rows, nodes.constant(f"{name}.scale", np.array(float(scale), np.float32))])
    nodes.output(rows, EMBEDS, ir.DataType.FLOAT, [BATCH, _LENGTH, table.embedding_dim])
    return ir.to_proto(nodes.model(type(table).__name__))


def prove_image_reader(
    model: OnnxModel, checkpoint: Checkpoint, examples: Examples, image: int, tolerance: float, rounding_limit: float
) -> Equality:
    """Compare the three graphs with torch on ``examples``, prompts with their answers, one by one.

    ``image`` is the token in whose place features stand. Each is read in one go, and again with the tokens behind its
    image one by one. Raises `IntegrityError` for a difference above ``tolerance`` in fp32, or above ``rounding_limit``
    as shipped.
    """
    module = load_adapted(checkpoint)
    expected = [_logits(module, batch) for batch in _each(examples)]
    del module
    exact = with_level(model)

    def answers() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        graphs = opened_reader(exact, image)
        for batch, wanted in zip(_each(examples), expected, strict=True):
            yield wanted, graphs.begin(batch[IDS], batch[PIXELS])
            behind = int(np.flatnonzero(batch[IDS][0] == image)[-1]) + 1
            start, *tokens = np.split(batch[IDS], range(behind, batch[IDS].shape[1]), axis=1)
            found = [graphs.begin(start, batch[PIXELS]), *map(graphs.read, tokens)]
            yield wanted, np.concatenate(found, axis=1)

    difference = held_to(tolerance, answers())
    if exact is model:
        return Equality(difference, 0.0, 1.0)
    graphs = opened_reader(model, image)
    shipped = np.concatenate([graphs.begin(batch[IDS], batch[PIXELS])[0] for batch in _each(examples)])
    return Equality(difference, *rounding_of(shipped, np.concatenate([one[0] for one in expected]), rounding_limit))


def opened_reader(model: OnnxModel, image: int) -> EmbeddedDecoder:
    """The graphs, on the processor."""
    vision, table, decoder = map(session_of, model.graphs.values())
    return EmbeddedDecoder(vision, table, decoder, image, "the stage's graphs")


def _each(examples: Examples) -> Iterator[dict[str, np.ndarray]]:
    return (examples.batch([place]) for place in range(len(examples)))


def _logits(module: Any, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    with torch.inference_mode():
        given = {name: torch.from_numpy(array) for name, array in batch.items()}
        logits: np.ndarray = module(**given).logits.numpy()
    return logits
