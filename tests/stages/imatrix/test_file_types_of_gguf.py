"""Tests of llama.cpp's quantization types in GGUF: tensors equal those of llama.cpp's own quantizer."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from decoders import Notes, context, save_decoder
from gguf import GGUFReader
from mergeable import ROWS, save_mergeable_llama, train_tokenizer
from quantized import quantize_tiny_llama
from rotation import todays
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from compress.formats.gguf.blocks import quantize_rows, row_bytes
from compress.formats.gguf.export import GgufTypes, plan_gguf, write_gguf
from compress.formats.gguf.file_types import FILE_TYPES, estimate_bytes
from compress.formats.gguf.llama_cpp_library import VARIABLE
from compress.formats.gguf.llama_cpp_library import library as library_of
from compress.formats.gguf.stage import Gguf
from compress.formats.runtime import get_runtime
from compress.formats.targets import TARGETS
from compress.models.checkpoint import Checkpoint
from compress.models.safetensors_file import IMATRIX, read_imatrix
from compress.pipeline.recipe_sources import read_shape
from compress.stages.cost_model import PlanContext
from compress.stages.gptq.stage import Gptq
from compress.stages.imatrix.stage import Imatrix
from compress.utils.errors import ModelError

WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "num_hidden_layers": 16}
LLAMAS: dict[str, dict[str, Any]] = {
    "shared": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "apart": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "narrow": {"hidden_size": 288, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
}


def with_imatrix(checkpoint: Checkpoint) -> None:
    """Write a random importance matrix beside a checkpoint."""
    generator = torch.Generator().manual_seed(1)
    matrices = [
        matrix
        for matrix in plan_gguf(checkpoint)
        if matrix.source and ".layers." in matrix.source and len(matrix.shape) == 2
    ]
    names = {str(matrix.source).removesuffix(".weight"): matrix.shape[1] for matrix in matrices}
    save_file(
        {name: torch.rand(size, generator=generator) ** 4 for name, size in names.items()}, checkpoint.folder / IMATRIX
    )


def by_llama_cpp(library: Path, folder: Path, file_type: str, imatrix: Path | None) -> dict[str, Any]:
    """Return the tensors of the file that llama.cpp's own quantizer writes."""
    script = Path(__file__).parents[3] / "benchmarks" / "peers" / "llama_cpp_quantize.py"
    order: dict[str, Any] = {
        "library": str(library),
        "source": str(folder / "f32.gguf"),
        "output": str(folder / "theirs.gguf"),
    }
    order |= {"file_type": file_type, "threads": 1} | ({} if imatrix is None else {"imatrix": str(imatrix)})
    (folder / "order.json").write_text(json.dumps(order))
    command = [sys.executable, str(script), str(folder / "order.json"), str(folder / "answer.json")]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return {tensor.name: tensor for tensor in GGUFReader(folder / "theirs.gguf").tensors}


