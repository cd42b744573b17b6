"""Tests of the stages `trim_vocabulary`, `onnx`, `onnx_int8` and `gguf`: effects of parameters, and notes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import sentences
import tiny
import torch
from exports import exported, run
from mergeable import save_mergeable_llama, train_tokenizer
from quantized import quantize_tiny_llama, save_tiny_llama
from stage_context import Notes, stage_context

from compress.data.dataset import Dataset
from compress.formats.gguf import export as gguf_export
from compress.formats.gguf.model import GgufModel, read_gguf
from compress.formats.gguf.stage import Gguf
from compress.formats.onnx import export as onnx_export
from compress.formats.onnx.model import FLOAT_GRAPH, QUANTIZED_GRAPH, OnnxModel
from compress.formats.onnx.stage import Onnx
from compress.models.checkpoint import Checkpoint, QuantizedCheckpoint
from compress.models.model import TorchModel
from compress.models.sentence_modules import Normalize, SentenceModules
from compress.pipeline.integrity import IntegrityCheck, ModelSize, PredictionProbe, inspector_of
from compress.stages.base import Context
from compress.stages.onnx_int8.stage import OnnxInt8
from compress.stages.reduce_dimensions import ReduceDimensions
from compress.stages.trim_vocabulary import TrimVocabulary
from compress.tasks.inference import predict
from compress.tasks.registry import TASKS
from compress.utils.errors import DataError, IntegrityError, StageError

TRAIN = ["the film was great", "the film was boring", "a clumsy plot", "great"]
MORE = ["superb music", "superb cast"]


def context(max_length: int = 24) -> tuple[Context, Notes]:
    notes = Notes()
    tables = {
        "train": pa.table({"text": TRAIN, "label": ["good", "bad", "bad", "good"]}),
        "test": pa.table({"text": ["lovely noisy"], "label": ["good"]}),
    }
    data = Dataset(TASKS[tiny.TASK].columns, tables, tiny.LABELS, pa.table({"text": MORE}))
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
    assert notes.said[0] == f"trim_vocabulary: {len(model.processor)} of {tokens_before} tokens kept"


@pytest.mark.parametrize(
    ("train", "min_count", "share"),
    [
        # 2 special tokens and 12 words a row.
        (["the film was great plot the film was great plot great great"] * 2 + ["the " * 11 + "boring"], 1, 1 / 42),
        (TRAIN, 1, 4 / 20),
        (TRAIN, 2, 12 / 20),
    ],
)
def test_share_of_removed_tokens_in_new_texts_is_estimated(train: list[str], min_count: int, share: float):
    notes, columns = Notes(), TASKS[tiny.TASK].columns
    table = pa.table({"text": train, "label": ["good"] * len(train)})
    given = tiny.context(Dataset(columns, {"train": table}, tiny.LABELS, None), max_length=24)
    TrimVocabulary(min_count=min_count).run(tiny.encoder(), Context(**{**vars(given), "progress": notes}))
    expected = [
        f"trim_vocabulary: about {share:.0%} of the tokens of new texts were removed, which can lower the accuracy; "
        "leave the stage out, or count more texts (use_unlabeled: true)"
    ]
    assert notes.said[1:] == (expected if share > 0.03 else [])


def test_predictions_on_training_text_are_unchanged():
    model = tiny.encoder()
    expected = tiny.logits(model, TRAIN)
    TrimVocabulary(characters="seen").run(model, context()[0])
    torch.testing.assert_close(tiny.logits(model, TRAIN), expected, rtol=0, atol=0)


def test_positions_are_truncated_to_the_recipe_length():
    model = TrimVocabulary().run(tiny.encoder(), context(max_length=9)[0])
    assert model.module.bert.embeddings.position_embeddings.num_embeddings == 9


def test_export_note_reports_deviation_and_agreement(monkeypatch: pytest.MonkeyPatch):
    given, notes = context()
    model = exported().model
    graph = exported().graph()
    exported_graph = onnx_export.ExportedGraph(graph, {"attention": 2, "first_token": 6})
    monkeypatch.setattr(onnx_export, "export_onnx", lambda *_: exported_graph)
    result = Onnx().run(model, given)
    assert isinstance(result, OnnxModel) and result.file_name == FLOAT_GRAPH and result.graph is graph
    check, rewrites = notes.said
    assert check.startswith("onnx: checked, logits differ by at most ") and check.endswith(" is allowed")
    assert rewrites == "onnx: graph rewrites: attention 2, first_token 6"
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= set(result.companions)


def test_deviating_export_stops_the_run(monkeypatch: pytest.MonkeyPatch):
    model = tiny.encoder(seed=1)
    exported_graph = onnx_export.ExportedGraph(exported().graph())
    monkeypatch.setattr(onnx_export, "export_onnx", lambda *_: exported_graph)
    with pytest.raises(IntegrityError, match="logits differ from torch"):
        Onnx().run(model, context()[0])


@pytest.mark.parametrize(("bits", "tables"), [(8, 1), (4, 1), (32, 0)])
def test_embeddings_and_matmuls_are_quantized(bits: int, tables: int):
    given, notes = context()
    float_model = OnnxModel(exported().graph(), FLOAT_GRAPH, {"config.json": b"{}"})
    quantized = OnnxInt8(embedding_bits=bits, reduce_range=False).run(float_model, given)
    counts = Counter(node.op_type for node in quantized.graph.graph.node)
    assert counts["MatMulInteger"] == 3 * tiny.LAYERS + 2 and counts["QAttention"] == tiny.LAYERS
    # Word embeddings are looked up; position embeddings are a slice of their table.
    assert counts["GatherBlockQuantized"] == tables
    assert quantized.file_name == QUANTIZED_GRAPH and quantized.companions == {"config.json": b"{}"}
    remarks = [
        f"onnx_int8: embedding tables at {bits} bits: 1",
        "onnx_int8: tables whose rows are read in order, at 8 bits: 1",
    ]
    assert notes.said == (remarks if bits < 32 else [])


def test_smaller_blocks_reduce_the_error():
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


TEXTS = ["a text of no meaning whatever", "another one, which is longer", "and then a third of them"] * 4


def export(checkpoint: Checkpoint, folder: Path, texts: list[str] = TEXTS, **fields: Any) -> tuple[Any, list[str]]:
    notes = Notes()
    data = Dataset(TASKS["text-generation"].columns, {"train": pa.table({"text": texts})}, ())
    made = stage_context("text-generation", data, 32, progress=notes, scratch=folder / "scratch")
    return Onnx(**fields).run(checkpoint, made), notes.said


def test_float_checkpoint_export_reports_its_deviation(tmp_path: Path) -> None:
    source = save_tiny_llama(tmp_path / "source")
    model, (note,) = export(source, tmp_path)
    assert model.file_name == "model.onnx"
    assert "from torch in fp32" in note and "8 bits" not in note
    with pytest.raises(IntegrityError, match="differ from torch"):
        export(source, tmp_path, tolerance=1e-12)
    with pytest.raises(DataError, match="too short"):
        export(source, tmp_path, ["abc"])


def test_quantized_checkpoint_export_reports_rounding_error(tmp_path: Path) -> None:
    quantized = quantize_tiny_llama(save_tiny_llama(tmp_path / "source"), tmp_path / "quantized")
    model, said = export(quantized, tmp_path, rounding_limit=0.5)
    assert model.file_name == "model_q4.onnx"
    assert "8-bit activations change them by" in said[0]
    with pytest.raises(IntegrityError, match="8 bits"):
        export(quantized, tmp_path, rounding_limit=1e-4)
    _, exact = export(quantized, tmp_path, accuracy_level=1, rounding_limit=1e-4)
    assert "8 bits" not in exact[0]


def gguf_context(folder: Path, progress: Notes | None = None) -> Context:
    data = Dataset(TASKS["text-generation"].columns, {"train": tiny.table(32).select(["text"])}, ())
    return stage_context("text-generation", data, progress=progress, scratch=folder / "scratch")


def quantized(folder: Path) -> QuantizedCheckpoint:
    checkpoint = quantize_tiny_llama(save_mergeable_llama(folder / "source"), folder / "quantized")
    train_tokenizer().save_pretrained(checkpoint.folder)
    return checkpoint


def test_integers_are_kept_exactly_and_reported(tmp_path: Path) -> None:
    notes = Notes()
    converted = Gguf().run(quantized(tmp_path), gguf_context(tmp_path, notes))
    assert notes.said == ["gguf: 20 of 20 tensors are stored exactly"]
    assert sorted(path.name for path in converted.folder.iterdir()) == [
        *("chat_template.jinja", "config.json", "model.gguf", "tokenizer.json", "tokenizer_config.json")
    ]


def test_rounded_tensors_are_reported(tmp_path: Path) -> None:
    notes = Notes()
    Gguf().run(save_mergeable_llama(tmp_path / "source"), gguf_context(tmp_path, notes))
    # Two norms a layer and the last one are F32; the table and seven matrices a layer are rounded to float16.
    assert notes.said[0].startswith("gguf: 5 of 20 tensors are stored exactly, the others within ")


def check(converted: GgufModel, folder: Path) -> str:
    """Return the result of the prediction check on a stage's output."""
    integrity = IntegrityCheck("gguf", Gguf().output_spec())
    context = gguf_context(folder)
    probe = PredictionProbe(
        load=lambda place: GgufModel.load(place, "text-generation"),
        encode=lambda processor: context.task.encode(context.data.split("train"), processor, None, 24),
    )
    integrity.check(converted, {}, ModelSize(1000, 1000), converted.folder, probe)
    return dict(integrity.findings)["predictions"]


