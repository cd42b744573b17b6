from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from decoder_graphs import TinyDecoder, write
from onnx import TensorProto, helper, numpy_helper

from compress.formats.generation.decoder import Decoder
from compress.formats.onnx.runtimes.onnxruntime import RUNTIME
from compress.formats.runtime import TensorType
from compress.formats.targets import TARGETS
from compress.utils.errors import InputError, ModelError, StageError

TINY = TinyDecoder()
PROMPT = [7, 3, 3, 41, 19]


def opened(folder: Path) -> Decoder:
    return Decoder(RUNTIME.open(folder, TARGETS["cpu"], threads=1), str(folder))


def generated(decoder: Decoder, ids: list[int], count: int) -> list[int]:
    found = [decoder.prefill(ids)]
    while len(found) < count:
        found.append(decoder.step(found[-1]))
    return found


def test_a_session_tells_types_and_shapes(tmp_path: Path) -> None:
    session = RUNTIME.open(TINY.write(tmp_path / "m"), TARGETS["cpu"], threads=1)
    assert session.input_types["input_ids"] == TensorType("int64", ("batch", "length"))
    assert session.input_types["past_key_values.1.value"] == TensorType("float32", ("batch", 2, "past", 8))
    assert session.output_types["logits"] == TensorType("float32", ("batch", "length", 50))


@pytest.mark.parametrize("cache", [True, False])
def test_tokens_are_those_of_whole_sequences_in_numpy(tmp_path: Path, cache: bool) -> None:
    decoder = opened(TINY.write(tmp_path / "m", cache))
    expected = TINY.continuation(PROMPT, 20)
    assert len(set(expected)) > 3, "a model that repeats itself proves little"
    assert generated(decoder, PROMPT, 20) == expected
    assert decoder.cached is cache
    assert decoder.vocabulary == 50


def test_a_prompt_begins_anew(tmp_path: Path) -> None:
    decoder = opened(TINY.write(tmp_path / "m"))
    for prompt in ([1, 2, 3], PROMPT, [9]):
        assert generated(decoder, prompt, 6) == TINY.continuation(prompt, 6)


def changed(change: Callable[[onnx.ModelProto], None], folder: Path, cache: bool = True) -> Path:
    model = TINY.model(cache)
    change(model)
    return write(model, folder)


def test_half_precision_caches_and_short_integers(tmp_path: Path) -> None:
    """The cache as fp16 and ids as int32, as other exporters write them; cast on the way in and out."""

    def narrow(model: onnx.ModelProto) -> None:
        graph = model.graph
        for value in (*graph.input, *graph.output):
            small = value.name.startswith(("past", "present"))
            if value.name == "logits":
                continue
            kind = TensorProto.FLOAT16 if small else TensorProto.INT32
            wide = TensorProto.FLOAT if small else TensorProto.INT64
            outward = value.name.startswith("present")
            inner = f"{value.name}_wide"
            for node in graph.node:
                names = node.output if outward else node.input
                for place, name in enumerate(names):
                    if name == value.name:
                        names[place] = inner
                if outward:
                    node.input[:] = [inner if name == value.name else name for name in node.input]
            value.type.tensor_type.elem_type = kind
            source, sink, to = (inner, value.name, kind) if outward else (value.name, inner, wide)
            cast = helper.make_node("Cast", [source], [sink], to=to)
            graph.node.insert(len(graph.node) if outward else 0, cast)

    decoder = opened(changed(narrow, tmp_path / "m"))
    # The margins between the likeliest tokens are far wider than half precision's rounding of keys and values.
    margins = [np.sort(TINY.logits(PROMPT + TINY.continuation(PROMPT, n))[-1])[-2:] for n in range(6)]
    assert min(high - low for low, high in margins) > 0.01
    assert generated(decoder, PROMPT, 6) == TINY.continuation(PROMPT, 6)


def drop_output(model: onnx.ModelProto) -> None:
    model.graph.output.pop()


def rename_logits(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = model.graph.node[-1].output[0] = "scores"


def foreign_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("token_type_ids", TensorProto.INT64, ["batch", "length"]))


def free_heads(model: onnx.ModelProto) -> None:
    model.graph.input[3].type.tensor_type.shape.dim[1].dim_param = "heads"


def static_cache(model: onnx.ModelProto) -> None:
    model.graph.input[3].type.tensor_type.shape.dim[2].dim_value = 64


def fixed_length(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 8


def classify(model: onnx.ModelProto) -> None:
    """As a classifier does: logits of the first token only."""
    graph = model.graph
    graph.node[-1].output[0] = "all"
    graph.node.append(helper.make_node("Gather", ["all", "zero"], ["logits"], axis=1))
    del graph.output[0].type.tensor_type.shape.dim[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_output, r"inputs without the outputs present\.1\.value"),
        (rename_logits, r"outputs scores, present\.0\.key"),
        (foreign_input, r"inputs input_ids, attention_mask, position_ids, .* and 2 more"),
        (free_heads, r"past_key_values\.0\.key has the shape \['batch', 'heads', 'past', 8\]"),
        (static_cache, r"past_key_values\.0\.key has the shape \['batch', 2, 64, 8\]"),
        (fixed_length, "input_ids takes 8 tokens only"),
        (classify, "logits have the shape"),
    ],
)
def test_a_graph_that_is_no_decoder_is_refused(
    tmp_path: Path, change: Callable[[onnx.ModelProto], None], message: str
) -> None:
    folder = changed(change, tmp_path / "m")
    with pytest.raises(ModelError, match=message) as caught:
        opened(folder)
    assert "past_key_values.N.key" in str(caught.value.expected)
    assert caught.value.where == str(folder)


def test_logits_of_unknown_shape_are_seen_at_the_first_answer(tmp_path: Path) -> None:
    def squeeze(model: onnx.ModelProto) -> None:
        # Which axes go depends on the batch, so that nothing is known of the shape before.
        model.graph.node[-1].output[0] = "all"
        model.graph.node.append(helper.make_node("Squeeze", ["all"], ["logits"]))
        model.graph.output[0].type.tensor_type.ClearField("shape")

    decoder = opened(changed(squeeze, tmp_path / "m"))
    with pytest.raises(ModelError, match=r"logits have the shape \[5, 50\]"):
        decoder.prefill(PROMPT)


def test_logits_that_are_not_finite_stop_it(tmp_path: Path) -> None:
    def poison(model: onnx.ModelProto) -> None:
        (head,) = (stored for stored in model.graph.initializer if stored.name == "head")
        values = numpy_helper.to_array(head).copy()
        values[0, 17] = np.nan
        head.CopyFrom(numpy_helper.from_array(values, "head"))

    decoder = opened(changed(poison, tmp_path / "m"))
    with pytest.raises(StageError, match="not finite"):
        decoder.prefill(PROMPT)


def test_more_tokens_than_positions_are_an_error_of_the_model(tmp_path: Path) -> None:
    decoder = opened(TINY.write(tmp_path / "m"))
    with pytest.raises((InputError, StageError), match=r"(?i)out of.*bound|out of.*range"):
        decoder.prefill([1] * (TINY.positions + 1))