def saved(kind: str, folder: Path) -> Checkpoint:
    """Save a decoder with tied embeddings, rows of partial blocks, experts or fused attention, as the case asks."""
    if kind in LLAMAS:
        return save_mergeable_llama(folder, **{**WIDE, **LLAMAS[kind]})
    sizes = {**WIDE, "num_hidden_layers": 8, "num_key_value_heads": 4, "vocab_size": ROWS}
    more: dict[str, Any] = {"MixtralConfig": {"num_local_experts": 8}, "Qwen2MoeConfig": {"moe_intermediate_size": 256}}
    source = save_decoder(folder, kind, **sizes, **more.get(kind, {}))
    train_tokenizer().save_pretrained(folder)
    return source


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*LLAMAS, "MixtralConfig", "Qwen2MoeConfig", "Phi3Config"])
@pytest.mark.parametrize("file_type", todays(FILE_TYPES, 12, str))
def test_tensors_equal_those_of_the_llama_cpp_quantizer(
    tmp_path: Path, file_type: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peers.environment import UnavailableError
    from peers.language_peers import imatrix_by_tensor
    from peers.llama_cpp_library import llama_cpp_library

    weighed = kind in LLAMAS and kind != "apart"
    try:
        library = llama_cpp_library()
    except UnavailableError as error:
        pytest.skip(str(error))
    # Builds differ in the last digits of a matrix product, so both use the same library.
    monkeypatch.setenv(VARIABLE, str(library))
    monkeypatch.setattr("compress.formats.gguf.blocks.library", library_of.__wrapped__)
    source, imatrix = saved(kind, tmp_path / "source"), None
    if weighed:
        imatrix = tmp_path / "by-tensor.safetensors"
        with_imatrix(source)
        imatrix_by_tensor(source, imatrix)
    write_gguf(source, tmp_path / "f32.gguf", GgufTypes("f32"))
    theirs = by_llama_cpp(library, tmp_path, file_type, imatrix)
    write_gguf(source, tmp_path / "ours.gguf", GgufTypes("f32", file_type))
    ours = GGUFReader(tmp_path / "ours.gguf")
    assert ours.fields["general.file_type"].parts[-1][0] == FILE_TYPES[file_type].number
    kinds = {tensor.name: tensor.tensor_type.name for tensor in ours.tensors}
    assert kinds == {name: tensor.tensor_type.name for name, tensor in theirs.items()}
    for tensor in ours.tensors:
        # A matrix of one row has one dimension there.
        assert np.array_equal(tensor.data.ravel(), theirs[tensor.name].data.ravel()), tensor.name


def test_stage_note_lists_all_tensor_types() -> None:
    (names, _) = get_args(Gguf.model_fields["type"].annotation)
    assert set(get_args(names)) == set(FILE_TYPES)


def planned_bytes(checkpoint: Checkpoint, types: GgufTypes) -> int:
    """Return the predicted size in bytes of all tensors of the file."""
    planned = plan_gguf(checkpoint, types)
    return sum(row_bytes(tensor.kind, tensor.shape[-1]) * math.prod(tensor.shape[:-1]) for tensor in planned)


@pytest.mark.parametrize(("hidden", "tied"), [(256, True), (288, False)])
def test_size_of_every_type_is_predicted_from_the_shape(tmp_path: Path, hidden: int, tied: bool) -> None:
    sides = WIDE | {"hidden_size": hidden, "intermediate_size": 768, "num_key_value_heads": 2}
    source = save_mergeable_llama(tmp_path / "source", tie_word_embeddings=tied, **sides)
    with_imatrix(source)
    shape = read_shape(source.folder)
    predictions = []
    for name in FILE_TYPES:
        size = planned_bytes(source, GgufTypes(file_type=name))
        assert estimate_bytes(name, shape) == pytest.approx(size, rel=0.01), name
        predictions.append(size)
    (tried,) = Gguf(type="Q4_K_M").search_values(shape).values()
    assert [*tried] == sorted(FILE_TYPES, key=lambda name: estimate_bytes(name, shape))
    assert max(predictions) > 1.5 * min(predictions) and Gguf().search_values(shape) == {}


@pytest.mark.parametrize("bits", [3, 4, 8, 32])
def test_size_of_kept_integers_is_predicted(tmp_path: Path, bits: int) -> None:
    plan = PlanContext(64, True, {}, {}, lambda name, drawn: None, lambda: 1e9, generates=True)
    checkpoint: Checkpoint = save_mergeable_llama(tmp_path / "source", **(WIDE | {"intermediate_size": 768}))
    shape = replace(read_shape(checkpoint.folder), processor_bytes=1000)
    if bits != 32:
        checkpoint, shape = quantize_tiny_llama(checkpoint, tmp_path / "quantized", bits, 64), shape.in_bits(bits, 4)
    predicted_bytes = Gguf().predict(shape, plan).disk_bytes.value
    assert predicted_bytes == pytest.approx(planned_bytes(checkpoint, GgufTypes()) + 1000, rel=0.01)


def test_errors_are_small_where_inputs_are_large() -> None:
    values = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)
    importance = np.random.default_rng(1).random(512, dtype=np.float32) ** 8
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    for kind in ("Q4_0", "Q4_K", "Q2_K"):
        plain, weighed = (
            np.square(dequantize(quantize_rows(values, kind, given), GGMLQuantizationType[kind]) - values) @ importance
            for given in (None, importance)
        )
        assert weighed.sum() < 0.95 * plain.sum(), kind


