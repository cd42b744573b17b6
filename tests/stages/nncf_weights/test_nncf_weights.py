"""Tests of NNCF weight compression: dequantized weights and logits against those of NNCF's own model."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import pytest
import torch
from decoders import Notes, context, layers_of, module_of, save_decoder, some_ids, text
from mergeable import save_mergeable_llama
from nncf.torch.function_hook.wrapper import get_hook_storage
from pydantic import ValidationError

from compress.formats.gguf.export import compare_gguf, write_gguf
from compress.formats.onnx.decoder import GraphSettings, export_decoder, verify_decoder
from compress.models.checkpoint import Checkpoint, QuantizedCheckpoint
from compress.models.quantized_module import load_quantized_module
from compress.stages.blockwise.calibration import calibration_sequences
from compress.stages.nncf_weights.stage import NncfWeights
from compress.utils.errors import CompressError, ModelError, StageError

SMALL = {"group_size": 32, "samples": 6, "sequence_length": 24}
IDS = some_ids(3, 20, seed=5)
KEPT = "model.layers.1.mlp.up_proj"
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "both": ({}, {"backup_mode": nncf.BackupMode.INT8_SYM}),
    "neither": (
        {"awq": False, "scale_estimation": False, "group_size": -1},
        {"awq": False, "scale_estimation": False, "backup_mode": nncf.BackupMode.INT8_SYM, "group_size": -1},
    ),
    "zero points": (
        {"mode": "int4_asym", "all_layers": True},
        {"mode": nncf.CompressWeightsMode.INT4_ASYM, "all_layers": True, "backup_mode": nncf.BackupMode.INT8_SYM},
    ),
    "one kept": (
        {"keep": ("*.1.mlp.up_proj",), "awq": False},
        {
            "ignored_scope": nncf.IgnoredScope(names=[f"{KEPT}.weight"]),
            "backup_mode": nncf.BackupMode.INT8_SYM,
            "awq": False,
        },
    ),
}


def compressed(checkpoint: Checkpoint, scratch: Path, notes: Notes | None = None, **fields: Any) -> QuantizedCheckpoint:
    return NncfWeights(**{**SMALL, **fields}).run(checkpoint, context(scratch, progress=notes))


def theirs(checkpoint: Checkpoint, scratch: Path, **options: Any) -> Any:
    """Return NNCF's own compressed model, from transformers' model and the same windows."""
    windows = calibration_sequences(context(scratch), checkpoint, 6, 24)
    feeds = [{"input_ids": window[None], "attention_mask": torch.ones_like(window[None])} for window in windows]
    model = module_of(checkpoint)
    model.config.use_cache = False
    chosen = {
        **{"mode": nncf.CompressWeightsMode.INT4_SYM, "ratio": 1.0, "group_size": 32, "subset_size": 6},
        **{"awq": True, "scale_estimation": True},
        **options,
    }
    return nncf.compress_weights(model, dataset=nncf.Dataset(feeds), **chosen)


def expanded(model: Any) -> dict[str, torch.Tensor]:
    """Return every parameter, by name, as NNCF's hooks decompress it for computation."""
    hooks = {
        name.split(".")[-2].rsplit("__", 1)[0].replace(":", "."): hook
        for name, hook in get_hook_storage(model).named_hooks()
    }
    return {name: hooks[name](value.data) if name in hooks else value.data for name, value in model.named_parameters()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save_decoder(tmp_path_factory.mktemp("decoder") / "source")


@pytest.fixture(scope="module")
def results(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, QuantizedCheckpoint]:
    """Compress each case of `CASES` once."""
    folder = tmp_path_factory.mktemp("results")
    return {name: compressed(source, folder / name, **fields) for name, (fields, _) in CASES.items()}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_weights_and_logits_equal_those_of_nncf(
    source: Checkpoint, results: Mapping[str, QuantizedCheckpoint], case: str, tmp_path: Path
) -> None:
    result, oracle = results[case], theirs(source, tmp_path, **CASES[case][1])
    for name, expected in expanded(oracle).items():
        module, _, leaf = name.rpartition(".")
        tensor = result.weight(module) if leaf == "weight" else result.stored(name).float()
        # NNCF multiplies in float16, so that its products are rounded once more than the integers and scales are.
        assert torch.equal(tensor.half(), expected.half()), name
    logits, expected = load_quantized_module(result)(input_ids=IDS).logits, oracle(input_ids=IDS).logits
    assert float((logits - expected).abs().max()) < 5e-3 * float(expected.std())
    assert float((expected - module_of(source)(input_ids=IDS).logits).abs().max()) > 0.1 * float(expected.std())


def test_cases_have_the_bits_and_groups_of_their_names(
    source: Checkpoint, results: Mapping[str, QuantizedCheckpoint]
) -> None:
    layers = {name: layers_of(result.folder) for name, result in results.items()}

    def bits(name: str) -> Mapping[str, Any]:
        return {layer: about.get("bits") for layer, about in layers[name].items()}

    table = "model.embed_tokens"
    assert bits("both") == {layer: 8 if layer == table else 4 for layer in layers["both"]}
    assert bits("neither") == bits("both")
    assert bits("zero points") == dict.fromkeys(layers["zero points"], 4)
    assert bits("one kept") == {
        layer: None if layer == KEPT else 8 if layer == table else 4 for layer in layers["both"]
    }
    assert layers["one kept"][KEPT]["why"] == "kept by the pattern '*.1.mlp.up_proj'"
    # Without AWQ nothing but integers is new.
    assert torch.equal(results["one kept"].stored(f"{KEPT}.weight").float(), source.weight(KEPT).half().float())
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(results["both"].stored(norm).float(), source.stored(norm).half().float())
    assert {results["neither"].layer_settings(layer)["group_size"] for layer in layers["both"]} == {-1}
    scales = results["both"].quantized("model.layers.0.mlp.up_proj")
    assert scales is not None and float(scales.scales.min()) < 0 < float(scales.scales.max())


@pytest.mark.parametrize("case", ["zero points", "both"])
def test_onnx_and_gguf_exports_match_the_checkpoint(case: str, tmp_path: Path) -> None:
    result = compressed(save_mergeable_llama(tmp_path / "source"), tmp_path / "scratch", **CASES[case][0])
    model = export_decoder(result, GraphSettings(accuracy_level=1))
    ids = np.asarray(IDS[:2])
    assert "from torch" in str(verify_decoder(model, result, ids, 1e-3, 0.2))
    write_gguf(result, tmp_path / "model.gguf")
    for difference in compare_gguf(tmp_path / "model.gguf", result):
        assert difference.largest <= difference.allowed


def test_average_bits_include_all_tensors(source: Checkpoint, tmp_path: Path) -> None:
    notes = Notes()
    result = compressed(source, tmp_path, notes=notes)
    weights = {name: result.stored(name) for name in result.files}
    plain = [tensor for name, tensor in weights.items() if name.startswith("model.") and name.endswith("norm.weight")]
    packed = {name for name in result.files if name.endswith(".qweight")}
    linear = sum(weights[name].numel() * 32 for name in packed)
    scales = sum(16 * weights[name.replace("qweight", "scales")].numel() for name in packed)
    rows, columns = source.weight("model.embed_tokens").shape
    parameters = linear // 4 + rows * columns + sum(tensor.numel() for tensor in plain)
    stored = linear + scales + rows * (8 * columns + 16) + 16 * sum(tensor.numel() for tensor in plain)
    expected = stored / parameters
    assert f"{expected:.2f} bits a parameter on average" in notes.said[-1]
    assert "14 at 4 bits and 1 at 8 bits" in notes.said[-1]


ALONE = """
import sys
from pathlib import Path
from compress.models.checkpoint import Checkpoint
from compress.stages.nncf_weights.stage import NncfWeights
from decoders import Notes, context

notes = Notes()
stage = NncfWeights(group_size=32, samples=6, sequence_length=24)
stage.run(Checkpoint(Path(sys.argv[1])), context(Path(sys.argv[2]), progress=notes))
assert "4 bits" in notes.said[-1], notes.said
from nncf.telemetry import telemetry
assert "Stub" in type(telemetry).__name__ or "Mock" in type(telemetry).__name__, type(telemetry)
"""


@pytest.mark.slow
def test_stage_prints_nothing_and_sends_no_telemetry(source: Checkpoint, tmp_path: Path) -> None:
    # In a process of its own: NNCF sends nothing from within pytest, and here it is imported by the stage.
    tests_folder = Path(__file__).parent
    folders = os.pathsep.join(map(str, (tests_folder, tests_folder.parents[1] / "support", tests_folder.parents[2])))
    environment = {name: value for name, value in os.environ.items() if name != "NNCF_CI"} | {"PYTHONPATH": folders}
    command = [sys.executable, "-c", ALONE, str(source.folder), str(tmp_path / "scratch")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_nncf_logger_is_restored(source: Checkpoint, tmp_path: Path) -> None:
    handlers_before = logging.getLogger("nncf").handlers[:]
    compressed(source, tmp_path)
    assert handlers_before and logging.getLogger("nncf").handlers == handlers_before


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"gptq": True}, "Extra inputs are not permitted"),
        ({"mode": "nf4"}, "'int4_sym' or 'int4_asym'"),
    ],
)
def test_settings_unsupported_by_the_torch_backend_are_refused(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        NncfWeights.model_validate({"kind": "nncf_weights", **fields})
    assert expected in str(caught.value)
    assert [detail["loc"] for detail in caught.value.errors()] == [tuple(fields)]


def refusal(kind: type[CompressError], checkpoint: Checkpoint, scratch: Path, **fields: Any) -> str:
    with pytest.raises(kind) as caught:
        compressed(checkpoint, scratch, **fields)
    assert not (scratch / "checkpoint").exists()
    return str(caught.value)


def test_awq_scale_applied_at_run_time_is_refused(tmp_path: Path) -> None:
    phi = save_decoder(tmp_path / "phi", "PhiConfig", hidden_act="gelu")
    message = refusal(StageError, phi, tmp_path / "scratch")
    assert "scales the inputs of" in message and "mlp" in message and "awq: false" in message
    result = compressed(phi, tmp_path / "plain", awq=False)
    assert layers_of(result.folder)["model.layers.0.mlp.fc2"]["bits"] == 4


def test_routers_stay_float(tmp_path: Path) -> None:
    mixture = save_decoder(tmp_path / "mixture", "MixtralConfig", num_local_experts=4, num_experts_per_tok=2)
    layers = layers_of(compressed(mixture, tmp_path / "scratch", awq=False).folder)
    router_layers = {name: layer for name, layer in layers.items() if name.endswith(("gate", "gate.weight"))}
    assert len(router_layers) == 2 and not any(layer.get("bits") for layer in router_layers.values())
    assert [layer["bits"] for name, layer in layers.items() if name.endswith("o_proj")] == [4, 4]


def test_awq_scale_of_a_kept_layer_is_refused(source: Checkpoint, tmp_path: Path) -> None:
    message = refusal(StageError, source, tmp_path, keep=("*.1.mlp.up_proj",))
    assert "mlp/up_proj" in message and "keep both layers" in message


def test_awq_without_an_effect_is_reported(tmp_path: Path) -> None:
    notes = Notes()
    compressed(save_decoder(tmp_path / "phi", "PhiConfig"), tmp_path / "scratch", notes)
    assert [line for line in notes.said if "No matching patterns were found for applying AWQ" in line]


def test_invalid_settings_are_refused_before_any_work(
    source: Checkpoint, results: Mapping[str, QuantizedCheckpoint], tmp_path: Path
) -> None:
    assert "96" in refusal(ModelError, source, tmp_path / "wide", group_size=64)
    assert "no layer is called 'nothing'" in refusal(StageError, source, tmp_path / "kept", keep=("nothing",))
    result_folder = results["both"].folder
    assert "quantized already" in refusal(ModelError, Checkpoint(result_folder), tmp_path / "twice")


def test_too_little_text_is_refused(source: Checkpoint, tmp_path: Path) -> None:
    stage = NncfWeights(**SMALL)
    with pytest.raises(CompressError, match="too short"):
        stage.run(source, context(tmp_path, train=text(60)))
