"""Files whose values have no names in common with the reference: faults planted in them are named with their layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch

from compress.formats.intermediate_values import Values, longest_length
from compress.formats.litert.conversion import quantize_litert
from compress.formats.onnx.export import export_onnx
from compress.formats.onnx.intermediate_values import OnnxParts
from compress.formats.targets import TARGETS
from compress.inspection.layer_comparison import FormatComparison, compare_parts, open_value_graph
from compress.inspection.layers import node_modules
from compress.inspection.value_matching import alike, match, orders_of
from compress.models.model import TorchModel
from compress.utils.errors import InputError
from compress.utils.progress import SilentProgress

LENGTHS = (9, 14, 16, 12)
WORDS = "bert.embeddings.word_embeddings.weight"
EPSILON = float(np.float32(1e-12))


def model() -> TorchModel:
    """A tiny encoder whose normalisations do something."""
    encoder = tiny.encoder()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in encoder.module.named_parameters():
            if "LayerNorm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return encoder


def batches() -> list[Values]:
    generator = np.random.default_rng(0)
    return [
        {"input_ids": generator.integers(5, 100, (1, length)), "attention_mask": np.ones((1, length), np.int64)}
        for length in LENGTHS
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The reference, and files of the same weights."""
    pytest.importorskip("litert_torch")
    from compress.formats.litert.conversion import to_litert

    encoder, root = model(), tmp_path_factory.mktemp("matched")
    examples = tiny.context().encode("train", encoder)
    onnx.save(export_onnx(encoder, examples, opset=None, fusions=False).graph, root / "model.onnx")
    plain = to_litert(encoder, examples, (16, 24))
    comparison = {"onnx": root / "model.onnx", "litert": root / "plain.tflite", "litert-int8": root / "int8.tflite"}
    comparison["litert"].write_bytes(plain)
    comparison["litert-int8"].write_bytes(quantize_litert(plain, "int8", WORDS, 4, 32))
    return comparison


def compare(reference: Path, file: Path) -> FormatComparison:
    given = batches()
    parts = open_value_graph(file, TARGETS["litert"], longest_length(given))
    assert parts.shaped is not None
    graph, shaped = onnx.load(reference), parts.shaped(given)
    assert {batch["input_ids"].shape for batch in shaped} == {(1, 16)}
    known = match(parts, OnnxParts(graph), shaped[0])
    comparison = compare_parts(graph, node_modules(reference), known, shaped, SilentProgress())
    assert comparison is not None
    return comparison


@pytest.mark.parametrize("name", ["litert", "litert-int8"])
def test_a_healthy_file_departs_nowhere(files: dict[str, Path], name: str) -> None:
    comparison = compare(files["onnx"], files[name])
    # Of each layer six products with weights, two of attention, its softmax, GELU, two sums and two normalisations.
    assert comparison.departures == () and comparison.parts >= 2 * 14
    if name == "litert-int8":
        assert 1e-3 < comparison.answers < 0.2 and comparison.worst.bits in (4, 8)
    else:
        assert comparison.answers < 1e-5 and comparison.worst.error < 1e-5


FAULTS = {
    "scale of value": "attention.self.value",
    "scale of query": "attention.self.query",
    "transposed": "attention.output.dense",
    "epsilon": "attention.output.LayerNorm",
}
"""What is wrong, and in which part of a layer. LiteRT folds a factor into the query's weights."""


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("litert", "scale of query"),
        ("litert", "epsilon"),
        ("litert-int8", "scale of value"),
        ("litert-int8", "transposed"),
    ],
)
def test_a_planted_fault_is_named_with_its_layer(files: dict[str, Path], tmp_path: Path, name: str, fault: str) -> None:
    """Nothing else departs but what LiteRT has put the same fault into: it folds a norm's weights into its readers."""
    layer = int(np.random.default_rng([len(name), len(fault)]).integers(tiny.LAYERS))
    module = f"bert.encoder.layer.{layer}.{FAULTS[fault]}"
    comparison = compare(files["onnx"], plant(files[name], tmp_path / "model.tflite", module, fault))
    first, *others = comparison.departures
    assert first.layer == module
    assert {item.layer for item in others} <= (
        {f"bert.encoder.layer.{layer}.intermediate.dense"} if fault == "epsilon" else set()
    )
    assert first.error > 4 * first.explained and first.before < first.after and first.alone is not None
    if name == "litert":
        assert first.before < 1e-5 and first.alone == pytest.approx(comparison.answers, rel=1e-2)
    else:
        assert first.alone > comparison.answers / 10


