"""Tests of decoders as OpenVINO IR: logits are compared with transformers, and openvino-genai opens the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from quantized import VOCABULARY, quantize_tiny_llama, save_tiny_llama, tiny_tokenizer
from rotation import todays
from transformers import Gemma2Config, GraniteConfig
from written_decoders import CONFIGS, by_transformers, greedy_tokens, logits_of, random_ids, save_decoder

from compress.benchmark.worker import time_generation
from compress.formats.generation.decoder import WritesItself, open_decoder
from compress.formats.model_file import model_file
from compress.formats.onnx.decoder.graph_builder import GraphBuilder
from compress.formats.onnx.decoder.stored_weight import StoredWeight
from compress.formats.openvino import decoder as decoders
from compress.formats.openvino.decoder import VerifiedIrDecoder, write_decoder
from compress.formats.openvino.model import IR_FILE
from compress.formats.openvino.runtime import core, open_stateful
from compress.formats.openvino.stateful import read_stateful
from compress.formats.runtime import get_runtime
from compress.formats.targets import TARGETS
from compress.inspection.budget import budget_of
from compress.models.checkpoint import Checkpoint, QuantizedCheckpoint
from compress.utils.errors import InputError, IntegrityError, StageError

openvino = pytest.importorskip("openvino")
pytest.importorskip("openvino_tokenizers")
TARGET, TOLERANCE = TARGETS["openvino"], 1e-4
PROMPT = "some words of no meaning"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save_tiny_llama(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def quantized(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    """Return a tiny Llama with 4-bit layers and an 8-bit table, which is also the head."""
    return quantize_tiny_llama(source, tmp_path_factory.mktemp("quantized"), table_bits=8)


@pytest.fixture(scope="module")
def written(quantized: QuantizedCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the IR folder of the quantized decoder."""
    return saved(write_decoder(quantized, "fp32", 8, random_ids(2, 16), TOLERANCE), tmp_path_factory.mktemp("written"))


