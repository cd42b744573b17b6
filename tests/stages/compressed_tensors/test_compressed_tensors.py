"""Tests of compressed-tensors checkpoints: opened on the CPU by transformers and the compressed-tensors package."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from decoders import context, inputs_of_layers, module_of, save_decoder, some_ids
from mergeable import save_mergeable_llama
from quantized import quantize_tiny_llama, save_tiny_llama
from safetensors.torch import load_file, save_file

from compress.formats.gguf.stage import Gguf
from compress.formats.safetensors.runtime import RUNTIME
from compress.formats.targets import REFERENCE
from compress.inspection.tensors import read_model
from compress.models.checkpoint import Checkpoint, CompressedTensorsCheckpoint, QuantizedCheckpoint, write_with_changes
from compress.models.quantized_module import load_quantized_module
from compress.stages.blockwise.blockwise_model import logits
from compress.stages.blockwise.calibration import calibration_sequences
from compress.stages.compressed_tensors import export
from compress.stages.compressed_tensors.stage import CompressedTensors
from compress.stages.equalize.stage import Equalize
from compress.stages.gptq.stage import Gptq
from compress.utils.errors import ModelError, StageError

IDS = some_ids(2, 12)
QUANTIZED: dict[str, dict[str, Any]] = {
    "W4A16": {"bits": 4, "group_size": 32, "embedding_bits": 4},
    "W4A16 but for down": {"bits": 4, "group_size": 64, "keep": ("*.down_proj",)},
    "W3A16": {"bits": 3, "group_size": 64},
    "W8A16": {"bits": 8, "group_size": -1, "embedding_bits": 16},
}


@dataclass(frozen=True)
class Made:
    """A GPTQ checkpoint, its compressed-tensors version, and the stage's note."""

    before: QuantizedCheckpoint
    after: CompressedTensorsCheckpoint
    remark: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    folder = tmp_path_factory.mktemp("served")
    source = save_tiny_llama(folder / "source")
    results = {}
    for name, fields in QUANTIZED.items():
        quantized = Gptq(method="rtn", **fields).run(source, context(folder / name))
        results[name] = serve(quantized, folder / name)
    return results | {"W8A8": serve(results["W8A16"].before, folder / "W8A8", activation_bits=8)}


def serve(before: QuantizedCheckpoint, folder: Path, **fields: Any) -> Made:
    layout_context = context(folder / "layout")
    return Made(before, CompressedTensors(**fields).run(before, layout_context), layout_context.notes[-1])


def answers(folder: Path) -> np.ndarray:
    """Return the logits of the evaluation runtime: transformers with compressed-tensors."""
    session = RUNTIME.open(folder, REFERENCE.target, 1)
    return session.predict({"input_ids": IDS.numpy()})["logits"]


@pytest.mark.parametrize("name", QUANTIZED)
def test_transformers_logits_match_the_dequantized_weights(made: dict[str, Made], name: str) -> None:
    np.testing.assert_allclose(answers(made[name].after.folder), logits(made[name].before, IDS), atol=2e-5)


@pytest.mark.parametrize("name", QUANTIZED)
def test_compressed_tensors_unpacks_our_integers(made: dict[str, Made], name: str) -> None:
    original, after = made[name].before, made[name].after
    groups = QuantizationConfig.model_validate(after.quantization).config_groups
    assert list(groups) == ["group_0"] and original.integer_layers
    for layer in original.integer_layers:
        weight = original.quantized(layer)
        parts = PackedQuantizationCompressor.compression_param_names(groups["group_0"])
        stored = {part: after.stored(f"{layer}.{part}") for part in parts}
        unpacked = PackedQuantizationCompressor.decompress(stored, groups["group_0"])["weight"]
        # In float16, in which a server dequantizes: one rounding of the product of an integer and a scale.
        assert torch.equal(unpacked, weight.dequantize().half())
        again = after.quantized(layer)
        assert again is not None and torch.equal(again.integers, weight.integers)
        assert torch.equal(again.zero_points, weight.zero_points) and torch.equal(again.scales, weight.scales)