def test_importance_matrix_is_the_mean_square_of_layer_inputs(tmp_path: Path) -> None:
    source, notes = save_decoder(tmp_path / "source"), Notes()
    weighted = Imatrix(samples=6, sequence_length=24, precision="fp32").run(
        source, context(tmp_path / "w", progress=notes)
    )
    from compress.stages.blockwise.calibration import calibration_sequences

    ids = calibration_sequences(context(tmp_path / "w"), source, 6, 24)
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    seen: dict[str, torch.Tensor] = {}
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear) and ".layers." in name:
            part.register_forward_pre_hook(
                lambda _, given, name=name: seen.update({name: given[0].flatten(0, -2).square().mean(0)})
            )
    with torch.no_grad():
        model(input_ids=ids)
    importance = read_imatrix(weighted.folder)
    assert set(importance) == set(seen) and len(seen) == 7 * len(model.model.layers)
    for name, squares in seen.items():
        torch.testing.assert_close(importance[name], squares, rtol=1e-4, atol=1e-7)
    assert sorted(path.name for path in weighted.folder.iterdir() if path.name != IMATRIX) == sorted(
        path.name for path in source.folder.iterdir()
    )
    assert f"imatrix: inputs of {len(seen)} layers on 144 tokens" in notes.said


def test_each_expert_has_an_importance_matrix_and_llama_cpp_runs_it(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8}
    source = save_decoder(tmp_path / "source", "MixtralConfig", vocab_size=ROWS, sliding_window=None, **sizes)
    train_tokenizer().save_pretrained(source.folder)
    weighted = Imatrix(samples=6, sequence_length=24, precision="fp32").run(source, context(tmp_path / "w"))
    kinds = {tensor.name: tensor.kind for tensor in plan_gguf(weighted, GgufTypes(file_type="Q4_K_M"))}
    assert kinds["blk.0.ffn_gate_exps.weight"] == "Q4_K" and kinds["output.weight"] == "Q6_K"
    assert kinds["blk.0.ffn_gate_inp.weight"] == "F32"
    converted = Gguf(type="Q8_0").run(weighted, context(tmp_path / "g", progress=(notes := Notes())))
    assert any("gguf: Q8_0, by the importance matrix" in line for line in notes.said)
    ids = np.random.default_rng(0).integers(3, ROWS, (1, 40))
    answers = (
        get_runtime("llama-cpp").open(converted.file, TARGETS["llama-cpp"], 1).predict({"input_ids": ids})["logits"]
    )
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected_logits = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    assert np.corrcoef(answers.ravel(), expected_logits.ravel())[0, 1] > 0.995


def test_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    source = save_mergeable_llama(tmp_path / "source", **{**WIDE, "num_hidden_layers": 2})
    assert Gguf(type="Q4_K_M").conflicts_with(Gptq()) is not None and Gguf().conflicts_with(Gptq()) is None
    quantized = Gptq(method="rtn", group_size=32).run(Checkpoint(source.folder), context(tmp_path / "q"))
    with pytest.raises(ModelError, match="quantized already"):
        Gguf(type="Q4_K_M").run(quantized, context(tmp_path / "w"))


def test_baseline_is_exported_without_rounding() -> None:
    assert Gguf(type="Q4_K_M", float_type="f32").without_rounding() == Gguf(float_type="f32")