def test_file_with_wrong_weights_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = quantized(tmp_path)
    pack = gguf_export.pack_blocks

    def wrong(weight: Any, kind: str) -> Any:
        packed = pack(weight, kind)
        packed[0, 2] ^= 1
        return packed

    monkeypatch.setattr(gguf_export, "pack_blocks", wrong)
    with pytest.raises(StageError, match="came back from the file with a difference"):
        Gguf().run(checkpoint, gguf_context(tmp_path))


def test_model_is_saved_as_links_and_loads_again(tmp_path: Path) -> None:
    converted = Gguf().run(quantized(tmp_path), gguf_context(tmp_path))
    (tmp_path / "saved").mkdir()
    converted.save(tmp_path / "saved")
    assert converted.file.samefile(tmp_path / "saved" / "model.gguf")
    assert GgufModel.load(tmp_path / "saved", "text-generation").file == tmp_path / "saved" / "model.gguf"


def test_integrity_sees_every_tensor_and_asks_llama_cpp(tmp_path: Path) -> None:
    checkpoint = quantized(tmp_path)
    converted = Gguf().run(checkpoint, gguf_context(tmp_path))
    arrays = dict(inspector_of(converted).float_arrays())
    expected = checkpoint.weight("model.layers.0.mlp.up_proj").numpy()
    assert np.array_equal(arrays["blk.0.ffn_up.weight"].ravel(), expected.ravel())
    assert len(arrays) == len(inspector_of(converted).digests()) == 20
    assert check(converted, tmp_path) == "finite and not constant"


