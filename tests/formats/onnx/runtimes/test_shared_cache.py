"""A cache that is kept in place gives the same tokens as one that is passed from call to call."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from quantized import quantize_tiny_llama, save_tiny_llama
from written_decoders import CONFIGS, Graph, random_ids, save_decoder

from compress.formats.generation.decoder import Decoder
from compress.formats.onnx.decoder import export_decoder
from compress.formats.onnx.runtimes.onnxruntime import RUNTIME
from compress.formats.targets import TARGETS
from compress.utils.errors import StageError


def open_decoder(path: Path) -> Decoder:
    return Decoder(RUNTIME.open(path, TARGETS["cpu"], threads=1), "tiny")


def tokens(decoder: Decoder, prompt: list[int], count: int) -> list[int]:
    generated = [decoder.prefill(prompt)]
    while len(generated) < count:
        generated.append(decoder.step(generated[-1]))
    return generated


@pytest.mark.parametrize("name", ["llama", "mistral", "quantized"])
def test_the_same_tokens_as_with_a_cache_that_is_passed_on(name: str, tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source", CONFIGS["llama" if name == "quantized" else name])
    weights = quantize_tiny_llama(source, tmp_path / "quantized") if name == "quantized" else source
    model = export_decoder(weights)
    shared, plain = tmp_path / "shared.onnx", tmp_path / "plain.onnx"
    onnx.save_model(model.graph, shared)
    del model.graph.metadata_props[:]
    onnx.save_model(model.graph, plain)
    in_place, other = open_decoder(shared), open_decoder(plain)
    assert in_place._shared is not None
    assert other._shared is None
    for prompt, count in (([7, 40, 3], 12), ([9], 3), ([(index * 37) % 150 + 3 for index in range(240)], 15)):
        assert tokens(in_place, prompt, count) == tokens(other, prompt, count)


def test_a_buffer_grows_and_keeps_what_it_held(tmp_path: Path) -> None:
    model = export_decoder(save_tiny_llama(tmp_path / "source", max_position_embeddings=640))
    onnx.save_model(model.graph, tmp_path / "model.onnx")
    session = RUNTIME.open(tmp_path / "model.onnx", TARGETS["cpu"], threads=1)
    names = {name: name.replace("past_key_values", "present") for name in session.inputs if name.startswith("past")}
    cache = session.shared_cache(names)
    assert cache is not None
    ids = random_ids(1, 270)
    expected, _ = Graph(model.graph).run(ids)
    for seen, total in ((0, 250), *((position, position + 1) for position in range(250, 270))):
        feed = {"input_ids": ids[:, seen:total], "attention_mask": np.ones((1, total), np.int64)}
        actual = cache.predict(feed, seen, total)
        np.testing.assert_allclose(actual, expected[:, seen:total], atol=2e-4, rtol=1e-4)


def test_what_fails_is_said_with_the_file(tmp_path: Path) -> None:
    onnx.save_model(export_decoder(save_tiny_llama(tmp_path / "source")).graph, tmp_path / "model.onnx")
    decoder = open_decoder(tmp_path / "model.onnx")
    with pytest.raises(StageError, match="failed on a token") as error:
        decoder.prefill([100_000])
    assert "model.onnx" in str(error.value.where)
