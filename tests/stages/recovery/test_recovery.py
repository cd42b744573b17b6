"""Tests of recovery: tuning scales and norms of a tiny quantized model with perturbed scales, and LoRA adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import save_adapter
from causal import LENGTH, Notes, context, text_data
from peft import PeftModel
from quantized import quantize_tiny_llama, save_tiny_llama
from transformers import LlamaForCausalLM

from compress.models.checkpoint import Checkpoint, QuantizedCheckpoint, write_with_changes
from compress.models.quantized_module import load_quantized_module
from compress.stages.base import Context, Reference
from compress.stages.lora import AttachLora
from compress.stages.recovery.quantized_recovery import learn, tuned_tensors
from compress.stages.recovery.stages import LoraRecovery, TuneScales
from compress.stages.recovery.trainer import RecoveryTrainer, recovery_sequences
from compress.stages.training.checkpoint import TrainingCheckpoint, TrainingState
from compress.utils.errors import DataError, InputError, ModelError, StageError
from compress.utils.storage import digest_directory, size_bytes

# peft calls a function that transformers will remove.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

QUICK: dict[str, Any] = {
    "steps": 40,
    "batch_size": 4,
    "sequence_length": LENGTH,
    "learning_rate": 0.02,
    "validation_windows": 6,
    "precision": "fp32",
}
IDS = torch.arange(48).view(2, 24) * 3 % 150


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    return save_tiny_llama(tmp_path / "source")


@pytest.fixture
def start(source: Checkpoint, tmp_path: Path) -> QuantizedCheckpoint:
    """Quantize by rounding to nearest, then perturb every scale by up to a fifth."""
    good = quantize_tiny_llama(source, tmp_path / "good")
    generator = torch.Generator().manual_seed(0)
    changed = {
        name: good.stored(name) * (0.8 + 0.4 * torch.rand(good.stored(name).shape, generator=generator)).half()
        for name in sorted(good.files)
        if name.endswith(".scales")
    }
    (tmp_path / "start").mkdir()
    write_with_changes(good, tmp_path / "start", changed)
    return QuantizedCheckpoint(tmp_path / "start")


def trainer_of(start: QuantizedCheckpoint, stage: TuneScales, made: Context) -> RecoveryTrainer:
    """Return the stage's trainer with its trainable parameters selected."""
    module = load_quantized_module(start)
    learn(module, start)
    return RecoveryTrainer.between(module, made.earlier("start"), recovery_sequences(start, stage, made), stage)


def tune(start: QuantizedCheckpoint, source: Checkpoint, scratch: Path, **changes: Any) -> QuantizedCheckpoint:
    stage = TuneScales(**{**QUICK, **changes})
    return stage.run(start, context(source, scratch))


def divergence(checkpoint: QuantizedCheckpoint, source: Checkpoint) -> float:
    """Return mean KL to the float model on held-out token ids, by torch's own formula."""
    teacher = LlamaForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        mine, theirs = (
            model(input_ids=IDS).logits.log_softmax(-1) for model in (load_quantized_module(checkpoint), teacher)
        )
        mean_divergence = torch.nn.functional.kl_div(mine, theirs, reduction="none", log_target=True).sum(-1).mean()
    return float(mean_divergence)


def test_divergence_falls_and_integers_are_unchanged(
    start: QuantizedCheckpoint, source: Checkpoint, tmp_path: Path
) -> None:
    tuned = tune(start, source, tmp_path / "scratch")
    assert divergence(tuned, source) < 0.6 * divergence(start, source)
    for name in start.files:
        is_untouched = not name.endswith((".scales", "norm.weight", "embed_tokens.weight"))
        assert torch.equal(tuned.stored(name), start.stored(name)) is is_untouched, name
    table, table_before = tuned.quantized("model.embed_tokens"), start.quantized("model.embed_tokens")
    assert torch.equal(table.integers, table_before.integers) and not torch.equal(table.scales, table_before.scales)
    assert torch.equal(tuned.stored("model.embed_tokens.weight"), table.dequantize().half())
    assert size_bytes(tuned.folder) == size_bytes(start.folder)
    assert tuned.config == start.config


