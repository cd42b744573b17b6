"""Tests of the shortened forward pass against the full one, and of training length and memory."""

from __future__ import annotations

import copy
import subprocess
import sys
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
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from compress.models.checkpoint import Checkpoint
from compress.models.model import TorchModel
from compress.stages.distill.stage import Distill
from compress.stages.finetune import Finetune
from compress.stages.protocols import fields_without_effect
from compress.stages.registry import STAGES
from compress.stages.training import length as clock
from compress.stages.training.length import Length
from compress.stages.training.partial_forward import shortened
from compress.tasks.capability import EMBEDS, HAS_CLASSES, TAKES_IMAGES
from compress.tasks.inference import forward, predict, tensors
from compress.tasks.registry import TASKS
from compress.utils.errors import StageError

LAYERS = 3


def deep(architecture: str = "bert") -> Any:
    name = "n_layers" if architecture == "distilbert" else "num_hidden_layers"
    return tiny.encoder(architecture, **{name: LAYERS})


def task_loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(forward(module, batch).logits, batch["labels"])


def gradients(module: Any, batch: dict[str, torch.Tensor], first_token: bool = False) -> dict[str, torch.Tensor]:
    module.zero_grad()
    with shortened(module, first_token):
        loss = task_loss(module, batch)
    loss.backward()
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["bert", "roberta", "electra"])
def test_classifiers_read_the_first_token_only(architecture: str, attention: str) -> None:
    model = deep(architecture)
    model.module.config._attn_implementation = attention
    examples = tiny.context().encode("train", model)
    batch = tensors(examples, list(range(16)))
    assert not batch["attention_mask"].all(), "some are padded"
    whole, expected_gradients = forward(model.module, batch).logits, gradients(model.module, batch)
    with shortened(model.module, first_token=True):
        torch.testing.assert_close(forward(model.module, batch).logits, whole, atol=1e-5, rtol=1e-5)
    first_token_gradients = gradients(model.module, batch, first_token=True)
    assert first_token_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(first_token_gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    assert torch.equal(forward(model.module, batch).logits, whole), "the layers are back"


def test_last_layer_computes_one_token() -> None:
    model = deep()
    batch = tensors(tiny.context().encode("train", model), [0, 1, 2])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with shortened(model.module, first_token=True):
        assert model.module.base_model(**inputs).last_hidden_state.shape == (3, 1, tiny.WIDTH)


def test_attention_dropout_is_kept() -> None:
    model = deep()
    model.module.train()
    for layer in model.module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    model.module.base_model.encoder.layer[-1].attention.self.dropout.p = 0.5
    batch = tensors(tiny.context().encode("train", model), [0, 1, 2])
    with shortened(model.module, first_token=True):
        assert not torch.equal(forward(model.module, batch).logits, forward(model.module, batch).logits)
    model.module.eval()
    with shortened(model.module, first_token=True):
        assert torch.equal(forward(model.module, batch).logits, forward(model.module, batch).logits)


def test_stages_apply_first_token_only() -> None:
    model, context = deep(), tiny.context()
    fields = {"learning_rate": 1e-3, "precision": "fp32", "dropout": 0, "first_token_only": True}
    Finetune(epochs=1, **fields).run(model, context)  # type: ignore[arg-type]
    context = tiny.context(earlier=lambda label: copy.deepcopy(model))
    student = copy.deepcopy(model)
    short = Distill(teacher="finetune", student={"layers": [0]}, epochs=2, **fields).run(student, context)  # type: ignore[arg-type]
    fields["first_token_only"] = False
    whole = Distill(teacher="finetune", student={"layers": [0]}, epochs=2, **fields).run(student, context)  # type: ignore[arg-type]
    examples = context.encode("train", model)
    difference = abs(predict(short.module, examples) - predict(whole.module, examples)).max()
    assert 0 < difference < 0.05, "the same function, rounded otherwise"


def test_unsupported_architectures_are_refused() -> None:
    model = deep("distilbert")
    with (
        pytest.raises(StageError, match="classifier reads the first token alone"),
        shortened(model.module, first_token=True),
    ):
        pass


def test_layers_are_restored_after_a_failure() -> None:
    model = deep()
    with pytest.raises(RuntimeError), shortened(model.module, first_token=True):
        raise RuntimeError
    assert len(model.module.base_model.encoder.layer) == LAYERS


def test_first_token_only_without_effect_is_reported() -> None:
    assert "first_token_only" in fields_without_effect(Finetune(first_token_only=True), frozenset({TAKES_IMAGES}))
    distill = Distill(teacher="start", first_token_only=True)
    assert "first_token_only" in fields_without_effect(distill, frozenset({EMBEDS}))
    assert not fields_without_effect(Finetune(first_token_only=True), frozenset({HAS_CLASSES}))


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_learning_rate_follows_transformers_schedules(decay: str) -> None:
    """Only the warm-up differs: it starts above zero and reaches the peak in its last step."""
    steps, warmup = 40, 8
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    make = get_linear_schedule_with_warmup if decay == "linear" else get_cosine_schedule_with_warmup
    schedule, length = make(optimizer, warmup, steps), Length(steps)
    for step in range(steps):
        expected = schedule.get_last_lr()[0] if step >= warmup else (step + 1) / warmup
        assert length.rate(step, warmup / steps, decay) == pytest.approx(expected, abs=1e-12)
        optimizer.step()
        schedule.step()


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(clock.time, "monotonic", lambda: self.now)


def walk(length: Length, seconds: float, now: Clock) -> list[float]:
    rates: list[float] = []
    while not length.is_over(len(rates)):
        rates.append(length.rate(len(rates), 0.1, "linear"))
        now.now += seconds
    return rates


def test_time_budget_limits_steps_and_ends_near_zero_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = Clock(monkeypatch)
    length = Length(3, seconds=60.0)
    length.begin()
    rates = walk(length, 0.5, now)
    assert len(rates) == 120 and length.share(120) == 1.0
    assert max(rates) == pytest.approx(1.0, abs=0.1) and rates[-1] < 0.02 and rates[0] < 0.5
    assert rates[60] == pytest.approx(0.5 / 0.9, abs=0.01)


def test_resumed_run_continues_its_time_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    now = Clock(monkeypatch)
    length = Length(3, seconds=10.0)
    length.go_on(4.0)
    now.now += 5.0
    assert length.seconds_spent() == 9.0 and not length.is_over(9)
    now.now += 0.5
    assert length.is_over(9)


def test_budget_below_one_step_is_refused_with_the_step_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = Clock(monkeypatch)
    length = Length(3, seconds=2.0)
    length.begin()
    now.now += 5.0
    with pytest.raises(StageError, match=r"A budget of 2 s is too short for one step, which took 5.0 s"):
        length.is_over(1)


def test_total_steps_of_a_time_budget_are_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    now = Clock(monkeypatch)
    length = Length(300, seconds=60.0)
    length.begin()
    assert length.steps_in_all(0) == 300
    now.now += 6.0
    assert length.steps_in_all(12) == 120 and Length(300).steps_in_all(12) == 300
    now.now += 60.0
    assert length.steps_in_all(130) == 130


_FAULTS = """
import resource
import sys

import torch

from compress.stages.training.malloc import keep_freed_memory

if sys.argv[1:] != ["as it is"] and not keep_freed_memory(*map(int, sys.argv[1:])):
    sys.exit("no mallopt")
torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(1 << 24)
sys.stdout.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))
"""


def page_faults(*how: str) -> int:
    ended = subprocess.run([sys.executable, "-c", _FAULTS, *how], capture_output=True, text=True, check=False)
    if "no mallopt" in ended.stderr:
        pytest.skip("the C library has no mallopt")
    return int(ended.stdout)


@pytest.mark.slow
def test_large_tensors_reuse_freed_memory():
    # 64 MB are 16,384 pages of 4 kB, or 32 of 2 MB.
    assert page_faults("as it is") >= 8 * 32
    assert page_faults() < 32
    # Tensors larger than requested are returned.
    assert page_faults(str(1 << 22)) >= 8 * 32


_RESIDENT = """
import sys

import torch

from compress.stages.training.malloc import give_back_freed_memory, keep_freed_memory


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


if not keep_freed_memory(1 << 27):
    sys.exit("no mallopt")
parts = [torch.ones(1 << 24) for _ in range(4)]
last = torch.ones(1 << 10)
full = resident()
del parts
kept = resident()
give_back_freed_memory()
sys.stdout.write(f"{full} {kept} {resident()}")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_cached_memory_can_be_released():
    ended = subprocess.run([sys.executable, "-c", _RESIDENT], capture_output=True, text=True, check=False)
    if "no mallopt" in ended.stderr:
        pytest.skip("the C library has no mallopt")
    full, frozen, left = map(int, ended.stdout.split())
    assert full - frozen < 1 << 27
    assert full - left > 7 << 25


QUICK = {"epochs": 1.0, "batch_size": 16, "learning_rate": 1e-3, "precision": "fp32"}
CASES: dict[str, dict[str, Any]] = {
    "finetune": {"keep_best": True},
    "distill": {"student": {"layers": [1]}},
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    monkeypatch.setattr(PartialState, "default_device", property(lambda state: torch.device(DEVICE)))
    # A GPU parameter can replace a CPU parameter only by swapping.
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
    return stage.run(tiny.encoder(), context)


@pytest.mark.parametrize("kind", CASES)
def test_gpu_training_equals_cpu_training(kind: str, request: pytest.FixtureRequest) -> None:
    host_tensors = trained(kind).tensors()
    mode: FakeGpu = request.getfixturevalue("gpu")
    device_tensors = trained(kind).tensors()
    assert {"aten::addmm", "aten::_fused_adamw_"} <= mode.ran
    for name, tensor in host_tensors.items():
        assert type(device_tensors[name]) is torch.Tensor or isinstance(device_tensors[name], torch.nn.Parameter)
        assert device_tensors[name].device.type == "cpu"
        torch.testing.assert_close(device_tensors[name], tensor, rtol=1e-4, atol=1e-5)


def taught(source: Checkpoint, folder: Path) -> TorchModel:
    """Return a one-layer student."""
    fields: dict[str, Any] = {"batch_size": 4, "tokens": 3 * 4 * causal.LENGTH, "precision": "fp32"}
    fields |= {"teacher": "start", "student": {"layers": [1]}}
    stage = STAGES["distill_language_model"].model_validate({"kind": "distill_language_model", **fields})
    return stage.run(TorchModel.load(source.folder, TASKS[causal.TASK]), causal.context(source, folder))


def test_language_model_is_distilled_on_the_gpu(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source = save_tiny_llama(tmp_path / "teacher", hidden_size=32, intermediate_size=48)
    host_tensors = taught(source, tmp_path / "here").tensors()
    mode: FakeGpu = request.getfixturevalue("gpu")
    device_tensors = taught(source, tmp_path / "there").tensors()
    assert {"aten::mm", "aten::_fused_adamw_"} <= mode.ran
    for name, tensor in host_tensors.items():
        assert device_tensors[name].device.type == "cpu"
        torch.testing.assert_close(device_tensors[name], tensor, rtol=1e-3, atol=1e-4)


def test_device_is_per_recipe_not_per_process(gpu: FakeGpu, tmp_path: Path) -> None:
    from compress.stages.training.processes import accelerator
    from compress.utils.torch_device import use_device

    assert accelerator().device.type == "gpu"
    with use_device("cpu"):
        assert accelerator().device.type == "cpu"
    assert accelerator().device.type == "gpu"