def test_non_finite_scale_is_detected(tmp_path: Path) -> None:
    converted = Gguf().run(quantized(tmp_path), gguf_context(tmp_path))
    (tensor,) = [tensor for tensor in read_gguf(converted.file).tensors if tensor.name == "blk.1.ffn_up.weight"]
    content = bytearray(converted.file.read_bytes())
    content[tensor.start : tensor.start + 2] = b"\x00\x7e"  # a NaN of float16
    converted.file.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"'blk\.1\.ffn_up\.weight' holds NaN"):
        check(converted, tmp_path)


def test_report_says_when_llama_cpp_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted = Gguf().run(quantized(tmp_path), gguf_context(tmp_path))
    monkeypatch.setattr("compress.formats.gguf.llama_cpp_library.PACKAGE", "no-such-package")
    assert check(converted, tmp_path).startswith("not looked at: the package no-such-package is not")


def test_reduced_embeddings_use_leading_singular_vectors() -> None:
    model = sentences.encoder(SentenceModules(sentences.WIDTH, steps=(Normalize(),)))
    context = sentences.context()
    examples = context.encode("train", model)
    exact = predict(model.module, examples).astype(np.float64)
    reduced = ReduceDimensions(dimensions=6).run(model, context)
    after = predict(model.module, context.encode("train", reduced)).astype(np.float64)
    _, _, rows = np.linalg.svd(exact, full_matrices=False)
    expected = exact @ rows[:6].T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert after.shape == (len(examples), 6)
    # Signs of singular vectors are arbitrary, so products are compared.
    np.testing.assert_allclose(after @ after.T, expected @ expected.T, atol=1e-4)


@pytest.mark.parametrize("dimensions", [sentences.WIDTH, sentences.WIDTH + 1])
def test_keeping_all_dimensions_is_refused(dimensions: int) -> None:
    with pytest.raises(StageError, match=f"{dimensions} of {sentences.WIDTH} dimensions"):
        ReduceDimensions(dimensions=dimensions).run(sentences.encoder(), sentences.context())


def test_too_little_text_is_refused() -> None:
    with pytest.raises(StageError, match="12 training texts do not span 20"):
        ReduceDimensions(dimensions=20).run(sentences.encoder(), sentences.context(sentences.dataset(train=6)))
