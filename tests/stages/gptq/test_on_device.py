"""Tests of stages on a simulated GPU: every tensor is moved there, and results equal those of the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_generation
import tiny_run
import torch
from decoders import context, save_decoder
from fake_gpu import DEVICE, FakeGpu, fake_gpu
from torch.nn.attention import SDPBackend, sdpa_kernel

from compress.models.checkpoint import Checkpoint
from compress.pipeline.runner import StageRunner
from compress.stages.blockwise.blockwise_model import BlockwiseModel, build_blockwise_model
from compress.stages.blockwise.resume import BlockCache
from compress.stages.registry import STAGES
from compress.utils.errors import DeviceError

pytestmark = pytest.mark.slow

TEXT: dict[str, Any] = {"samples": 4, "sequence_length": 16, "precision": "fp32"}
FEW = {**TEXT, "samples": 5, "sequence_length": 32, "group_size": 32}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("LlamaConfig", {**FEW, "target_bits": 5.0, "choices": (3, 4), "sym": False}),
    "gptq of experts": ("MixtralConfig", {**FEW, "guided": False}),
    "block_qat": ("LlamaConfig", {**FEW, "epochs": 1, "guided": False}),
    "sparsify_decoder by wanda": ("LlamaConfig", {**TEXT, "sparsity": 0.5, "method": "wanda"}),
    "sparsify_decoder by sparsegpt": ("LlamaConfig", {**TEXT, "sparsity": 0.5, "method": "sparsegpt"}),
    "prune_decoder of a block": ("LlamaConfig", {**TEXT, "layers": 1}),
    "prune_decoder of heads and experts": ("Qwen3MoeConfig", {**TEXT, "heads": 0.5, "experts": 0.5, "multiple": 1}),
}


IN_BATCHES = ("gptq of experts", "sparsify_decoder by sparsegpt")
"""Windows pass a block one by one, as where they have no room together."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    with fake_gpu(monkeypatch) as mode:
        yield mode


def run(name: str, folder: Path, where: str) -> Checkpoint:
    config, fields = CASES[name]
    kind = name.partition(" ")[0]
    stage = STAGES[kind].model_validate({"kind": kind, **fields})
    source = folder / "source"
    count = 2 if kind in ("prune_decoder", "sparsify_decoder") else 1
    held = Checkpoint(source) if source.is_dir() else save_decoder(source, config, num_hidden_layers=count)
    return stage.run(held, context(folder / where))


@pytest.mark.parametrize("name", CASES)
def test_gpu_results_equal_cpu_results(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in IN_BATCHES:
        monkeypatch.setattr("compress.stages.blockwise.calibration.ACTIVATION_BYTES", 1)
    with sdpa_kernel(SDPBackend.MATH):  # sums in the order in which the device does them
        host_result = run(name, tmp_path, "here")
    with fake_gpu(monkeypatch) as mode:
        device_result = run(name, tmp_path, "there")
    assert {"aten::mm", "aten::silu"} <= mode.ran
    assert list(host_result.files) == list(device_result.files)
    # A value halfway between two integers may round either way, which changes later ones.
    assert sameness(device_result, host_result) >= (0.97 if host_result.integer_layers else 1.0)


def sameness(there: Checkpoint, here: Checkpoint) -> float:
    """Return the share of equal integers, or of equal weights where there are no integers."""
    same = total = 0
    for module in here.integer_layers or [name.removesuffix(".weight") for name in here.files]:
        device_layer, expected = there.quantized(module), here.quantized(module)
        first, second = there.weight(module), here.weight(module)
        if device_layer is not None and expected is not None:
            first, second = device_layer.integers, expected.integers
        same, total = same + int((first == second).sum()), total + second.numel()
    return same / total


def test_cpu_tensors_are_refused_by_the_simulated_gpu(gpu: FakeGpu) -> None:
    ours, theirs = torch.ones(2, 2), torch.ones(2, 2, device=DEVICE)
    with pytest.raises(RuntimeError, match="on the processor"):
        ours @ theirs
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(2, device=DEVICE, generator=torch.Generator())
    assert float((theirs @ ours.to(DEVICE)).sum()) == 8 and theirs.cpu().numpy().shape == (2, 2)


def test_one_block_is_on_the_gpu_at_a_time(tmp_path: Path, gpu: FakeGpu) -> None:
    decoder = build_blockwise_model(save_decoder(tmp_path / "source"), DEVICE)

    def there() -> list[bool]:
        return [all(parameter.device.type == "gpu" for parameter in block.parameters()) for block in decoder.blocks]

    decoder.load(1)
    assert there() == [False, True]
    decoder.unload(1)
    assert there() == [False, False]
    table = decoder.embedded(torch.arange(4)[None])
    assert table.device.type == "gpu" and decoder.embedding.weight.shape[0] == 4


def test_out_of_memory_names_stage_and_block_and_keeps_finished_blocks(
    tmp_path: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = {"gptq": {**FEW, "samples": 4, "guided": False}}
    recipe = tiny_run.load(tiny_generation.write_all(tmp_path, stages=[stage], targets=["torch"]))
    monkeypatch.setattr("compress.pipeline.run_inputs.resolve_device", lambda name: DEVICE)
    load = BlockwiseModel.load

    def full(decoder: BlockwiseModel, index: int) -> torch.nn.Module:
        gpu.room = 0 if index == 1 and BlockCache(scratch).layers(0) else None
        return load(decoder, index)

    runner = StageRunner(recipe, tmp_path, tmp_path / "artifacts", tiny_run.Notes())
    scratch = runner.cache.scratch(runner.stage_key("gptq"))
    with monkeypatch.context() as patch:
        patch.setattr(BlockwiseModel, "load", full)
        with pytest.raises(DeviceError, match=r"Stage 'gptq': model\.layers\.1 needs more memory than gpu:0") as raised:
            runner.run_all()
    gpu.room = None
    assert "lower samples, sequence_length" in str(raised.value) and "next run resumes there" in str(raised.value)
    assert BlockCache(scratch).count(2) == 1

    notes = tiny_run.Notes()
    again = StageRunner(recipe, tmp_path, tmp_path / "artifacts", notes)
    again.run_all()
    assert any("1 of 2 blocks were finished by an earlier run" in line for line in notes.said)
    assert "computed on gpu:0" in again.results["gptq"].record.remarks
    monkeypatch.setattr("compress.pipeline.run_inputs.resolve_device", lambda name: "cpu")
    assert (
        StageRunner(recipe, tmp_path, tmp_path / "artifacts", notes).stage_key("gptq")
        != again.results["gptq"].record.key
    )
