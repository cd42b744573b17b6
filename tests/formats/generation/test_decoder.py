"""Tests of decoders and text generation: tokens and texts are compared with numpy and with transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from decoder_graphs import TinyDecoder, write
from onnx import TensorProto, helper, numpy_helper
from tiny_text_to_text import save_tiny_t5
from written_decoders import greedy_tokens

from compress.formats.generation.decoder import Decoder
from compress.formats.generation.seq2seq import TextWriter, read_rules
from compress.formats.onnx.runtimes.onnxruntime import RUNTIME
from compress.formats.runtime import Batch, TensorType
from compress.formats.targets import TARGETS
from compress.utils.errors import ModelError, StageError

TINY = TinyDecoder()
PROMPT = [7, 3, 3, 41, 19]


def opened(folder: Path) -> Decoder:
    return Decoder(RUNTIME.open(folder, TARGETS["cpu"], threads=1), str(folder))


def test_session_reports_types_and_shapes(tmp_path: Path) -> None:
    session = RUNTIME.open(TINY.write(tmp_path / "m"), TARGETS["cpu"], threads=1)
    assert session.input_types["input_ids"] == TensorType("int64", ("batch", "length"))
    assert session.input_types["past_key_values.1.value"] == TensorType("float32", ("batch", 2, "past", 8))
    assert session.output_types["logits"] == TensorType("float32", ("batch", "length", 50))


@pytest.mark.parametrize("cache", [True, False])
def test_cached_decoding_matches_full_sequences_in_numpy(tmp_path: Path, cache: bool) -> None:
    decoder = opened(TINY.write(tmp_path / "m", cache))
    # Each prompt starts a new sequence.
    for prompt, count in (([1, 2, 3], 6), (PROMPT, 20), ([9], 6)):
        assert greedy_tokens(decoder, prompt, count) == TINY.continuation(prompt, count)
    assert len(set(TINY.continuation(PROMPT, 20))) > 3, "a model that repeats itself proves little"
    assert (decoder.cached, decoder.vocabulary) == (cache, 50)


def changed(change: Callable[[onnx.ModelProto], None], folder: Path, cache: bool = True) -> Path:
    model = TINY.model(cache)
    change(model)
    return write(model, folder)


def test_fp16_cache_and_int32_ids_are_supported(tmp_path: Path) -> None:
    """Other exporters write an fp16 cache and int32 ids; Cast nodes at the inputs and outputs imitate their graphs."""

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
                for index, name in enumerate(names):
                    if name == value.name:
                        names[index] = inner
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
    assert greedy_tokens(decoder, PROMPT, 6) == TINY.continuation(PROMPT, 6)


def drop_output(model: onnx.ModelProto) -> None:
    model.graph.output.pop()


def rename_logits(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = model.graph.node[-1].output[0] = "scores"


def foreign_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("token_type_ids", TensorProto.INT64, ["batch", "length"]))


def static_cache(model: onnx.ModelProto) -> None:
    model.graph.input[3].type.tensor_type.shape.dim[2].dim_value = 64


def fixed_length(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 8


def classify(model: onnx.ModelProto) -> None:
    """Return logits of the first token only, like a classifier."""
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
        (static_cache, r"past_key_values\.0\.key has the shape \['batch', 2, 64, 8\]"),
        (fixed_length, "input_ids takes 8 tokens only"),
        (classify, "logits have the shape"),
    ],
)
def test_graphs_that_are_no_decoders_are_refused(
    tmp_path: Path, change: Callable[[onnx.ModelProto], None], message: str
) -> None:
    folder = changed(change, tmp_path / "m")
    with pytest.raises(ModelError, match=message) as caught:
        opened(folder)
    assert "past_key_values.N.key" in str(caught.value.expected)
    assert caught.value.where == str(folder)


def test_logits_of_unknown_shape_are_checked_at_first_output(tmp_path: Path) -> None:
    def squeeze(model: onnx.ModelProto) -> None:
        # Which axes Squeeze removes depends on the batch, so the shape is unknown in advance.
        model.graph.node[-1].output[0] = "all"
        model.graph.node.append(helper.make_node("Squeeze", ["all"], ["logits"]))
        model.graph.output[0].type.tensor_type.ClearField("shape")

    decoder = opened(changed(squeeze, tmp_path / "m"))
    with pytest.raises(ModelError, match=r"logits have the shape \[5, 50\]"):
        decoder.prefill(PROMPT)


def test_logits_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    def poison(model: onnx.ModelProto) -> None:
        (head,) = (stored for stored in model.graph.initializer if stored.name == "head")
        values = numpy_helper.to_array(head).copy()
        values[0, 17] = np.nan
        head.CopyFrom(numpy_helper.from_array(values, "head"))

    decoder = opened(changed(poison, tmp_path / "m"))
    with pytest.raises(StageError, match="not finite"):
        decoder.prefill(PROMPT)


RULES: dict[str, dict[str, Any]] = {
    "greedy": {"max_length": 14},
    "repeating nothing": {"max_new_tokens": 12, "no_repeat_ngram_size": 2},
    "four beams": {"max_length": 16, "num_beams": 4},
    "short ones first": {"max_length": 16, "num_beams": 3, "length_penalty": -1.0, "early_stopping": True},
    "long ones": {"max_new_tokens": 10, "num_beams": 2, "length_penalty": 2.0, "early_stopping": "never"},
    "with ends that are forced": {
        "max_length": 9,
        "num_beams": 2,
        "min_length": 4,
        "forced_bos_token_id": 7,
        "forced_eos_token_id": 1,
        "bad_words_ids": [[5], [9]],
    },
}


class _Graph:
    """Session of a torch module under the input and output names of an ONNX encoder or decoder."""

    def __init__(self, module: Any, decodes: bool) -> None:
        self._module, self._decodes = module, decodes
        config = module.config
        axes = (None, config.num_heads, None, config.d_kv)
        names = [
            f"{layer}.{side}.{kind}"
            for layer in range(config.num_decoder_layers)
            for side in ("decoder", "encoder")
            for kind in ("key", "value")
        ]
        pasts = {f"past_key_values.{name}": TensorType("float32", axes) for name in names} if decodes else {}
        plain = ["input_ids", "attention_mask"]
        if decodes:
            plain = ["input_ids", "encoder_hidden_states", "encoder_attention_mask", "use_cache_branch"]
        self.input_types = {name: TensorType("int64", (None, None)) for name in plain} | pasts
        self.output_types = {"logits": TensorType("float32", (None, None, None))}
        self.output_types |= {name.replace("past_key_values", "present"): kind for name, kind in pasts.items()}
        self.inputs, self.provider, self.settings = tuple(self.input_types), "torch", {}
        self._pasts = tuple(pasts)

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        given = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}
        with torch.inference_mode():
            if not self._decodes:
                return {"last_hidden_state": self._module.get_encoder()(**given).last_hidden_state.numpy()}
            # The tokens so far, kept where keys would be.
            past = given[self._pasts[0]][:, 0, :, 0].long()
            ids = torch.cat([past, given["input_ids"]], dim=1)
            answer = self._module(
                encoder_outputs=(given["encoder_hidden_states"],),
                attention_mask=given["encoder_attention_mask"],
                decoder_input_ids=ids,
            )
        config = self._module.config
        shape = (len(ids), config.num_heads, ids.shape[1], config.d_kv)
        cached_ids = ids[:, None, :, None].expand(shape).float().numpy()
        return {"logits": answer.logits.numpy()} | {
            name.replace("past_key_values", "present"): cached_ids for name in self._pasts
        }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_t5(tmp_path_factory.mktemp("t5"))


@pytest.mark.parametrize("kind", RULES)
def test_generated_texts_match_transformers(kind: str, folder: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM, GenerationConfig

    generation_fields = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, **RULES[kind]}
    (folder / "generation_config.json").write_text(json.dumps(generation_fields))
    module = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    writer = TextWriter(_Graph(module, False), _Graph(module, True), folder)
    ids = np.random.default_rng(0).integers(3, 60, (6, 9))
    mask = np.ones_like(ids)
    mask[1::2, 5:] = 0
    written = writer.predict({"input_ids": ids, "attention_mask": mask})
    lengths = set()
    for row, (text, length) in enumerate(zip(ids, mask.sum(1), strict=True)):
        with torch.inference_mode():
            expected = module.generate(
                torch.from_numpy(text[None, :length]), generation_config=GenerationConfig(**generation_fields)
            )[0, 1:].tolist()
        own_tokens = [token for token in written["sequences"][row].tolist() if token != -1]
        assert own_tokens == expected[: len(own_tokens)] and set(expected[len(own_tokens) :]) <= {0}
        lengths.add(len(own_tokens))
    assert len({tuple(row) for row in written["sequences"].tolist()}) > 3, "texts differ"
    assert written["texts"].shape == (6,)


def test_unsupported_generation_rules_are_named(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.3, "eos_token_id": 1}))
    with pytest.raises(ModelError, match="repetition_penalty"):
        read_rules(folder)