def saved(decoder: VerifiedIrDecoder, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    decoder.model.save(folder)
    return folder


def constants(folder: Path) -> dict[str, Any]:
    model = core().read_model(folder / IR_FILE)
    return {node.get_friendly_name(): node for node in model.get_ordered_ops() if node.get_type_name() == "Constant"}


def test_integers_and_scales_match_the_checkpoint(written: Path, quantized: QuantizedCheckpoint) -> None:
    held, layer = constants(written), "model.layers.1.mlp.down_proj"
    for name, bits in ((layer, 4), ("model.embed_tokens", 8)):
        weight, stored = quantized.quantized(name), held[f"{name}.weight_Q{bits}"]
        assert weight is not None and stored.get_element_type().get_type_name() == f"i{bits}"
        # OpenVINO itself unpacks the integers.
        model = openvino.Model([openvino.opset13.convert(stored, "i32")], [])
        integers = core().compile_model(model, "CPU")()[0]
        expected = weight.integers.numpy().astype(np.int32) - (1 << (bits - 1))
        np.testing.assert_array_equal(integers.reshape(expected.shape), expected)
        np.testing.assert_array_equal(held[f"{name}.weight_Q{bits}/scale"].data[..., 0], weight.scales.numpy())
    budget = budget_of(written)
    assert budget.format == "openvino" and sum(tensor.dtype == "int8" for tensor in budget.tensors) == 1
    joined = {tensor.name: tensor for tensor in budget.tensors}["model.layers.0.self_attn.q_k_v_proj.weight_Q4"]
    assert joined.bytes * 2 == joined.parameters == 128 * 64


def test_logits_match_transformers(written: Path, source: Checkpoint, quantized: QuantizedCheckpoint) -> None:
    assert model_file(written) == written / IR_FILE
    session = get_runtime("openvino").open(written, TARGET, 1)
    ids, module = random_ids(3, 20, seed=2), by_transformers(source, quantized)
    mask = np.ones_like(ids)
    mask[1, 12:] = 0
    actual = session.predict({"input_ids": ids, "attention_mask": mask})["logits"]
    expected = logits_of(module, ids)
    # Inputs of products, keys and values are rounded to 8 bits.
    bound = 0.05 * np.abs(expected).max()
    np.testing.assert_allclose(actual[[0, 2]], expected[[0, 2]], atol=bound)
    np.testing.assert_allclose(actual[1, :12], expected[1, :12], atol=bound)
    # A call does not depend on the previous one.
    np.testing.assert_array_equal(session.predict({"input_ids": ids, "attention_mask": mask})["logits"], actual)
    # Left padding, as other tools use it, gives the same logits.
    left = np.where(np.arange(20) < 8, 2, np.roll(ids[1], 8))[None]
    padded = session.predict({"input_ids": left, "attention_mask": (np.arange(20) >= 8).astype(np.int64)[None]})
    np.testing.assert_allclose(padded["logits"][0, 8:], expected[1, :12], atol=bound)
    # Token by token, other groups of keys share a scale, so exact equality needs float keys.
    session = open_stateful(written / IR_FILE, 1, exact=True)
    decoder = open_decoder(session, "here")
    tokens = greedy_tokens(decoder, ids[0].tolist(), 6)
    assert decoder.cached and decoder.vocabulary == VOCABULARY
    assert tokens == logits_of(module, np.concatenate([ids[:1], [tokens[:-1]]], axis=1))[0, 19:].argmax(-1).tolist()


@pytest.mark.parametrize("backend", ["PA", "SDPA"])
def test_openvino_genai_generates_the_tokens_of_torch(
    written: Path, backend: str, source: Checkpoint, quantized: Any
) -> None:
    genai = pytest.importorskip("openvino_genai")
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    pipe = genai.LLMPipeline(str(written), "CPU", ATTENTION_BACKEND=backend, **exact)
    chosen = genai.GenerationConfig(max_new_tokens=12, ignore_eos=True, apply_chat_template=False)
    ids = tiny_tokenizer()(PROMPT)["input_ids"]
    answer = by_transformers(source, quantized).generate(
        torch.tensor([ids]), max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=2
    )
    expected = answer[0, len(ids) :].tolist()
    assert pipe.get_tokenizer().encode(PROMPT).input_ids.data.tolist() == [ids]
    assert pipe.generate(openvino.Tensor(np.array([ids])), chosen).tokens == [expected]


def test_openvino_genai_generates_the_same_text_and_is_timed(written: Path) -> None:
    pytest.importorskip("openvino_genai")
    session: Any = get_runtime("openvino").open(written, TARGET, 1)
    assert session.settings["runtime"].startswith("openvino-genai ")
    decoder, ours = session.decoder(), open_stateful(written / IR_FILE, 1).decoder()
    assert isinstance(decoder, WritesItself) and decoder.vocabulary == ours.vocabulary
    for ids in (random_ids(1, 1)[0].tolist(), random_ids(1, 60)[0].tolist()):
        expected, result = greedy_tokens(ours, ids, 40), decoder.write(ids, 40)
        assert result.tokens == expected and 0 < result.first_ms < result.all_ms
        timed = time_generation(decoder, ids, 39)
        assert timed["tokens"] == expected and len(timed["steps_ms"]) == 39 and len(set(timed["steps_ms"])) == 1
        assert time_generation(decoder, ids, 0)["tokens"] == expected[:1]
    # The model is not loaded a second time while it is timed, and a prompt is read again each time.
    assert "own" not in vars(session) and not session.pipeline.scheduler.enable_prefix_caching
    assert greedy_tokens(decoder, ids, 40) == expected
    batch = {"input_ids": np.array([ids])}
    np.testing.assert_array_equal(session.predict(batch)["logits"], session.direct.predict(batch)["logits"])


def fail_to_open(*positional: Any, **named: Any) -> Any:
    raise RuntimeError("Check failed")


@pytest.mark.parametrize(
    "missing",
    [("genai.find_spec", lambda name: None), ("runtime.Pipeline", fail_to_open)],
    ids=["not installed", "cannot open"],
)
def test_runtime_falls_back_without_openvino_genai(
    missing: tuple[str, Any], written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"compress.formats.openvino.{missing[0]}", missing[1])
    session: Any = get_runtime("openvino").open(written, TARGET, 1)
    assert session.settings["runtime"].startswith("openvino ")
    assert not isinstance(session.decoder(), WritesItself)


LLAMA = json.loads(CONFIGS["llama"].to_json_string(use_diff=False))
BIASES = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
FAMILIES = {
    "biases and scales": (GraniteConfig(**LLAMA | BIASES | {"attention_multiplier": 0.4}), ""),
    "norms of heads": (CONFIGS["qwen3"], ""),
    "windows": (CONFIGS["mistral"], "has a window"),
    "caps": (Gemma2Config(**LLAMA | {"head_dim": 16, "query_pre_attn_scalar": 9}), "caps scores"),
}


@pytest.mark.parametrize("family", todays(FAMILIES, 4, str))
def test_other_families_are_verified_with_8_bit_weights(family: str, tmp_path: Path) -> None:
    config, reason = FAMILIES[family]
    decoder = write_decoder(save_decoder(tmp_path, config), "int8", 8, random_ids(2, 24), TOLERANCE)
    assert reason in decoder.unfused and bool(reason) == bool(decoder.unfused)
    assert decoder.parity.difference < TOLERANCE and decoder.parity.rounding > 0
    kinds = {part.dtype for part in budget_of(saved(decoder, tmp_path / "written")).tensors if part.parameters > 1000}
    assert kinds == {"uint8"}


def test_3_bit_weights_are_stored_as_4_bit_reproducibly(source: Checkpoint, tmp_path: Path) -> None:
    odd = quantize_tiny_llama(source, tmp_path / "odd", bits=3, table_bits=None)
    model, again = (write_decoder(odd, "int8", 8, random_ids(2, 16), TOLERANCE).model for _ in range(2))
    assert model.own == again.own and model.companions == again.companions
    (tmp_path / "written").mkdir()
    model.save(tmp_path / "written")
    kinds = {name: node.get_element_type().get_type_name() for name, node in constants(tmp_path / "written").items()}
    assert kinds["model.layers.0.mlp.down_proj.weight_Q4"] == "i4"
    assert next(kind for name, kind in kinds.items() if "embed_tokens" in name and "scale" not in name) == "u8"


@pytest.mark.parametrize(("bits", "zeros"), [(2, False), (2, True), (4, True), (8, True)])
def test_widths_and_zero_points_match_onnx_runtime(bits: int, zeros: bool, tmp_path: Path) -> None:
    """Rows have three blocks, so that the last byte of zero points is not full, and a 4-bit table comes first."""
    chance, nodes = np.random.default_rng(bits), GraphBuilder()

    def drawn(rows: int, width: int) -> StoredWeight:
        lows = chance.integers(0, 1 << width, (rows, 3), np.uint8) if zeros else None
        values = chance.integers(0, 1 << width, (rows, 96), np.uint8)
        return StoredWeight(values, chance.random((rows, 3)).astype(np.float16), lows, width, 32, 96)

    def operands(name: str, weight: StoredWeight) -> list[Any]:
        halves = nodes.op("Cast", name, [nodes.constant(f"{name}.scales", weight.scales)], to=ir.DataType.FLOAT)
        packed = weight.packed_zero_points()
        points = None if packed is None else nodes.constant(f"{name}.zeros", packed)
        return [nodes.constant(f"{name}.weight_Q", weight.integers()), halves, points]

    ids, table, layer = nodes.input("input_ids", ir.DataType.INT64, ["b", "l"]), drawn(11, 4), drawn(7, bits)
    integers, *others = operands("table", table)
    flat = nodes.op("Reshape", "table", [integers, nodes.integers(11, 48)])
    about = {"gather_axis": 0, "quantize_axis": 1, "block_size": 32, "bits": 4}
    rows = nodes.op("GatherBlockQuantized", "table", [flat, ids, *others], "com.microsoft", **about)
    bias = nodes.constant("bias", chance.random(7).astype(np.float32))
    sizes = {"K": 96, "N": 7, "bits": bits, "block_size": 32, "accuracy_level": 1}
    inputs = [rows, *operands("layer", layer), None, bias]
    nodes.output(nodes.op("MatMulNBits", "layer", inputs, "com.microsoft", **sizes), "logits", ir.DataType.FLOAT, "blv")
    onnx.save(ir.to_proto(nodes.model("widths")), tmp_path / "model.onnx")
    given = chance.integers(0, 11, (2, 5))
    theirs = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (expected,) = theirs.run(None, {"input_ids": given})
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    compiled = core().compile_model(read_stateful(tmp_path / "model.onnx"), "CPU", exact)
    actual = compiled({"input_ids": given, "beam_idx": np.arange(2, dtype=np.int32)})["logits"]
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-2)


