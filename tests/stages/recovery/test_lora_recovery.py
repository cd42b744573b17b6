"""Adapters on a tiny quantized model: trained, opened again by peft itself, or brought along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import save_adapter
from causal import LENGTH, context
from peft import PeftModel
from quantized import quantize_tiny_llama, save_tiny_llama
from transformers import LlamaForCausalLM

from compress.models.checkpoint import Checkpoint, QuantizedCheckpoint
from compress.models.quantized_module import load_quantized_module
from compress.stages.base import Context, Reference
from compress.stages.lora import AttachLora
from compress.stages.recovery.stages import LoraRecovery
from compress.stages.recovery.trainer import recovery_sequences
from compress.utils.errors import InputError, ModelError, StageError
from compress.utils.storage import digest_directory

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
"""peft calls what transformers will remove."""
QUICK: dict[str, Any] = {
    "steps": 40,
    "batch_size": 4,
    "sequence_length": LENGTH,
    "validation_windows": 6,
    "precision": "fp32",
    "learning_rate": 0.01,
    "rank": 4,
}
IDS = torch.arange(48).view(2, 24) * 3 % 150


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    return save_tiny_llama(tmp_path / "source")


@pytest.fixture
def start(source: Checkpoint, tmp_path: Path) -> QuantizedCheckpoint:
    return quantize_tiny_llama(source, tmp_path / "start", bits=3)


def plain(checkpoint: Checkpoint, source: Checkpoint) -> LlamaForCausalLM:
    """transformers' own float model with the weights that the checkpoint's integers stand for."""
    module = LlamaForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(checkpoint.weight(name.removesuffix(".weight")))
    return module


def held_out(start: QuantizedCheckpoint, stage: LoraRecovery, made: Context) -> torch.Tensor:
    """Token ids that no stage learns from."""
    windows = recovery_sequences(start, stage, made).held_out
    return torch.from_numpy(windows.batch(range(len(windows)))["input_ids"])


@torch.no_grad()
def divergence(module: torch.nn.Module, source: Checkpoint, ids: torch.Tensor) -> float:
    teacher = LlamaForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    mine, theirs = (model(input_ids=ids).logits.log_softmax(-1) for model in (module, teacher))
    return float(torch.nn.functional.kl_div(mine, theirs, reduction="none", log_target=True).sum(-1).mean())


def test_peft_opens_it_on_the_dequantized_model_and_it_helps(
    start: QuantizedCheckpoint, source: Checkpoint, tmp_path: Path
) -> None:
    stage, stage_context = LoraRecovery(**QUICK), context(source, tmp_path / "scratch")
    adapted = stage.run(start, stage_context)
    base, ids = plain(adapted, source), held_out(start, stage, stage_context)
    divergence_before = divergence(base, source, ids)
    opened = PeftModel.from_pretrained(base, str(adapted.folder / "adapter"))
    assert divergence(opened, source, ids) < 0.6 * divergence_before


def test_the_adapter_is_the_one_that_was_judged(start: QuantizedCheckpoint, source: Checkpoint, tmp_path: Path) -> None:
    adapted = LoraRecovery(**QUICK).run(start, context(source, tmp_path / "scratch"))
    over_integers = PeftModel.from_pretrained(load_quantized_module(adapted), str(adapted.folder / "adapter"))
    over_floats = PeftModel.from_pretrained(plain(adapted, source), str(adapted.folder / "adapter"))
    with torch.no_grad():
        mine, theirs = (model(input_ids=IDS).logits for model in (over_integers, over_floats))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_the_base_keeps_every_byte(start: QuantizedCheckpoint, source: Checkpoint, tmp_path: Path) -> None:
    digest = digest_directory(start.folder)
    adapted = LoraRecovery(**QUICK).run(start, context(source, tmp_path / "scratch"))
    files = {path.relative_to(adapted.folder).as_posix() for path in adapted.folder.rglob("*") if path.is_file()}
    new = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert files - {path.name for path in start.folder.iterdir()} == new
    for name in files - new:
        assert (adapted.folder / name).read_bytes() == (start.folder / name).read_bytes()
    assert digest_directory(start.folder) == digest


def test_its_config_names_no_machine_and_is_the_same_each_time(
    start: QuantizedCheckpoint, source: Checkpoint, tmp_path: Path
) -> None:
    folders = [
        LoraRecovery(**{**QUICK, "steps": 2, "learning_rate": 1e-3}).run(start, context(source, tmp_path / name)).folder
        for name in ("once", "twice")
    ]
    assert digest_directory(folders[0] / "adapter") == digest_directory(folders[1] / "adapter")
    config = json.loads((folders[0] / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert str(tmp_path) not in json.dumps(config)
    assert (config["r"], config["lora_alpha"]) == (4, 8)


def test_only_the_named_layers_are_adapted(start: QuantizedCheckpoint, source: Checkpoint, tmp_path: Path) -> None:
    stage = LoraRecovery(**{**QUICK, "target_modules": ("v_proj", "up_proj")})
    adapted = stage.run(start, context(source, tmp_path / "scratch"))
    opened = PeftModel.from_pretrained(load_quantized_module(adapted), str(adapted.folder / "adapter"))
    layers = {name.split(".lora_A")[0] for name, _ in opened.named_modules() if name.endswith("lora_A.default")}
    assert {name.rpartition(".")[2] for name in layers} == {"v_proj", "up_proj"} and len(layers) == 4


def test_a_layer_name_that_is_not_there_is_an_error(
    start: QuantizedCheckpoint, source: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(StageError, match="No linear layer's name ends in 'query'") as caught:
        LoraRecovery(**{**QUICK, "target_modules": ("query",)}).run(start, context(source, tmp_path / "scratch"))
    assert "q_proj" in str(caught.value)


def test_it_can_learn_the_text_instead(start: QuantizedCheckpoint, source: Checkpoint, tmp_path: Path) -> None:
    stage, stage_context = (
        LoraRecovery(**{**QUICK, "logits_weight": 0, "labels_weight": 1}),
        context(source, tmp_path / "scratch"),
    )
    adapted = stage.run(start, stage_context)
    base, ids = plain(adapted, source).requires_grad_(False), held_out(start, stage, stage_context)
    with torch.no_grad():
        loss_before = float(base(input_ids=ids, labels=ids).loss)
        opened = PeftModel.from_pretrained(base, str(adapted.folder / "adapter"))
        assert float(opened(input_ids=ids, labels=ids).loss) < loss_before - 0.5


@pytest.fixture
def brought(source: Checkpoint, tmp_path: Path) -> Path:
    """An adapter that was trained elsewhere."""
    module = LlamaForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    return save_adapter(module, tmp_path / "brought", "q_proj", r=2)


def test_an_adapter_kept_apart_keeps_its_bytes(
    start: QuantizedCheckpoint, source: Checkpoint, brought: Path, tmp_path: Path
) -> None:
    stage = AttachLora(adapter=str(brought))
    assert stage.references() == {"adapter": Reference(str(brought), "adapter")}
    attached = stage.run(start, context(source, tmp_path / "scratch"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (attached.folder / "adapter" / name).read_bytes() == (brought / name).read_bytes()
    assert PeftModel.from_pretrained(load_quantized_module(attached), str(attached.folder / "adapter")).active_adapter


def test_an_adapter_that_does_not_fit_is_not_attached(brought: Path, tmp_path: Path) -> None:
    wider = save_tiny_llama(tmp_path / "wider", hidden_size=128)
    checkpoint = quantize_tiny_llama(wider, tmp_path / "q")
    with pytest.raises(ModelError, match=r"lora_A\.weight' is \[2, 64\]"):
        AttachLora(adapter=str(brought)).run(checkpoint, context(wider, tmp_path / "scratch"))


def test_a_second_adapter_is_refused(
    start: QuantizedCheckpoint, source: Checkpoint, brought: Path, tmp_path: Path
) -> None:
    attached = AttachLora(adapter=str(brought)).run(start, context(source, tmp_path / "one"))
    with pytest.raises(InputError, match="has an adapter already"):
        LoraRecovery(**QUICK).run(attached, context(source, tmp_path / "two"))
