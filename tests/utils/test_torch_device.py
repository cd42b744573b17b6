"""Tests of the recipe's device: detection, refusal, and cache keys that name it only where it changes results."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from pydantic import ValidationError

from compress.cli.doctor_machine import device_findings
from compress.pipeline.keys import Keys
from compress.pipeline.planning import make_plan
from compress.recipe.recipe import Recipe
from compress.stages.base import Stage
from compress.stages.protocols import Trains
from compress.stages.registry import STAGES
from compress.stages.training.processes import own_device
from compress.utils import torch_device
from compress.utils.errors import DeviceError, InputError
from compress.utils.torch_device import (
    current_device,
    device_fault,
    device_memory_errors,
    resolve_device,
    use_device,
    uses_bf16,
)


def built(patch: pytest.MonkeyPatch, build: str, gpus: int = 0) -> None:
    """Simulate a torch build with the given number of GPUs."""
    patch.setattr(torch_device, "package_versions", lambda names: {"torch": build})
    patch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    patch.setattr(torch.cuda, "device_count", lambda: gpus)


def with_driver(root: Path) -> Path:
    (root / "dev").mkdir()
    (root / "dev/nvidiactl").touch()
    return root


def test_device_fault_names_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built(monkeypatch, "2.13.0+cpu", gpus=2)
    assert device_fault("cuda", tmp_path) == "torch 2.13.0+cpu is built for CPUs only"
    built(monkeypatch, "2.13.0+cu130", gpus=2)
    monkeypatch.setattr(torch_device.platform, "system", lambda: "Linux")
    assert device_fault("cuda", tmp_path) == "no driver of a GPU is loaded"
    root = with_driver(tmp_path)
    assert device_fault("cuda", root) is None and device_fault("cuda:1", root) is None
    assert device_fault("cuda:2", root) == "torch finds 2 GPUs, numbered from cuda:0"
    built(monkeypatch, "2.13.0+cu130")
    assert device_fault("cuda", root) == "torch 2.13.0+cu130 finds no usable GPU"
    assert device_fault("mps", root) == "mps is the GPU of Apple processors"


def test_auto_is_cuda_where_torch_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_device, "device_fault", lambda wanted: None)
    assert [resolve_device(requested) for requested in ("auto", "cuda", "cuda:1", "cpu")] == [
        "cuda:0",
        "cuda:0",
        "cuda:1",
        "cpu",
    ]
    monkeypatch.setattr(torch_device, "device_fault", lambda wanted: "no driver of a GPU is loaded")
    assert resolve_device("auto") == "cpu"
    with pytest.raises(InputError, match=r"This machine has no device 'cuda:1': no driver") as raised:
        resolve_device("cuda:1")
    assert "device: auto" in str(raised.value)
    with pytest.raises(ValidationError, match="device"):
        Recipe.model_validate(recipe(device="gpu"))


def recipe(**fields: Any) -> dict[str, Any]:
    data = {"splits": {"train": "train.jsonl", "test": "test.jsonl"}}
    document = {"name": "mine", "task": "text-classification", "model": "nowhere", "data": data, "stages": ["finetune"]}
    return document | fields


def test_check_refuses_a_missing_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built(monkeypatch, "2.13.0+cpu")
    with pytest.raises(InputError, match=r"(?s)no device 'cuda'.*install a torch that is built for the device"):
        make_plan(Recipe.model_validate(recipe(device="cuda")), tmp_path, tmp_path / "artifacts")


def test_cache_keys_include_gpu_only_for_stages_that_use_it() -> None:
    parsed = Recipe.model_validate(recipe(stages=["finetune", {"prune": {"heads": 0.5}}, "onnx"]))

    def keys(device: str) -> list[str]:
        results = Keys(parsed, tiny.dataset(train=8), lambda name: "m", lambda name: "f", device)
        return [results.stage(stage, "input", ()) for stage in parsed.stages]

    on_cpu, on_gpu = keys("cpu"), keys("cuda:1")
    assert on_gpu[0] != on_cpu[0] and on_gpu[2] == on_cpu[2] and on_gpu == keys("cuda:0") != keys("mps")
    plain = Keys(parsed, tiny.dataset(train=8), lambda name: "m", lambda name: "f")
    assert on_cpu == [plain.stage(stage, "input", ()) for stage in parsed.stages]


def test_every_stage_that_reads_the_device_declares_it() -> None:
    def computes(stage: type[Stage[Any, Any]]) -> bool:
        return stage.uses_device or isinstance(stage, Trains)

    on_gpu = {kind for kind, stage in STAGES.items() if computes(stage)}
    assert {"gptq", "block_qat", "distill", "finetune", "lora_recovery", "tune_scales", "qat", "imatrix"} <= on_gpu
    assert not on_gpu & {"onnx", "gguf", "equalize", "cast", "compressed_tensors"}


def test_device_is_restored_after_its_context() -> None:
    assert current_device() == "cpu"
    with use_device("mps") as use:
        assert not use.was_used and current_device() == "mps" and use.was_used
        assert not torch_device.device_uses_bf16("auto") and torch_device.device_uses_bf16("bf16")
    assert current_device() == "cpu" and torch_device.device_uses_bf16("auto") == uses_bf16("auto")


@pytest.mark.parametrize(("has", "fast"), [(False, False), (True, False), (True, True)])
def test_cpu_features_determine_bf16_use(has: bool, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_device, "has_bf16", lambda: has)
    monkeypatch.setattr(torch_device, "has_fast_bf16", lambda: fast)
    results = [uses_bf16(precision) for precision in ("auto", "fastest", "bf16", "fp32")]
    assert results == [has, fast, True, False]


@pytest.mark.parametrize(("fp32", "bf16", "fast"), [(1.0, 2.0, False), (1.0, 0.8, False), (4.4, 1.0, True)])
def test_timings_determine_fast_bf16(fp32: float, bf16: float, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest round counts: all rounds but one of each kind are slowed down."""
    rounds = [
        duration
        for seconds_of_dtype in (fp32, bf16)
        for duration in [seconds_of_dtype * 9] * (torch_device._ROUNDS - 1) + [seconds_of_dtype]
    ]
    clock = iter(np.cumsum([seconds for duration in rounds for seconds in (100.0, duration)]).tolist())
    monkeypatch.setattr(torch_device.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(torch_device, "has_bf16", lambda: True)
    assert torch_device.has_fast_bf16.__wrapped__() is fast
    monkeypatch.setattr(torch_device, "has_bf16", lambda: False)
    assert not torch_device.has_fast_bf16.__wrapped__()


def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_device("cuda:0") == "cuda:0"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device("cuda:0") == "cuda:1" and own_device("cpu") == "cpu"


def test_out_of_memory_error_reports_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 29, 8 << 30))
    pattern = r"block 3 needs more .* cuda:0 has available: .* of 8\.0"
    with (
        use_device("cuda:0"),
        pytest.raises(DeviceError, match=pattern) as raised,
        device_memory_errors("block 3", "samples"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert "lower samples, or set device: cpu" in str(raised.value) and "0.5 of 8.0 GiB are free" in str(raised.value)


def test_doctor_reports_the_device_of_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    built(monkeypatch, "2.13.0+cpu")
    (on_cpu,) = device_findings()
    assert on_cpu.what == "stages compute on cpu, torch 2.13.0+cpu is built for CPUs only"
    monkeypatch.setattr(torch_device, "device_fault", lambda wanted: None)
    about = SimpleNamespace(name="GPU of a test", total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    (on_gpu,) = device_findings()
    assert on_gpu.what == "stages compute on cuda:0 (GPU of a test, 80 GiB)"