def plant(source: Path, file: Path, module: str, fault: str) -> Path:
    """In every graph of the file, which share what they store."""
    from ai_edge_litert.tools import flatbuffer_utils

    changed: Any = flatbuffer_utils.read_model(str(source))
    if fault == "epsilon":
        for graph in changed.subgraphs:
            _set_epsilon(changed, graph, place=1 + 2 * int(module.split(".")[3]))
    else:
        weight = dict(model().module.named_parameters())[f"{module}.weight"].detach().numpy()
        at_fault = _like(changed, weight)
        assert len({item.buffer for item in at_fault}) == 1 and len(at_fault) == len(changed.subgraphs)
        if fault == "transposed":
            changed.buffers[at_fault[0].buffer].data = np.ascontiguousarray(_values(changed, at_fault[0]).T).view(
                np.uint8
            )
        elif _scales(at_fault[0]).size:
            for item in at_fault:
                item.quantization.scale = [1.5 * scale for scale in item.quantization.scale]
        else:
            changed.buffers[at_fault[0].buffer].data = (_values(changed, at_fault[0]) * np.float32(1.5)).view(np.uint8)
        changed.buffers[at_fault[0].buffer].data = np.ravel(changed.buffers[at_fault[0].buffer].data)
    file.write_bytes(flatbuffer_utils.convert_object_to_bytearray(changed))
    return file


def _values(content: Any, tensor: Any) -> np.ndarray:
    kind = np.int8 if _scales(tensor).size else np.float32
    return np.asarray(content.buffers[tensor.buffer].data, np.uint8).view(kind).reshape(tensor.shape)


def _scales(tensor: Any) -> np.ndarray:
    scales = None if tensor.quantization is None else tensor.quantization.scale
    return np.array([] if scales is None else scales, np.float32).reshape(-1, 1)


def _like(content: Any, weight: np.ndarray) -> list[Any]:
    """The stored matrices that are ``weight``, but for rounding and factors that the converter folded in."""
    comparison = []
    for tensor in (tensor for graph in content.subgraphs for tensor in graph.tensors):
        if list(tensor.shape if tensor.shape is not None else []) == list(weight.shape):
            data = content.buffers[tensor.buffer].data
            if data is not None and len(data) in (weight.size, 4 * weight.size):
                values = _values(content, tensor) * (_scales(tensor) if _scales(tensor).size else 1)
                if np.corrcoef(values.ravel(), weight.ravel())[0, 1] > 0.9:
                    comparison.append(tensor)
    return comparison


def _set_epsilon(content: Any, graph: Any, place: int) -> None:
    """Of the normalisation at ``place``, counted from the embeddings' own."""
    from ai_edge_litert.schema_py_generated import BufferT

    def is_epsilon(tensor: Any) -> bool:
        data = content.buffers[tensor.buffer].data
        return data is not None and len(data) == 4 and np.asarray(data, np.uint8).view(np.float32)[0] == EPSILON

    readers = [item for item in graph.operators if any(is_epsilon(graph.tensors[read]) for read in item.inputs)]
    assert len(readers) == 1 + 2 * tiny.LAYERS
    buffer = BufferT()
    buffer.data = np.array([0.2], np.float32).view(np.uint8)
    content.buffers.append(buffer)
    tensor = graph.tensors[readers[place].inputs[1]]
    changed = type(tensor)()
    changed.__dict__.update(vars(tensor))
    changed.buffer = len(content.buffers) - 1
    graph.tensors.append(changed)
    readers[place].inputs = [readers[place].inputs[0], len(graph.tensors) - 1]


def test_a_text_longer_than_every_signature_is_refused(files: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="holds 25 tokens"):
        open_value_graph(files["litert"], TARGETS["litert"], 25)


def test_the_likest_order_of_axes_is_found_with_its_error() -> None:
    """By the definition: the root mean square of the differences over the deviation."""
    generator = np.random.default_rng(0)
    array = generator.normal(1, 2, (1, 3, 4, 5))
    noise = generator.normal(0, 0.01, (1, 3, 4, 5))
    # Attention's keys, [1, heads, width, tokens], as a product's [tokens, heads * width].
    other = (array + noise)[0].transpose(2, 0, 1).reshape(5, 12)
    plain = array.reshape(60) + 0.5
    (moved, nearer) = alike({"a": array}, {"b": other, "c": plain, "another size": np.ones(59)})
    assert (moved.own, moved.shape, moved.order) == ("b", (1, 3, 4, 5), (2, 0, 1))
    np.testing.assert_array_equal(moved.back(other), array + noise)
    assert moved.error == pytest.approx(np.sqrt(np.square(noise).mean()) / array.std(), abs=1e-6)
    assert nearer.order == (0, 1, 2) and nearer.error == pytest.approx(0.5 / array.std(), abs=1e-6)
    assert orders_of((1, 3, 1, 2)) == [(0, 1), (1, 0)]