def test_activations_are_quantized_with_one_scale_per_token(made: dict[str, Made]) -> None:
    original, after = made["W8A8"].before, made["W8A8"].after
    stored = {str(after.stored(f"{layer}.weight").dtype) for layer in after.integer_layers}
    assert stored == {"torch.int8"} and not any("packed" in name for name in after.files)

    def rounding(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
        scale = given[0].abs().amax(-1, keepdim=True) / 127.5
        return (given[0] / scale).round().clamp(-128, 127) * scale

    module = load_quantized_module(original)
    for layer in original.integer_layers:
        module.get_submodule(layer).register_forward_pre_hook(rounding)
    with torch.no_grad():
        expected = module(input_ids=IDS).logits
    np.testing.assert_allclose(answers(after.folder), expected, atol=2e-5)
    assert float((expected - logits(original, IDS)).abs().max()) > 1e-3


def test_config_equals_that_of_llm_compressor(made: dict[str, Made]) -> None:
    config = json.loads((made["W8A8"].after.folder / "config.json").read_text())
    assert config["dtype"] == "float16"
    about = config["quantization_config"]
    assert about["format"] == "int-quantized" and about["ignore"] == ["lm_head"]
    group = about["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    weights, inputs = group["weights"], group["input_activations"]
    assert (weights["strategy"], weights["dynamic"], weights["num_bits"]) == ("channel", False, 8)
    assert (inputs["strategy"], inputs["dynamic"], inputs["symmetric"]) == ("token", True, True)
    quantization = made["W4A16 but for down"].after.quantization
    assert quantization is not None and quantization["ignore"] == [
        *(f"model.layers.{n}.mlp.down_proj" for n in (0, 1)),
        "lm_head",
    ]
    assert not (made["W4A16"].after.folder / "quantize_config.json").exists()
    assert "14 layers, W4A16 in groups of 32" in made["W4A16"].remark and "not run on a GPU" in made["W4A16"].remark


@pytest.mark.parametrize("name", ["W4A16", "W3A16", "W8A8"])
def test_inspect_counts_equal_weights_in_both_layouts(made: dict[str, Made], name: str) -> None:
    def counted(folder: Path) -> dict[str, int]:
        counts: dict[str, int] = {}
        for tensor in read_model(folder).tensors:
            if ".layers." in tensor.name and tensor.parameters and "norm" not in tensor.name:
                counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.parameters
        return counts

    bits = int(name[1])
    assert counted(made[name].after.folder) == counted(made[name].before.folder) == {f"int{bits}": 73_728}
    roles = {tensor.name.rpartition(".")[2]: tensor.role for tensor in read_model(made[name].after.folder).tensors}
    assert roles["weight_scale"] == "quantization"


def test_gguf_equals_gguf_of_the_gptq_checkpoint(tmp_path: Path) -> None:
    stage = Gptq(method="rtn", group_size=32, embedding_bits=8)
    original = stage.run(save_mergeable_llama(tmp_path / "source"), context(tmp_path / "few"))
    after = serve(original, tmp_path).after
    files = [
        Gguf().run(checkpoint, context(tmp_path / name)).folder
        for name, checkpoint in {"a": original, "b": after}.items()
    ]
    first, second = (next(folder.glob("*.gguf")).read_bytes() for folder in files)
    assert first == second


def test_layers_of_mixed_bits_form_config_groups(tmp_path: Path) -> None:
    source = save_tiny_llama(tmp_path / "source")
    stage = Gptq(method="rtn", group_size=32)
    original = stage.run(source, context(tmp_path / "four"))
    eight = Gptq(method="rtn", group_size=32, bits=8).run(source, context(tmp_path / "eight"))
    mixed = QuantizedCheckpoint(shutil.copytree(original.folder, tmp_path / "mixed"))
    change(mixed, eight, [f"model.layers.{n}.mlp.down_proj" for n in (0, 1)])
    after = serve(QuantizedCheckpoint(mixed.folder), tmp_path).after
    np.testing.assert_allclose(answers(after.folder), logits(QuantizedCheckpoint(mixed.folder), IDS), atol=2e-5)

    change(mixed, eight, ["model.layers.0.self_attn.k_proj"])
    with pytest.raises(ModelError, match=r"one layer of model\.layers\.0\.self_attn\.q_proj"):
        serve(QuantizedCheckpoint(mixed.folder), tmp_path / "again")


def change(checkpoint: QuantizedCheckpoint, other: QuantizedCheckpoint, layers: list[str]) -> None:
    """Replace the integers of ``layers`` by those of another checkpoint, in place."""
    path = checkpoint.folder / "model.safetensors"
    tensors = load_file(path)
    for layer in layers:
        names = [f"{layer}.{part}" for part in ("qweight", "qzeros", "scales")]
        tensors |= {name: other.stored(name).clone() for name in names}
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((checkpoint.folder / "config.json").read_text())
    config["quantization_config"].setdefault("dynamic", {}).update({f"+:^{layer}$": {"bits": 8} for layer in layers})
    (checkpoint.folder / "config.json").write_text(json.dumps(config))


def test_changed_integer_is_detected_after_unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = quantize_tiny_llama(save_tiny_llama(tmp_path / "source"), tmp_path / "before", table_bits=None)
    whole = export.pack_layer

    def broken(weight: Any) -> dict[str, torch.Tensor]:
        parts = whole(weight)
        parts["weight_packed"][-1, -1] ^= 1
        return parts

    monkeypatch.setattr(export, "pack_layer", broken)
    with pytest.raises(StageError, match="unpacks other numbers"):
        serve(original, tmp_path)


def test_unsupported_layers_and_settings_are_refused_by_name(made: dict[str, Made], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"_proj has 4 bits, group_size 32"):
        serve(made["W4A16"].before, tmp_path, activation_bits=8)
    rows = CompressedTensors(activation_bits=8)
    assert rows.conflicts_with(Gptq(bits=8, group_size=64)) is not None
    assert rows.conflicts_with(Gptq(bits=4, group_size=-1)) is not None
    assert rows.conflicts_with(Gptq(bits=8, group_size=-1, sym=False)) is not None
    assert CompressedTensors().conflicts_with(Gptq(sym=False)) == (
        "sym",
        "true: transformers opens no such layout with zero points",
    )
    assert (
        rows.conflicts_with(Gptq(bits=8, group_size=-1)) is None and CompressedTensors().conflicts_with(Gptq()) is None
    )

    mixture = save_decoder(tmp_path / "mixture", "MixtralConfig")
    few = Gptq(method="rtn", group_size=32).run(mixture, context(tmp_path / "experts"))
    with pytest.raises(ModelError, match=r"none in transformers' MixtralForCausalLM, such as .*experts"):
        serve(few, tmp_path / "refused")


def test_smoothing_preserves_logits_and_shrinks_large_inputs(tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source")
    norm = "model.layers.0.input_layernorm.weight"
    loud = source.stored(norm).clone()
    loud[7] *= 40
    folder = tmp_path / "loud"
    folder.mkdir()
    write_with_changes(source, folder, {norm: loud})
    original = Checkpoint(folder)
    stage = Equalize(smooth_quant=0.5, samples=4, sequence_length=16)
    after = stage.run(original, context(tmp_path / "work"))
    smoothed_logits, expected = logits(after, IDS), logits(original, IDS)
    torch.testing.assert_close(smoothed_logits, expected, atol=1e-3 * float(expected.abs().max()), rtol=0)

    # Equation 4 of the paper, but for a factor that all columns share.
    gain, layers = after.stored(norm) / original.stored(norm), "model.layers.0.self_attn"
    weights = torch.cat([original.stored(f"{layers}.{name}_proj.weight") for name in "qkv"]).abs().amax(0)
    ratios = gain * (largest_inputs(original, tmp_path) / weights).sqrt()
    torch.testing.assert_close(ratios, ratios.mean().expand_as(ratios), rtol=1e-4, atol=0)
    turned = original.stored(f"{layers}.q_proj.weight") / gain
    torch.testing.assert_close(after.stored(f"{layers}.q_proj.weight"), turned, rtol=1e-4, atol=1e-6)
    assert int(gain.argmin()) == 7


def largest_inputs(checkpoint: Checkpoint, folder: Path) -> torch.Tensor:
    """The largest inputs of the first attention on the stage's windows, from transformers alone."""
    ids = calibration_sequences(context(folder / "windows"), checkpoint, 4, 16)
    return inputs_of_layers(module_of(checkpoint), ids)["model.layers.0.self_attn.q_proj"].abs().amax(0)


def test_only_smoothing_needs_text() -> None:
    assert Equalize().needs().splits == () and Equalize(smooth_quant=0.5).needs().splits == ("train",)
