"""What trains, on a GPU that isn't there: the model and its batches meet there, and come back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import causal
import pytest
import tiny
import torch
from accelerate.state import AcceleratorState, PartialState
from fake_gpu import DEVICE, FakeGpu, fake_gpu
from quantized import save_tiny_llama

from compress.models.checkpoint import Checkpoint
from compress.models.model import TorchModel
from compress.stages.registry import STAGES
from compress.tasks.registry import get_task

QUICK = {"epochs": 1.0, "batch_size": 16, "learning_rate": 1e-3, "precision": "fp32"}
CASES: dict[str, dict[str, Any]] = {
    "finetune": {"keep_best": True},
    "distill": {"student": {"layers": [1]}},
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    monkeypatch.setattr(PartialState, "default_device", property(lambda state: torch.device(DEVICE)))
    # A parameter of the GPU can't take the place of the processor's in any other way than by being swapped with it.
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with fake_gpu(monkeypatch) as mode:
            yield mode
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
        AcceleratorState._reset_state(reset_partial_state=True)


def trained(kind: str) -> TorchModel:
    data = tiny.dataset(train=32, validation=16)
    context = tiny.context(data, earlier=lambda label: tiny.encoder(seed=5))
    stage = STAGES[kind].model_validate({"kind": kind, **QUICK, **CASES[kind]})
    model: TorchModel = stage.run(tiny.encoder(), context)
    return model


@pytest.mark.parametrize("kind", CASES)
def test_it_learns_there_what_it_learns_here(kind: str, request: pytest.FixtureRequest) -> None:
    host_tensors = trained(kind).tensors()
    mode: FakeGpu = request.getfixturevalue("gpu")
    device_tensors = trained(kind).tensors()
    assert {"aten::addmm", "aten::_fused_adamw_"} <= mode.ran
    for name, tensor in host_tensors.items():
        assert type(device_tensors[name]) is torch.Tensor or isinstance(device_tensors[name], torch.nn.Parameter)
        assert device_tensors[name].device.type == "cpu"
        torch.testing.assert_close(device_tensors[name], tensor, rtol=1e-4, atol=1e-5)


def taught(source: Checkpoint, folder: Path) -> TorchModel:
    """A student of one layer, whose hidden state is compared with its teacher's too."""
    fields: dict[str, Any] = {"batch_size": 4, "tokens": 3 * 4 * causal.LENGTH, "precision": "fp32"}
    fields |= {"teacher": "start", "student": {"layers": [1]}, "loss": {"hidden_weight": 1.0}}
    stage = STAGES["distill_language_model"].model_validate({"kind": "distill_language_model", **fields})
    model: TorchModel = stage.run(TorchModel.load(source.folder, get_task(causal.TASK)), causal.context(source, folder))
    return model


def test_a_language_model_is_taught_there(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source = save_tiny_llama(tmp_path / "teacher", hidden_size=32, intermediate_size=48)
    host_tensors = taught(source, tmp_path / "here").tensors()
    mode: FakeGpu = request.getfixturevalue("gpu")
    device_tensors = taught(source, tmp_path / "there").tensors()
    assert {"aten::mm", "aten::_fused_adamw_"} <= mode.ran
    for name, tensor in host_tensors.items():
        assert device_tensors[name].device.type == "cpu"
        torch.testing.assert_close(device_tensors[name], tensor, rtol=1e-3, atol=1e-4)


def test_the_next_recipe_in_the_process_has_its_own_device(gpu: FakeGpu, tmp_path: Path) -> None:
    from compress.stages.training.processes import accelerator
    from compress.utils.torch_device import use_device

    assert accelerator().device.type == "gpu"
    with use_device("cpu"):
        assert accelerator().device.type == "cpu"
    assert accelerator().device.type == "gpu"