def test_decoder_that_fails_verification_is_not_written(
    quantized: QuantizedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = decoders.read_stateful

    def with_other_scales(graph: Path) -> Any:
        model = real(graph)
        (scale,) = (op for op in model.get_ops() if op.get_friendly_name() == "model.embed_tokens.weight_Q8/scale")
        other = openvino.opset13.constant(scale.data * np.float16(1.01))
        for reader in scale.output(0).get_target_inputs():
            reader.replace_source_output(other.output(0))
        return model

    decoder_with_positions = decoders._export_graph
    monkeypatch.setattr(decoders, "_export_graph", lambda *a: (decoder_with_positions(*a)[0], "it is traced as it is"))
    monkeypatch.setattr(decoders, "read_stateful", with_other_scales)
    with pytest.raises(IntegrityError, match="differ from torch"):
        write_decoder(quantized, "fp32", 8, random_ids(2, 16), TOLERANCE)


def test_bad_input_is_refused_by_name(written: Path, source: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    session = get_runtime("openvino").open(written, TARGET, 1)
    for odd in (np.array([[VOCABULARY]]), np.array([[-1]]), np.zeros((0, 3), np.int64), np.zeros((1, 2))):
        with pytest.raises(InputError, match="no tokens of the model"):
            session.predict({"input_ids": odd})
    monkeypatch.setattr(decoders, "load_tokenizer", lambda folder: object())
    with pytest.raises(StageError, match="openvino-tokenizers cannot convert"):
        write_decoder(source, "fp32", 8, random_ids(2, 16), TOLERANCE)
