"""Tests of GPTQ checkpoints end to end: stored tensors against the solver, refused inputs, and notes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_decoders
import torch
import transformers
from decoders import Notes, context, inputs_of_layers, layers_of, module_of, save_decoder, text
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compress.formats.onnx.decoder import export_decoder
from compress.models.checkpoint import Checkpoint, QuantizedCheckpoint
from compress.models.quantized_module import load_quantized_module
from compress.numerics import language_head
from compress.numerics.gptq import GptqSettings, output_error, quantize_gptq
from compress.stages.blockwise.calibration import calibration_sequences
from compress.stages.blockwise.layers import Layer
from compress.stages.gptq.settings import Quantization
from compress.stages.gptq.solver import solve_layers
from compress.stages.gptq.stage import Gptq
from compress.utils.errors import CompressError, DataError, ModelError, StageError
from compress.utils.storage import size_bytes

SMALL = {"group_size": 32, "samples": 6, "sequence_length": 24, "precision": "fp32"}
LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LINEARS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def quantized(checkpoint: Checkpoint, scratch: Path, notes: Notes | None = None, **fields: Any) -> QuantizedCheckpoint:
    stage = Gptq(**{**SMALL, **fields})
    return stage.run(checkpoint, context(scratch, progress=notes))


def refusal(kind: type[CompressError], checkpoint: Checkpoint, scratch: Path, **fields: Any) -> str:
    with pytest.raises(kind) as caught:
        quantized(checkpoint, scratch, **fields)
    assert not (scratch / "checkpoint").exists()
    return str(caught.value)


def as_module(checkpoint: QuantizedCheckpoint, source: Checkpoint) -> Any:
    """Return transformers' model with the dequantized weights."""
    module = module_of(source)
    state = {
        name: tensor if name.startswith("lm_head") else checkpoint.weight(name.removesuffix(".weight"))
        for name, tensor in module.state_dict().items()
    }
    module.load_state_dict(state)
    return module


def test_layers_are_solved_on_outputs_of_quantized_earlier_layers(tmp_path: Path) -> None:
    # Reference: the finished model in transformers, with the solver run again on inputs captured by hooks.
    source = save_decoder(tmp_path / "source")
    result = quantized(source, tmp_path / "scratch", guided=False, embedding_bits=16)
    seen = inputs_of_layers(as_module(result, source), calibration_sequences(context(tmp_path), source, 6, 24))
    layers = layers_of(result.folder)
    for name in (f"model.layers.{index}.{short}" for index in range(2) for short in LINEARS):
        hessian = seen[name].T @ seen[name] / len(seen[name])
        weight, layer = source.weight(name), result.quantized(name)
        assert layer is not None and layer.bits == 4 and layer.group_size == 32
        expected = quantize_gptq(weight, hessian, GptqSettings(bits=4, group_size=32))
        differing = (expected.quantized.integers != layer.integers).float().mean()
        assert float(differing) < 0.02, name
        error = output_error(weight, layer.dequantize(), hessian)
        assert layers[name]["error"] == pytest.approx(error, rel=0.02)
        assert layers[name]["error"] == pytest.approx(expected.error, rel=0.02)


