"""What the stages `trim_vocabulary`, `onnx` and `onnx_int8` do with their parameters, and what they say."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from exports import exported, run

from compress.data.dataset import Dataset
from compress.formats.onnx import export as onnx_export
from compress.formats.onnx.model import FLOAT_GRAPH, QUANTIZED_GRAPH, OnnxModel
from compress.formats.onnx.stage import Onnx
from compress.models.model import TorchModel
from compress.stages.base import Context
from compress.stages.onnx_int8.stage import OnnxInt8
from compress.stages.trim_vocabulary import TrimVocabulary
from compress.tasks.registry import get_task
from compress.utils.errors import IntegrityError
from compress.utils.progress import SilentProgress

TRAIN = ["the film was great", "the film was boring", "a clumsy plot", "great"]
MORE = ["superb music", "superb cast"]


class Notes(SilentProgress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)


def context(max_length: int = 24) -> tuple[Context, Notes]:
    notes = Notes()
    tables = {
        "train": pa.table({"text": TRAIN, "label": ["good", "bad", "bad", "good"]}),
        "test": pa.table({"text": ["lovely noisy"], "label": ["good"]}),
    }
    data = Dataset(get_task(tiny.TASK).columns, tables, tiny.LABELS, pa.table({"text": MORE}))
    stage_context = tiny.context(data, max_length=max_length)
    return Context(**{**vars(stage_context), "progress": notes}), notes


def words_of(model: TorchModel) -> set[str]:
    return {token for token in model.processor.get_vocab() if len(token) > 2 and token[0] not in "[#"}


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({}, {"the", "film", "was", "great", "boring", "clumsy", "plot"}),
        ({"min_count": 2}, {"the", "film", "was", "great"}),
        ({"min_count": 3}, set()),
        (
            {"use_unlabeled": True},
            {"the", "film", "was", "great", "boring", "clumsy", "plot", "superb", "music", "cast"},
        ),
        ({"use_unlabeled": True, "min_count": 2}, {"the", "film", "was", "great", "superb"}),
    ],
)
def test_tokens_are_kept_by_their_count_in_training_text(parameters: dict[str, Any], words: set[str]):
    model, (given, notes) = tiny.encoder(), context()
    tokens_before = len(model.processor)
    TrimVocabulary(**parameters).run(model, given)
    assert words_of(model) == words
    assert notes.said == [f"trim_vocabulary: {len(model.processor)} of {tokens_before} tokens kept"]


def test_predictions_on_training_text_stay():
    model = tiny.encoder()
    expected = tiny.logits(model, TRAIN)
    TrimVocabulary(characters="seen").run(model, context()[0])
    torch.testing.assert_close(tiny.logits(model, TRAIN), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("trim_positions", "rows"), [(True, 9), (False, tiny.POSITIONS)])
def test_positions_are_cut_to_the_recipes_length(trim_positions: bool, rows: int):
    model = TrimVocabulary(trim_positions=trim_positions).run(tiny.encoder(), context(max_length=9)[0])
    assert model.module.bert.embeddings.position_embeddings.num_embeddings == rows


def test_an_export_says_how_close_it_is_and_what_matched(monkeypatch: pytest.MonkeyPatch):
    given, notes = context()
    model = exported().model
    graph = exported().graph()
    exported_graph = onnx_export.ExportedGraph(graph, {"attention": 2, "first_token": 6})
    monkeypatch.setattr(onnx_export, "export_onnx", lambda *_: exported_graph)
    result = Onnx().run(model, given)
    assert isinstance(result, OnnxModel) and result.file_name == FLOAT_GRAPH and result.graph is graph
    (note,) = notes.said
    assert note.startswith("onnx: logits differ by at most ") and note.endswith("rewrites: attention 2, first_token 6")
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= set(result.companions)


def test_an_export_that_differs_stops(monkeypatch: pytest.MonkeyPatch):
    model = tiny.encoder(seed=1)
    exported_graph = onnx_export.ExportedGraph(exported().graph())
    monkeypatch.setattr(onnx_export, "export_onnx", lambda *_: exported_graph)
    with pytest.raises(IntegrityError, match="logits differ from torch"):
        Onnx().run(model, context()[0])


@pytest.mark.parametrize(("bits", "tables"), [(8, 1), (4, 1), (32, 0)])
def test_quantized_tables_and_products(bits: int, tables: int):
    given, notes = context()
    float_model = OnnxModel(exported().graph(), FLOAT_GRAPH, {"config.json": b"{}"})
    quantized = OnnxInt8(embedding_bits=bits, reduce_range=False).run(float_model, given)
    counts = Counter(node.op_type for node in quantized.graph.graph.node)
    assert counts["MatMulInteger"] == 3 * tiny.LAYERS + 2 and counts["QAttention"] == tiny.LAYERS
    # Words are looked up; positions are a piece of their table.
    assert counts["GatherBlockQuantized"] == tables
    assert quantized.file_name == QUANTIZED_GRAPH and quantized.companions == {"config.json": b"{}"}
    remarks = [
        f"onnx_int8: embedding tables at {bits} bits: 1",
        "onnx_int8: tables whose rows are read in order, at 8 bits: 1",
    ]
    assert notes.said == (remarks if bits < 32 else [])


def test_smaller_blocks_come_closer():
    ids = np.arange(5, 105)[:, None].repeat(2, axis=1)
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    original = OnnxModel(exported().graph(), FLOAT_GRAPH, {})
    errors = {}
    for size in (16, 32):
        graph = OnnxInt8(embedding_bits=4, embedding_block_size=size).run(original, context()[0]).graph
        scales = [tensor for tensor in graph.graph.initializer if tensor.name.endswith("embeddings.weight_scales")]
        assert [tensor.dims[1] for tensor in scales] == [tiny.WIDTH // size]
        errors[size] = np.abs(run(graph, **inputs) - run(original.graph, **inputs)).mean()
    assert errors[16] < errors[32]
