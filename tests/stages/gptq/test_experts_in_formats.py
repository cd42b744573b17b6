"""Tests of mixtures of experts in GGUF: one tensor per block for all experts, run by llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoders import context, layers_of, module_of, save_decoder
from gguf import GGUFReader
from gguf.quants import dequantize
from mergeable import ROWS, train_tokenizer
from onnx.numpy_helper import to_array
from transformers import AutoModelForCausalLM
from written_decoders import Graph, random_ids

from compress.formats.gguf.export import GgufTypes, compare_gguf, write_gguf
from compress.formats.onnx.decoder import GraphSettings, export_decoder, verify_decoder
from compress.formats.runtime import get_runtime
from compress.formats.targets import TARGETS
from compress.models.checkpoint import Checkpoint, QuantizedCheckpoint
from compress.models.quantized_module import load_quantized_module
from compress.stages.blockwise.layers import Layer
from compress.stages.gptq.bit_allocation import Allocation
from compress.stages.gptq.stage import Gptq
from compress.utils.errors import ModelError

EXPERTS = "model.layers.{}.block_sparse_moe.experts"


def mixtral(folder: Path, **changes: Any) -> Checkpoint:
    source = save_decoder(folder, "MixtralConfig", vocab_size=ROWS, sliding_window=None, **changes)
    train_tokenizer().save_pretrained(folder)
    return source


def quantized(source: Checkpoint, scratch: Path, **fields: Any) -> QuantizedCheckpoint:
    stage = Gptq(group_size=32, samples=6, sequence_length=24, precision="fp32", **fields)
    return stage.run(source, context(scratch))


def answers(file: Path, tokens: np.ndarray) -> np.ndarray:
    session = get_runtime("llama-cpp").open(file, TARGETS["llama-cpp"], 1)
    return session.predict({"input_ids": tokens})["logits"]


def ids(length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, ROWS, (2, length))


def test_llama_cpp_logits_match_transformers(tmp_path: Path) -> None:
    source = mixtral(tmp_path)
    write_gguf(source, tmp_path / "tiny.gguf", GgufTypes("f32"))
    module = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = module(input_ids=torch.from_numpy(ids(60))).logits.numpy()
    assert np.abs(answers(tmp_path / "tiny.gguf", ids(60)) - expected).max() < 1e-2 * expected.std()


def test_experts_of_mixed_bits_share_one_exact_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(config: object, plan: list[list[Layer]], *_: object) -> Allocation:
        bits = {layer.name: 4 for block in plan for layer in block if layer.bits}
        for index in range(2):
            bits |= {f"{EXPERTS.format(index)}.{number}.w1": some for number, some in enumerate((2, 8, 4, 3))}
            bits |= {f"{EXPERTS.format(index)}.{number}.w2": some for number, some in enumerate((4, 2, 3, 4))}
        return Allocation(bits, 8, 0.0, 0.0)

    monkeypatch.setattr("compress.stages.gptq.quantizer.allocate", chosen)
    source = mixtral(tmp_path / "source")
    checkpoint = quantized(source, tmp_path / "scratch", target_bits=6.0, embedding_bits=8)
    bits = {name: layer["bits"] for name, layer in layers_of(checkpoint.folder).items() if layer.get("bits")}
    file = tmp_path / "tiny.gguf"
    write_gguf(checkpoint, file)
    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    for index in range(2):
        for gguf_name, leaf in {"gate": "w1", "down": "w2", "up": "w3"}.items():
            tensor = stored[f"blk.{index}.ffn_{gguf_name}_exps.weight"]
            modules = [f"{EXPERTS.format(index)}.{number}.{leaf}" for number in range(4)]
            finest = max(bits[module] for module in modules)
            assert (finest == 8) is (leaf == "w1")
            assert tensor.tensor_type.name == ("Q8_0" if finest == 8 else "Q4_0")
            expected = np.stack([checkpoint.weight(module).numpy() for module in modules])
            assert np.array_equal(dequantize(tensor.data, tensor.tensor_type), expected)
        router = stored[f"blk.{index}.ffn_gate_inp.weight"]
        assert router.tensor_type.name == "F32"
        gate = source.stored(f"model.layers.{index}.block_sparse_moe.gate.weight").half().float().numpy()
        assert np.array_equal(router.data, gate)
    assert all(difference.largest <= difference.allowed for difference in compare_gguf(file, checkpoint))
    with torch.no_grad():
        expected = load_quantized_module(checkpoint)(input_ids=torch.from_numpy(ids(40))).logits.numpy()
    # llama.cpp rounds activations to 8 bits.
    assert np.abs(answers(file, ids(40)) - expected).std() < 0.1 * expected.std()


def test_verification_detects_swapped_experts(tmp_path: Path) -> None:
    checkpoint = quantized(mixtral(tmp_path / "source"), tmp_path / "scratch")
    write_gguf(checkpoint, tmp_path / "tiny.gguf")
    differences = {difference.name: difference for difference in compare_gguf(tmp_path / "tiny.gguf", checkpoint)}
    assert differences["blk.1.ffn_down_exps.weight"].largest == 0
    tensor = next(t for t in GGUFReader(tmp_path / "tiny.gguf").tensors if t.name == "blk.1.ffn_down_exps.weight")
    swapped = tensor.data[[1, 0, 2, 3]].tobytes()
    with (tmp_path / "tiny.gguf").open("r+b") as file:
        file.seek(tensor.data_offset)
        file.write(swapped)
    differences = {difference.name: difference for difference in compare_gguf(tmp_path / "tiny.gguf", checkpoint)}
    assert differences["blk.1.ffn_down_exps.weight"].largest > 0.1
    assert differences["blk.1.ffn_up_exps.weight"].largest == 0


def test_float_expert_among_quantized_ones_is_reported(tmp_path: Path) -> None:
    name = f"{EXPERTS.format(1)}.2.w3"
    checkpoint = quantized(mixtral(tmp_path / "source"), tmp_path / "scratch", keep=(name,))
    with pytest.raises(ModelError, match=f"one type for all experts of a block, and {name} is not quantized"):
        write_gguf(checkpoint, tmp_path / "tiny.gguf")
    assert not (tmp_path / "tiny.gguf").exists()


FP32 = GraphSettings(accuracy_level=1)
EXACT = {"atol": 2e-4, "rtol": 1e-4}


def test_float_mixture_matches_transformers_in_prefill_and_decoding(tmp_path: Path) -> None:
    checkpoint, ids = save_decoder(tmp_path, "MixtralConfig", sliding_window=None), random_ids(2, 21)
    with torch.no_grad():
        expected = module_of(checkpoint)(input_ids=torch.from_numpy(ids)).logits.numpy()
    graph = Graph(export_decoder(checkpoint).graph)
    np.testing.assert_allclose(graph.run(ids)[0], expected, **EXACT)
    # A single token leaves two of the four experts without tokens.
    logits, past = graph.run(ids[:1, :1])
    for index in range(1, 21):
        np.testing.assert_allclose(logits[0, 0], expected[0, index - 1], **EXACT)
        logits, past = graph.run(ids[:1, index : index + 1], past=past)


@pytest.mark.parametrize("choices", [(2, 4, 8), (3, 4)])
def test_each_expert_keeps_its_bits(choices: tuple[int, ...], tmp_path: Path) -> None:
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
    equality = verify_decoder(export_decoder(checkpoint), checkpoint, ids, 1e-3, 0.5)
    assert equality.difference < 1e-3 < equality.rounding


def test_router_is_computed_in_fp32(tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source", "MixtralConfig", sliding_window=None)
    checkpoint = Gptq(method="rtn", group_size=32).run(source, context(tmp_path / "scratch"))
    graph = export_decoder(checkpoint).graph.graph
    stored = {tensor.name: to_array(tensor) for tensor in graph.initializer}
    for index in range(2):
        name = f"model.layers.{index}.block_sparse_moe.gate.weight"
        assert np.array_equal(stored[name], source.stored(name).half().float().numpy())
        (router,) = [node for node in graph.node if name in node.input]
        assert router.op_type in ("Gemm", "MatMul")