def test_round_to_nearest_needs_no_text(tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source")
    stage = Gptq(method="rtn", group_size=32)
    assert stage.needs().splits == ()
    result = stage.run(source, context(tmp_path / "scratch", train="short"))
    weight = source.weight("model.layers.0.mlp.up_proj")
    layer = result.quantized("model.layers.0.mlp.up_proj")
    groups = weight.reshape(96, 2, 32)
    whole = torch.maximum(groups.amax(-1) / 7, -groups.amin(-1) / 8).half().float()
    torch.testing.assert_close(layer.scales, whole, atol=0, rtol=1e-3)
    assert torch.all((layer.dequantize() - weight).abs() <= 0.51 * layer.scales.repeat_interleave(32, dim=1))


def test_folder_has_the_gptq_config_of_transformers(tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source")
    result = quantized(source, tmp_path / "scratch")
    config = transformers.AutoConfig.from_pretrained(result.folder)
    gptq_config = transformers.GPTQConfig.from_dict(dict(config.quantization_config))
    assert (gptq_config.bits, gptq_config.group_size, gptq_config.sym, gptq_config.desc_act, gptq_config.format) == (
        4,
        32,
        True,
        False,
        "gptq",
    )
    assert config.dtype == torch.float16
    assert json.loads((result.folder / "quantize_config.json").read_text()) == result.quantization
    names = set(result.files)
    assert {f"model.layers.1.mlp.up_proj.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")} <= names
    assert "model.layers.1.mlp.up_proj.weight" not in names
    assert result.stored("model.norm.weight").dtype == torch.float16
    assert transformers.AutoTokenizer.from_pretrained(result.folder).chat_template


def test_asymmetric_zero_points_are_stored_unchanged(tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source")
    result = quantized(source, tmp_path / "scratch", sym=False)
    assert result.quantization is not None and result.quantization["checkpoint_format"] == "gptq_v2"
    layer = result.quantized("model.layers.0.mlp.up_proj")
    assert layer is not None and not layer.symmetric
    error = layers_of(result.folder)["model.layers.0.mlp.up_proj"]["error"]
    assert error < layers_of(quantized(source, tmp_path / "sym").folder)["model.layers.0.mlp.up_proj"]["error"]


@pytest.mark.parametrize(("bits", "size"), [(2, -1), (3, 16), (8, 64)])
def test_bits_and_groups(bits: int, size: int, tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source", intermediate_size=128)
    result = quantized(source, tmp_path / "scratch", bits=bits, group_size=size)
    layer = result.quantized("model.layers.1.mlp.down_proj")
    assert layer is not None and layer.bits == bits
    assert layer.scales.shape == (64, 1 if size == -1 else 128 // size)
    assert int(layer.integers.max()) == (1 << bits) - 1


def test_tied_embeddings_are_stored_once_as_integers(tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source")
    result = quantized(source, tmp_path / "scratch", embedding_bits=4)
    table = result.quantized("model.embed_tokens")
    assert table is not None and table.bits == 4 and table.integers.shape == (160, 64)
    stored = result.stored("model.embed_tokens.weight")
    assert torch.equal(stored, table.dequantize().half())
    assert "lm_head.weight" not in result.files
    # gptqmodel reads the names of an index, else those of all files, and would mistake the table for a layer.
    index = json.loads((result.folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(load_file(result.folder / "model.safetensors"))
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    weight = source.weight("model.embed_tokens")
    assert float((stored.float() - weight).square().sum() / weight.square().sum()) < 0.02


def test_tied_embeddings_are_solved_as_head_and_as_rows(tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source")
    result = quantized(source, tmp_path / "scratch", embedding_bits=4, guided=False)
    module = as_module(result, source)
    module.model.embed_tokens.weight.data.copy_(source.weight("model.embed_tokens").half())
    seen = inputs_of_layers(module, calibration_sequences(context(tmp_path), source, 6, 24))["lm_head"]
    hessian = seen.T @ seen / len(seen)
    hessian += 0.2 * torch.eye(64) * hessian.diagonal().mean()
    weight, table = source.weight("model.embed_tokens"), result.quantized("model.embed_tokens")
    expected = quantize_gptq(weight, hessian, GptqSettings(bits=4, group_size=32))
    assert float((expected.quantized.integers != table.integers).float().mean()) < 0.02
    assert layers_of(result.folder)["model.embed_tokens"]["error"] == pytest.approx(expected.error, rel=0.02)


@pytest.mark.parametrize(
    ("fields", "tables", "others", "expected"),
    [
        # Gemma-3-270M and SmolLM2-135M: their tables have 63% and 21% of the weights.
        ({}, 262_144 * 640, 100_330_496, 5),
        ({}, 49_152 * 576, 106_203_456, 8),
        # 4-bit layers are as large as tables of 8 bits with half as many weights, and 2-bit layers with a quarter.
        ({}, 50, 100, 8),
        ({}, 51, 100, 5),
        ({"bits": 2}, 25, 100, 8),
        ({"bits": 2}, 26, 100, 5),
        ({"bits": 8}, 1000, 1, 8),
        ({"bits": 8, "sym": False}, 1000, 1, 8),
        ({"sym": False}, 1, 1000, 5),
        ({"embedding_bits": 16}, 1000, 1, 16),
        ({"embedding_bits": 4}, 1, 1000, 4),
    ],
)
def test_tables_have_eight_bits_or_five_if_they_dominate(
    fields: dict[str, Any], tables: int, others: int, expected: int
) -> None:
    assert Gptq(**fields).table_bits(tables, others) == expected


@pytest.mark.parametrize(
    ("sizes", "fields", "expected"),
    [
        # A block has 26,624 weights, so that the tables of 160 and of 1,024 rows are smaller and larger than half.
        ({}, {}, {"model.embed_tokens": 8}),
        ({"vocab_size": 1024}, {}, {"model.embed_tokens": 5}),
        ({"vocab_size": 300}, {}, {"model.embed_tokens": 8}),
        # An untied head counts like the embedding.
        ({"vocab_size": 300, "tie_word_embeddings": False}, {}, {"model.embed_tokens": 5, "lm_head": 5}),
        ({}, {"keep": ("lm_head",)}, {}),
        ({}, {"keep": ("model.embed_tokens",)}, {}),
        ({"tie_word_embeddings": False}, {"keep": ("lm_head",)}, {"model.embed_tokens": 8}),
    ],
)
def test_default_bits_of_embedding_and_head(
    sizes: dict[str, Any], fields: dict[str, Any], expected: dict[str, int], tmp_path: Path
) -> None:
    source = save_decoder(tmp_path / "source", **sizes)
    result = quantized(source, tmp_path / "scratch", method="rtn", **fields)
    assert {name: table["bits"] for name, table in result.tables.items()} == expected


def test_onnx_stores_a_large_table_once_with_five_bits(tmp_path: Path) -> None:
    rows, columns = 1024, 64
    result = quantized(save_decoder(tmp_path / "source", vocab_size=rows), tmp_path / "scratch")
    graph = export_decoder(result).graph.graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    table = [array for name, array in stored.items() if name.startswith(("model.embed_tokens", "lm_head"))]
    assert sum(array.nbytes for array in table) == rows * columns * (5 + 16 / 32) / 8
    assert max(array.nbytes for array in stored.values() if array.dtype == np.float32) == columns * 4
    # A byte of the first plane has the low 4 bits of two columns, one of the second has the high bits of 8 columns.
    scales, low, high = (array.reshape(rows, -1) for array in table)
    values = np.concatenate([low & 15, low >> 4], axis=1)
    values = values + 16 * np.concatenate([high >> bit & 1 for bit in range(8)], axis=1)
    expected = (values.astype(np.float32) - 16) * scales.repeat(32, axis=1).astype(np.float32)
    np.testing.assert_array_equal(result.stored("model.embed_tokens.weight").numpy(), expected.astype(np.float16))


@pytest.mark.parametrize(("bits", "tolerance"), [(5, 0.08), (8, 0.01)])
def test_rows_are_padded_to_whole_words_and_unpadded_on_reading(bits: int, tolerance: float, tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source", vocab_size=171)
    result = quantized(source, tmp_path / "scratch", embedding_bits=bits)
    table = result.quantized("model.embed_tokens")
    assert table is not None and table.integers.shape == (171, 64) and table.bits == bits
    torch.testing.assert_close(table.dequantize(), source.weight("model.embed_tokens"), atol=tolerance, rtol=tolerance)


def test_untied_head_is_quantized_like_the_embeddings(tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source", tie_word_embeddings=False)
    result = quantized(source, tmp_path / "scratch", embedding_bits=8)
    for name in ("lm_head", "model.embed_tokens"):
        table = result.quantized(name)
        torch.testing.assert_close(table.dequantize(), source.weight(name), atol=0.01, rtol=0.01)
    assert float((result.weight("lm_head") - result.weight("model.embed_tokens")).abs().max()) > 0.1


def test_kept_layers_record_the_reason(tmp_path: Path) -> None:
    source, notes = save_decoder(tmp_path / "source"), Notes()
    result = quantized(source, tmp_path / "scratch", notes, keep=("*.o_proj", "model.layers.0.mlp.up_proj"))
    float_layers = ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"]
    layers = layers_of(result.folder)
    for name in float_layers:
        assert torch.equal(result.stored(f"{name}.weight"), source.stored(f"{name}.weight").half())
        assert layers[name]["why"].startswith("kept by the pattern")
        assert any(f"{name} (kept by the pattern" in line for line in notes.said)
    assert result.quantized("model.layers.1.mlp.up_proj") is not None
    assert result.quantization is not None
    rules = result.quantization["dynamic"]
    assert all(any(re.match(rule.removeprefix("-:"), name) for rule in rules) for name in float_layers)
    assert not any(re.match(rule.removeprefix("-:"), "model.layers.1.mlp.up_proj") for rule in rules)


def test_bits_per_parameter_include_all_tensors(tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source")
    result = quantized(source, tmp_path / "scratch", embedding_bits=4, embedding_group_size=32)
    linear = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 96 * 64)
    table, norms = 160 * 64, 5 * 64
    expected = ((linear + table) * (4 + 16 / 32) + norms * 16) / (linear + table + norms)
    about = json.loads((result.folder / "quantized_layers.json").read_text())
    assert about["bits_per_parameter"] == pytest.approx(expected)
    assert size_bytes(result.folder) < size_bytes(source.folder)


def test_bfloat16_source_gives_similar_weights(tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source")
    errors = [
        layers_of(quantized(source, tmp_path / precision, precision=precision).folder) for precision in ("fp32", "bf16")
    ]
    for name, layer in errors[0].items():
        if layer.get("bits"):
            assert errors[1][name]["error"] == pytest.approx(layer["error"], rel=0.25)
    assert errors[0] != errors[1]


def test_too_short_text_is_refused(tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source")
    with pytest.raises(DataError) as caught:
        Gptq(**SMALL).run(source, context(tmp_path / "scratch", train=text(100)))
    assert "it gives 4 windows of 24 tokens" in str(caught.value) and "6 windows, 144 tokens" in str(caught.value)


def test_text_of_one_token_is_refused(tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source")
    with pytest.raises(DataError, match="100% of the calibration text is the one token 'a'"):
        Gptq(**SMALL).run(source, context(tmp_path / "scratch", train="a" * 400))


def test_overflowing_activations_name_block_and_layer(tmp_path: Path) -> None:
    tensors = load_file(save_decoder(tmp_path / "source").folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e30
    tensors["model.layers.0.mlp.gate_proj.weight"] *= 1e30
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    source = Checkpoint(tmp_path / "source")
    assert "model.layers.0.mlp." in refusal(StageError, source, tmp_path / "plain", guided=False)
    assert "after model.layers.0 is not finite" in refusal(StageError, source, tmp_path / "guided")


@pytest.mark.parametrize(
    ("sizes", "fields", "kind", "messages"),
    [
        (
            {"intermediate_size": 96},
            {"group_size": 64},
            ModelError,
            (
                "2 layers do not fit",
                *(f"model.layers.{n}.mlp.down_proj [64, 96]: 64 does not divide 96, 16, 32 would" for n in (0, 1)),
            ),
        ),
        (
            {"intermediate_size": 80},
            {"group_size": 16},
            ModelError,
            ("6 layers do not fit", "both sides must be multiples of 32"),
        ),
        (
            {},
            {"embedding_bits": 4, "embedding_group_size": 128},
            ModelError,
            ("model.embed_tokens [160, 64]", "embedding_bits: 16"),
        ),
        ({}, {"keep": ("*.router",)}, StageError, ("no layer is called '*.router'",)),
        ({}, {"keep": ("*",)}, StageError, ("No layer is left to quantize",)),
    ],
)
def test_layers_that_cannot_be_quantized_are_named(
    sizes: dict[str, int],
    fields: dict[str, Any],
    kind: type[CompressError],
    messages: tuple[str, ...],
    tmp_path: Path,
) -> None:
    what = refusal(kind, save_decoder(tmp_path / "source", **sizes), tmp_path / "scratch", **fields)
    assert all(message in what for message in messages)


def test_already_quantized_model_is_refused(tmp_path: Path) -> None:
    result = quantized(save_decoder(tmp_path / "source"), tmp_path / "scratch")
    assert "quantized already" in refusal(ModelError, result, tmp_path / "again")


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    tensors = load_file(save_decoder(tmp_path / "source").folder / "model.safetensors")
    tensors["model.norm.weight"] *= 1e6
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageError, match=r"'model\.norm\.weight' holds values beyond float16"):
        quantized(Checkpoint(tmp_path / "source"), tmp_path / "scratch", embedding_bits=16)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bits": 5}, "Input should be 2, 3, 4 or 8"),
        ({"group_size": 48}, "Input should be -1, 16"),
        ({"embedding_bits": 3}, "Input should be 4, 5, 8 or 16"),
        ({"target_bits": 4.5, "max_bytes": 10}, "not both"),
        ({"method": "rtn", "target_bits": 4.5}, "need method: gptq"),
    ],
)
def test_fields_without_an_effect_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Gptq(**fields)


def quantized_family(name: str, folder: Path, group_size: int = 32) -> QuantizedCheckpoint:
    tiny_decoders.save(name, folder / "model")
    stage = Gptq(bits=4, group_size=group_size, samples=8, sequence_length=16, embedding_bits=16)
    return stage.run(Checkpoint(folder / "model"), context(folder / "scratch"))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_dequantized_weights_match_transformers(name: str, tmp_path: Path) -> None:
    checkpoint = quantized_family(name, tmp_path)
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "model").float().eval()
    layers = {layer: about for layer, about in layers_of(checkpoint.folder).items() if about.get("bits")}
    assert len(layers) == 8 and all(about["error"] < 0.1 for about in layers.values())
    with torch.no_grad():
        for layer in layers:
            part = module.get_submodule(layer)
            weight = checkpoint.weight(layer)
            expected_weight = weight.T if name == "gpt2" else weight
            assert 0 < (part.weight - expected_weight).norm() < 0.3 * expected_weight.norm()
            part.weight.copy_(expected_weight)
        for path, parameter in module.named_parameters():
            if path.removesuffix(".weight") not in layers:
                parameter.copy_(parameter.half().float())
        ids = tiny_decoders.some_ids(2, 12)
        torch.testing.assert_close(
            load_quantized_module(checkpoint)(ids).logits, module(ids).logits, rtol=1e-4, atol=1e-4
        )


def test_unsupported_low_rank_matrices_are_kept_with_the_reason(tmp_path: Path) -> None:
    stored_layers = layers_of(quantized_family("deepseek_v3", tmp_path).folder)
    narrow = {
        name.rpartition(".")[2] for name, about in stored_layers.items() if about.get("why", "").startswith("narrow")
    }
    assert narrow == {"q_a_proj", "q_b_proj", "kv_b_proj"}
    assert all(stored_layers[name]["bits"] == 4 for name in stored_layers if name.endswith((".o_proj", ".up_proj")))


def layer(name: str, bits: int, group_size: int = 32) -> Layer:
    return Layer(name, 0, 64, bits, group_size)


def test_layers_with_a_shared_input_are_solved_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 64, generator=generator)
    hessian = inputs.T @ inputs / 256
    layers = [layer("a", 4), layer("b", 4), layer("c", 3), layer("d", 3, 64), layer("e", 3, 64), layer("f", 3, 64)]
    weights = [torch.randn(rows, 64, generator=generator) for rows in (32, 64, 32, 96, 32, 32)]
    calls: list[int] = []

    def counted(weight: torch.Tensor, given: torch.Tensor, settings: GptqSettings) -> object:
        calls.append(len(weight))
        return quantize_gptq(weight, given, settings)

    monkeypatch.setattr("compress.stages.gptq.solver.quantize_gptq", counted)
    monkeypatch.setattr("compress.stages.gptq.solver._STACKED_ROWS", 128)
    solutions = solve_layers(Quantization(), layers, weights, hessian)
    assert calls == [96, 32, 128, 32]
    for solved, given, weight in zip(solutions, layers, weights, strict=True):
        assert given.bits is not None
        expected = quantize_gptq(weight, hessian, GptqSettings(given.bits, given.group_size))
        assert solved.layer.name == given.name and solved.weight.bits == given.bits
        assert torch.equal(solved.weight.integers, expected.quantized.integers)
        assert solved.layer.error == pytest.approx(expected.error, rel=1e-5)


def test_only_the_unroundable_layer_is_named() -> None:
    weights = [torch.ones(32, 64), torch.full((32, 64), torch.nan), torch.ones(32, 64)]
    with pytest.raises(
        StageError, match="The layer k cannot be quantized: the weight holds values that are not finite"
    ):
        solve_layers(Quantization(), [layer("q", 4), layer("k", 4), layer("v", 4)], weights, torch.eye(64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_head_product_and_gradient_equal_plain_matmul(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    # More rows than fit at a time, and a last part that is smaller.
    monkeypatch.setattr(language_head, "ROWS", 7)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(30, 12, generator=generator).to(dtype)
    slope = torch.randn(2, 5, 30, generator=generator)
    ours = torch.randn(2, 5, 12, generator=generator).requires_grad_()
    plain = ours.detach().clone().requires_grad_()
    product, expected = language_head.head_product(ours, weight), plain @ weight.float().T
    torch.testing.assert_close(product, expected)
    product.backward(slope)
    expected.backward(slope)
    torch.testing.assert_close(ours.grad, plain.grad)


def test_autocast_head_product_is_bfloat16_with_float32_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(language_head, "ROWS", 7)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(30, 12, generator=generator).bfloat16()
    hidden = torch.randn(5, 12, generator=generator).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        product = language_head.head_product(hidden, weight)
    assert product.dtype == torch.bfloat16
    slope = torch.randn(5, 30, generator=generator).bfloat16()
    product.backward(slope)
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32
    torch.testing.assert_close(hidden.grad, slope.float() @ weight.float(), atol=0.05, rtol=0.02)