def test_saved_checkpoint_equals_the_validated_one(
    start: QuantizedCheckpoint, source: Checkpoint, tmp_path: Path
) -> None:
    stage_context = context(source, tmp_path / "scratch")
    trainer = trainer_of(start, TuneScales(**QUICK), stage_context)
    module = trainer.student.causal
    recovered = trainer.train(stage_context, "test")
    assert trainer.quality() == recovered.after and recovered.after.divergence < recovered.before.divergence
    (tmp_path / "saved").mkdir()
    write_with_changes(start, tmp_path / "saved", *tuned_tensors(module, start))
    reloaded = load_quantized_module(QuantizedCheckpoint(tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(reloaded(input_ids=IDS).logits, module(input_ids=IDS).logits)


def test_validation_loss_is_the_mean_over_held_out_tokens(
    start: QuantizedCheckpoint, source: Checkpoint, tmp_path: Path
) -> None:
    trainer = trainer_of(start, TuneScales(**QUICK), context(source, tmp_path / "scratch"))
    quality, held_out = trainer.quality(), trainer.windows.held_out
    module, teacher = trainer.student.causal, trainer.teacher.causal
    ids = torch.from_numpy(held_out.batch(range(len(held_out)))["input_ids"])
    with torch.no_grad():
        mine, theirs = (model(input_ids=ids).logits[:, :-1].log_softmax(-1) for model in (module, teacher))
    expected = torch.nn.functional.kl_div(mine, theirs, reduction="none", log_target=True).sum(-1).mean()
    assert quality.divergence == pytest.approx(float(expected), rel=1e-4)
    loss = teacher(input_ids=ids, labels=ids).loss
    assert quality.teacher_perplexity == pytest.approx(float(loss.exp()), rel=1e-4)
    assert len(held_out) == QUICK["validation_windows"]


@pytest.mark.parametrize("labels", [0.0, 0.3])
def test_loss_is_the_weighted_sum_of_its_two_parts(
    labels: float, start: QuantizedCheckpoint, source: Checkpoint, tmp_path: Path
) -> None:
    stage = TuneScales(**QUICK, labels_weight=labels)
    trainer = trainer_of(start, stage, context(source, tmp_path / "scratch"))
    module, teacher = trainer.student.causal, trainer.teacher.causal
    mine = trainer.loss(trainer.student, {"input_ids": IDS, "index": torch.arange(2)})
    slopes = torch.autograd.grad(mine, [p for p in module.parameters() if p.requires_grad])
    answers = module(input_ids=IDS, labels=IDS)
    log_mine, log_theirs = (logits.log_softmax(-1) for logits in (answers.logits, teacher(input_ids=IDS).logits))
    apart = torch.nn.functional.kl_div(log_mine, log_theirs, reduction="none", log_target=True).sum(-1).mean()
    expected = apart + labels * answers.loss
    torch.testing.assert_close(mine, expected.detach(), rtol=1e-5, atol=0)
    expected_gradients = torch.autograd.grad(expected, [p for p in module.parameters() if p.requires_grad])
    for slope, right in zip(slopes, expected_gradients, strict=True):
        torch.testing.assert_close(slope, right, rtol=1e-3, atol=1e-6)


def test_teacher_outputs_are_cached_for_repeated_windows(
    start: QuantizedCheckpoint, source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = TuneScales(**{**QUICK, "steps": 12})
    stage_context = context(source, tmp_path / "scratch", text_data(train=10))
    trainer, asked = trainer_of(start, stage, stage_context), list[int]()
    windows = trainer.windows
    assert 4 <= len(windows.train) < 12 * 4
    trainer.teacher.causal.model.register_forward_hook(lambda module, inputs, output: asked.append(len(output[0])))
    trainer.train(stage_context, "test")
    assert sum(asked) == len(windows.train) + len(windows.held_out)


def test_too_short_text_is_refused(start: QuantizedCheckpoint, source: Checkpoint, tmp_path: Path) -> None:
    stage_context = context(source, tmp_path / "scratch", text_data(train=2))
    with pytest.raises(DataError, match=r"too short: [123] windows of 32 tokens"):
        TuneScales(**QUICK).run(start, stage_context)


def test_without_a_validation_split_the_last_windows_are_held_out(
    start: QuantizedCheckpoint, source: Checkpoint, tmp_path: Path
) -> None:
    stage = TuneScales(**QUICK)
    both = recovery_sequences(start, stage, context(source, tmp_path, text_data(validation=0)))
    alone = recovery_sequences(start, stage, context(source, tmp_path, text_data()))
    assert len(both.train) == len(alone.train) - 6 and len(both.held_out) == 6
    assert (both.held_out.inputs[-1]["input_ids"] == alone.train.inputs[-1]["input_ids"]).all()


def test_a_teacher_with_another_vocabulary_is_refused(start: QuantizedCheckpoint, tmp_path: Path) -> None:
    other = save_tiny_llama(tmp_path / "other", vocab_size=170)
    with pytest.raises(StageError, match="has 160 tokens, its teacher 170"):
        tune(start, other, tmp_path / "scratch")


def test_worse_result_is_discarded(source: Checkpoint, tmp_path: Path) -> None:
    good = quantize_tiny_llama(source, tmp_path / "good", bits=8, table_bits=8)
    stage_context = context(source, tmp_path / "scratch")
    bytes_before = {file.name: file.read_bytes() for file in good.folder.iterdir() if file.is_file()}
    left = TuneScales(**{**QUICK, "steps": 2, "learning_rate": 0.5, "warmup_ratio": 0}).run(good, stage_context)
    assert {file.name: file.read_bytes() for file in left.folder.iterdir() if file.is_file()} == bytes_before
    assert "the model is unchanged" in stage_context.notes[-1]
    assert not TuneScales().output_spec().changes_weights, "the check behind the stage lets that pass"


def test_teacher_that_postprocesses_logits_is_refused(
    start: QuantizedCheckpoint, source: Checkpoint, tmp_path: Path
) -> None:
    stage_context = context(source, tmp_path / "scratch")
    teacher = stage_context.earlier("start")
    teacher.module.lm_head.register_forward_hook(lambda module, inputs, output: output.tanh())
    stage = TuneScales(**QUICK)
    with pytest.raises(StageError, match="applies more than its head"):
        RecoveryTrainer.between(
            load_quantized_module(start), teacher, recovery_sequences(start, stage, stage_context), stage
        )


def test_half_precision_model_is_tuned(
    start: QuantizedCheckpoint, source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.utils.environment.has_bf16", lambda: True)
    tuned = tune(start, source, tmp_path / "scratch", precision="auto")
    assert divergence(tuned, source) < 0.7 * divergence(start, source)


def test_excessive_number_of_steps_is_refused(start: QuantizedCheckpoint, source: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"500000 steps would repeat each of the .* windows more than 1000 times"):
        tune(start, source, tmp_path / "scratch", steps=500_000)


def test_only_the_first_of_several_processes_writes(
    start: QuantizedCheckpoint, source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    tuned = tune(start, source, tmp_path / "scratch", steps=8)
    assert tuned is start and not (tmp_path / "scratch").exists()


def test_resumed_training_is_bit_identical(
    start: QuantizedCheckpoint, source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the first epoch, in the second or after the last step, it resumes from the saved state."""
    data = text_data(train=30)
    stage = TuneScales(**{**QUICK, "steps": 12})
    once = stage.run(start, context(source, tmp_path / "once", data))
    write, written = TrainingCheckpoint.write, list[int]()

    def killed(self: TrainingCheckpoint, state: TrainingState) -> None:
        write(self, state)
        written.append(state.figures["done"])
        if len(written) in (3, 8, 12):
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingCheckpoint, "is_due", lambda self: True)
    monkeypatch.setattr(TrainingCheckpoint, "write", killed)
    stage_context = context(source, tmp_path / "killed", data, progress=(notes := Notes()))
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            stage.run(start, stage_context)
    again = stage.run(start, stage_context)
    assert written == list(range(1, 13))
    assert digest_directory(again.folder) == digest_directory(once.folder)
    assert {"tune_scales: resuming after step 8", "tune_scales: resuming after step 12"} <= set(notes.said)


QUICK_LORA: dict[str, Any] = {**QUICK, "learning_rate": 0.01, "rank": 4}


@pytest.fixture
def rounded(source: Checkpoint, tmp_path: Path) -> QuantizedCheckpoint:
    return quantize_tiny_llama(source, tmp_path / "start", bits=3)


def plain(checkpoint: Checkpoint, source: Checkpoint) -> LlamaForCausalLM:
    """Return transformers' own float model with the dequantized weights of the checkpoint."""
    module = LlamaForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(checkpoint.weight(name.removesuffix(".weight")))
    return module


def held_out(rounded: QuantizedCheckpoint, stage: LoraRecovery, made: Context) -> torch.Tensor:
    """Return token ids that no stage trains on."""
    windows = recovery_sequences(rounded, stage, made).held_out
    return torch.from_numpy(windows.batch(range(len(windows)))["input_ids"])


@torch.no_grad()
def module_divergence(module: torch.nn.Module, source: Checkpoint, ids: torch.Tensor) -> float:
    teacher = LlamaForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    mine, theirs = (model(input_ids=ids).logits.log_softmax(-1) for model in (module, teacher))
    return float(torch.nn.functional.kl_div(mine, theirs, reduction="none", log_target=True).sum(-1).mean())


def test_adapter_loads_in_peft_and_lowers_the_divergence(
    rounded: QuantizedCheckpoint, source: Checkpoint, tmp_path: Path
) -> None:
    stage, stage_context = LoraRecovery(**QUICK_LORA), context(source, tmp_path / "scratch")
    adapted = stage.run(rounded, stage_context)
    base, ids = plain(adapted, source), held_out(rounded, stage, stage_context)
    divergence_before = module_divergence(base, source, ids)
    opened = PeftModel.from_pretrained(base, str(adapted.folder / "adapter"))
    assert module_divergence(opened, source, ids) < 0.6 * divergence_before


def test_saved_adapter_equals_the_validated_one(
    rounded: QuantizedCheckpoint, source: Checkpoint, tmp_path: Path
) -> None:
    adapted = LoraRecovery(**QUICK_LORA).run(rounded, context(source, tmp_path / "scratch"))
    over_integers = PeftModel.from_pretrained(load_quantized_module(adapted), str(adapted.folder / "adapter"))
    over_floats = PeftModel.from_pretrained(plain(adapted, source), str(adapted.folder / "adapter"))
    with torch.no_grad():
        mine, theirs = (model(input_ids=IDS).logits for model in (over_integers, over_floats))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_base_checkpoint_is_unchanged(rounded: QuantizedCheckpoint, source: Checkpoint, tmp_path: Path) -> None:
    digest = digest_directory(rounded.folder)
    adapted = LoraRecovery(**QUICK_LORA).run(rounded, context(source, tmp_path / "scratch"))
    files = {path.relative_to(adapted.folder).as_posix() for path in adapted.folder.rglob("*") if path.is_file()}
    new = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert files - {path.name for path in rounded.folder.iterdir()} == new
    for name in files - new:
        assert (adapted.folder / name).read_bytes() == (rounded.folder / name).read_bytes()
    assert digest_directory(rounded.folder) == digest


def test_adapter_config_is_reproducible_and_names_no_machine(
    rounded: QuantizedCheckpoint, source: Checkpoint, tmp_path: Path
) -> None:
    folders = [
        LoraRecovery(**{**QUICK_LORA, "steps": 2, "learning_rate": 1e-3})
        .run(rounded, context(source, tmp_path / name))
        .folder
        for name in ("once", "twice")
    ]
    assert digest_directory(folders[0] / "adapter") == digest_directory(folders[1] / "adapter")
    config = json.loads((folders[0] / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert str(tmp_path) not in json.dumps(config)
    assert (config["r"], config["lora_alpha"]) == (4, 8)


def test_only_the_named_layers_are_adapted(rounded: QuantizedCheckpoint, source: Checkpoint, tmp_path: Path) -> None:
    stage = LoraRecovery(**{**QUICK_LORA, "target_modules": ("v_proj", "up_proj")})
    adapted = stage.run(rounded, context(source, tmp_path / "scratch"))
    opened = PeftModel.from_pretrained(load_quantized_module(adapted), str(adapted.folder / "adapter"))
    layers = {name.split(".lora_A")[0] for name, _ in opened.named_modules() if name.endswith("lora_A.default")}
    assert {name.rpartition(".")[2] for name in layers} == {"v_proj", "up_proj"} and len(layers) == 4


def test_unknown_layer_name_is_an_error(rounded: QuantizedCheckpoint, source: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="No linear layer's name ends in 'query'") as caught:
        LoraRecovery(**{**QUICK_LORA, "target_modules": ("query",)}).run(rounded, context(source, tmp_path / "scratch"))
    assert "q_proj" in str(caught.value)


@pytest.fixture
def brought(source: Checkpoint, tmp_path: Path) -> Path:
    """Save an adapter that no stage trained."""
    module = LlamaForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    return save_adapter(module, tmp_path / "brought", "q_proj", r=2)


def test_attached_adapter_files_are_copied_unchanged(
    rounded: QuantizedCheckpoint, source: Checkpoint, brought: Path, tmp_path: Path
) -> None:
    stage = AttachLora(adapter=str(brought))
    assert stage.references() == {"adapter": Reference(str(brought), "adapter")}
    attached = stage.run(rounded, context(source, tmp_path / "scratch"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (attached.folder / "adapter" / name).read_bytes() == (brought / name).read_bytes()
    assert PeftModel.from_pretrained(load_quantized_module(attached), str(attached.folder / "adapter")).active_adapter


def test_an_adapter_that_does_not_fit_is_not_attached(brought: Path, tmp_path: Path) -> None:
    wider = save_tiny_llama(tmp_path / "wider", hidden_size=128)
    checkpoint = quantize_tiny_llama(wider, tmp_path / "q")
    with pytest.raises(ModelError, match=r"lora_A\.weight' is \[2, 64\]"):
        AttachLora(adapter=str(brought)).run(checkpoint, context(wider, tmp_path / "scratch"))


def test_a_second_adapter_is_refused(
    rounded: QuantizedCheckpoint, source: Checkpoint, brought: Path, tmp_path: Path
) -> None:
    attached = AttachLora(adapter=str(brought)).run(rounded, context(source, tmp_path / "one"))
    with pytest.raises(InputError, match="has an adapter already"):
        LoraRecovery(**QUICK_LORA).run(attached, context(source, tmp_path / "two"))
