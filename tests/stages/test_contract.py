"""Tests of the stage contract: output of every stage saves, loads and predicts the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stage_contract import Ran, check_contract, check_reads, make_context, make_input, run, stage_of

from compress.stages.protocols import inferred_output
from compress.stages.registry import STAGES
from compress.utils.storage import digest_directory

QUICK = {"epochs": 0.5, "batch_size": 16, "learning_rate": 1e-3}
RECOVERY = {"steps": 8, "batch_size": 4, "sequence_length": 24, "validation_windows": 6}
PARAMETERS: dict[str, list[dict[str, Any]]] = {
    "finetune": [QUICK, {**QUICK, "freeze_embeddings": True, "dropout": 0.0}],
    "distill": [
        {**QUICK, "student": {"layers": [1]}},
        {**QUICK, "student": {"layers": [0]}, "use_unlabeled": True, "labels_weight": 0.5},
        {**QUICK, "student": {"config": {"hidden_size": 16}}},
    ],
    "prune": [
        {"heads": 0.5, "feed_forward": 0.25},
        {"layers": 1},
    ],
    "sparsify": [{"sparsity": 0.5}],
    "sparsify_gradually": [{**QUICK, "sparsity": 0.5}],
    "prune_decoder": [{"layers": 1, "samples": 4, "sequence_length": 24}],
    "sparsify_decoder": [{"sparsity": 0.5, "method": "wanda", "samples": 4, "sequence_length": 24}],
    "distill_language_model": [
        {"student": {"layers": [0]}, "epochs": 0.5, "batch_size": 2, "learning_rate": 1e-3, "sequence_length": 24}
    ],
    "trim_vocabulary": [{}, {"characters": "seen", "use_unlabeled": True}],
    "onnx": [{}],
    "qat": [{**QUICK, "calibration_examples": 16}],
    "onnx_int8": [
        {},
        {"embedding_bits": 4},
        {"embedding_bits": 32, "per_channel": False, "reduce_range": True},
        {"method": "static", "calibration_examples": 24},
        {"method": "static", "calibration_method": "mse", "format": "qdq"},
        {"accuracy_floor": 0.5},
    ],
    "cast": [{}],
    "static_embeddings": [{"dimensions": 8, "filters": 6}, {"dimensions": 16, "sif": 0, "whiten": True}],
    "reduce_dimensions": [{"dimensions": 8}, {"dimensions": 24, "examples": 40}],
    "onnx_weight_only": [{}, {"bits": 8, "block_size": 64, "symmetric": False}],
    "equalize": [{}, {"strength": 1.0}, {"smooth_quant": 0.5, "samples": 4, "sequence_length": 24}],
    "gptq": [
        {"samples": 4, "sequence_length": 24, "group_size": 32},
        {"samples": 4, "sequence_length": 24, "embedding_bits": 4, "target_bits": 4.4, "group_size": 32},
        {"method": "rtn", "bits": 3, "sym": False, "embedding_bits": 8},
    ],
    "block_qat": [{"samples": 8, "sequence_length": 24, "group_size": 32, "epochs": 2, "batch_size": 2}],
    "nncf_weights": [
        {"samples": 4, "sequence_length": 24, "group_size": 32},
        {"mode": "int4_asym", "samples": 4, "sequence_length": 24, "group_size": 32},
    ],
    "imatrix": [{"samples": 4, "sequence_length": 24}],
    "gguf": [{}, {"float_type": "f32"}],
    "ort": [{}],
    "litert": [{"lengths": [24]}],
    "openvino": [{"embedding_bits": 4}, {"precision": "fp16"}, {"precision": "fp32"}],
    "executorch": [],  # exported once for this and its own tests, there
    "coreml": [{"embedding_bits": 4}],
    "tune_scales": [RECOVERY, {**RECOVERY, "labels_weight": 0.3, "precision": "fp32"}],
    "lora_recovery": [{**RECOVERY, "rank": 2, "learning_rate": 1e-2}],
    "merge_lora": [{"adapter": "adapter"}],
    "attach_lora": [{"adapter": "adapter"}],
    "compressed_tensors": [{}],
    # Stages of text-to-image models are tested on pipelines of several parts.
    **{kind: [] for kind in ("prune_denoiser", "distill_features", "distill_steps", "distill_consistency", "schedule")},
    "distill_autoencoder": [],
}
COMPARED = ("onnx", "openvino", "coreml")
"""Those whose bytes the formats' own tests compare."""
CASES = [
    pytest.param(kind, parameters, id=f"{kind}-{index}")
    for kind, cases in PARAMETERS.items()
    for index, parameters in enumerate(cases)
]


def test_every_stage_is_covered_by_the_contract():
    assert set(PARAMETERS) == set(STAGES)


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, dict[str, Any]], Ran]:
    """Run a stage once for given parameters and cache the result for three tests, since it takes seconds."""
    done: dict[str, Ran] = {}

    def ran(kind: str, parameters: dict[str, Any]) -> Ran:
        key = f"{kind} {parameters}"
        if key not in done:
            done[key] = run(stage_of(kind, parameters), tmp_path_factory.mktemp(kind) / "once")
        return done[key]

    return ran


@pytest.mark.parametrize(("kind", "parameters"), CASES)
def test_output_reloads_and_predicts_the_same(
    kind: str, parameters: dict[str, Any], once: Callable[[str, dict[str, Any]], Ran], tmp_path: Path
):
    check_contract(stage_of(kind, parameters), once(kind, parameters), tmp_path)


@pytest.mark.parametrize(("kind", "parameters"), [case for case in CASES if case.values[0] not in COMPARED])
def test_stage_output_files_are_reproducible(
    kind: str, parameters: dict[str, Any], once: Callable[[str, dict[str, Any]], Ran], tmp_path: Path
):
    twice = run(stage_of(kind, parameters), tmp_path / "twice")
    assert digest_directory(once(kind, parameters).folder) == digest_directory(twice.folder)


@pytest.mark.parametrize(("kind", "parameters"), CASES)
def test_stage_reads_only_declared_splits(
    kind: str, parameters: dict[str, Any], once: Callable[[str, dict[str, Any]], Ran]
):
    check_reads(stage_of(kind, parameters), once(kind, parameters))


@pytest.mark.parametrize(("kind", "parameters"), [case for case in CASES if case.values[0] not in COMPARED])
def test_dry_run_predicts_file_sizes(
    kind: str, parameters: dict[str, Any], once: Callable[[str, dict[str, Any]], Ran], tmp_path: Path
):
    """Tokenizer settings and the recorded number of calibration examples are the only differences."""
    stage = stage_of(kind, parameters)
    context = replace(make_context(stage, tmp_path / "beside"), scratch=tmp_path / "beside" / "scratch")
    rehearsed = inferred_output(stage, make_input(stage, tmp_path / "beside"), context)
    if rehearsed is None:
        assert kind not in ("finetune", "distill", "trim_vocabulary", "cast", "onnx_weight_only")
        return
    rehearsed.save(tmp_path)
    predicted_size, actual_size = (
        {
            path.name: path.stat().st_size
            for path in sorted(folder.rglob("*.[ojs]*"))
            if not path.name.startswith("tokenizer") and "beside" not in path.parts
        }
        for folder in (tmp_path, once(kind, parameters).folder)
    )
    off = {name: abs(size - actual_size[name]) for name, size in predicted_size.items()}
    assert off.keys() == actual_size.keys() and max(off.values()) <= 8 * ("static" in parameters.values())
