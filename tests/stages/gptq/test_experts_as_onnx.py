"""Mixtures of experts as ONNX: each expert with its own bits, against the same weights in transformers and torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from decoders import context, layers_of, module_of, save_decoder
from onnx.numpy_helper import to_array
from written_decoders import Graph, random_ids

from compress.formats.onnx.decoder import GraphSettings, export_decoder, verify_decoder
from compress.models.quantized_module import load_quantized_module
from compress.stages.gptq.stage import Gptq

FP32 = GraphSettings(accuracy_level=1)
EXACT = {"atol": 2e-4, "rtol": 1e-4}


def test_a_float_mixture_equals_transformers_whole_and_token_by_token(tmp_path: Path) -> None:
    checkpoint, ids = save_decoder(tmp_path, "MixtralConfig", sliding_window=None), random_ids(2, 21)
    with torch.no_grad():
        expected = module_of(checkpoint)(input_ids=torch.from_numpy(ids)).logits.numpy()
    graph = Graph(export_decoder(checkpoint).graph)
    np.testing.assert_allclose(graph.run(ids)[0], expected, **EXACT)
    # A single token leaves two of the four experts without any.
    logits, past = graph.run(ids[:1, :1])
    for place in range(1, 21):
        np.testing.assert_allclose(logits[0, 0], expected[0, place - 1], **EXACT)
        logits, past = graph.run(ids[:1, place : place + 1], past=past)


@pytest.mark.parametrize("choices", [(2, 4, 8), (3, 4)])
def test_every_expert_has_its_own_bits(choices: tuple[int, ...], tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source", "MixtralConfig", sliding_window=None)
    stage = Gptq(
        group_size=32,
        samples=6,
        sequence_length=24,
        target_bits=4.4,
        choices=choices,
        embedding_bits=4,
        precision="fp32",
    )
    checkpoint = stage.run(source, context(tmp_path / "scratch"))
    bits = {layer["bits"] for name, layer in layers_of(checkpoint.folder).items() if ".experts." in name}
    assert len(bits) > 1
    model, ids = export_decoder(checkpoint, FP32), random_ids(2, 21)
    products = [node for node in model.graph.graph.node if node.op_type == "MatMulNBits"]
    assert len([node for node in products if "/experts/" in node.name]) >= 2 * 4 * 2
    with torch.no_grad():
        expected = load_quantized_module(checkpoint)(input_ids=torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(Graph(model.graph).run(ids)[0], expected, **EXACT)
    found = verify_decoder(export_decoder(checkpoint), checkpoint, ids, 1e-3, 0.5)
    assert found.difference < 1e-3 < found.rounding


def test_the_router_is_multiplied_in_fp32(tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source", "MixtralConfig", sliding_window=None)
    checkpoint = Gptq(method="rtn", group_size=32).run(source, context(tmp_path / "scratch"))
    graph = export_decoder(checkpoint).graph.graph
    stored = {tensor.name: to_array(tensor) for tensor in graph.initializer}
    for index in range(2):
        name = f"model.layers.{index}.block_sparse_moe.gate.weight"
        assert np.array_equal(stored[name], source.stored(name).half().float().numpy())
        (router,) = [node for node in graph.node if name in node.input]
        assert router.op_type in ("Gemm", "MatMul")


def test_experts_of_other_mixtures_equal_torch(tmp_path: Path) -> None:
    checkpoint = save_decoder(tmp_path, "Qwen3MoeConfig")
    ids = np.random.default_rng(0).integers(3, 90, (2, 9))
    equality = verify_decoder(export_decoder(checkpoint), checkpoint, ids, 1e-4, 0.2)
    assert equality.rounding == 0
