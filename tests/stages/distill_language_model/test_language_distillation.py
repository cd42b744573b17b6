"""Tests of distillation of tiny decoders: losses, teacher inputs, and endings by kill or NaN."""

from __future__ import annotations

import copy
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import taught
import torch
from causal import LENGTH, Notes, context, text_data
from pydantic import ValidationError
from quantized import save_tiny_llama
from together import train_together
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from compress.models.checkpoint import Checkpoint
from compress.models.model import TorchModel
from compress.models.transformer_pruning import keep_layers
from compress.stages.base import Context
from compress.stages.distill_language_model import trainer
from compress.stages.distill_language_model.stage import DistillLanguageModel
from compress.stages.distill_language_model.trainer import LanguageDistillationTrainer
from compress.stages.recovery.trainer import Quality
from compress.stages.training.checkpoint import TrainingCheckpoint
from compress.stages.training.sequences import training_sequences
from compress.tasks.registry import TASKS
from compress.utils.errors import DataError, StageError

TASK = TASKS["text-generation"]
QUICK: dict[str, Any] = {
    "teacher": "start",
    "batch_size": 4,
    "learning_rate": 3e-3,
    "loss": {"temperature": 1.0},
    "precision": "fp32",
    "tokens": 40 * 4 * LENGTH,
}
SHORT = QUICK | {"tokens": 6 * 4 * LENGTH}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
STUDENT = {"layers": [0, 2]}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Save the teacher, whose norm weights are not all one, like those of trained models."""
    folder = tmp_path_factory.mktemp("teacher")
    save_tiny_llama(folder, **SMALL)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                weight.mul_(1 + 0.2 * torch.rand(weight.shape, generator=generator))
    model.save_pretrained(folder)
    return Checkpoint(folder)


def loaded(source: Checkpoint) -> TorchModel:
    return TorchModel.load(source.folder, TASK)


def run(source: Checkpoint, made: Context, **fields: Any) -> TorchModel:
    stage = DistillLanguageModel.model_validate({**QUICK, "student": STUDENT, **fields})
    return stage.run(loaded(source), made)


def states(model: TorchModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@torch.no_grad()
def apart(model: TorchModel, source: Checkpoint) -> tuple[float, float]:
    """Return mean KL to the teacher on held-out text, by torch's formula, and the share of equal top tokens."""
    rows = text_data().split("validation")
    ids = torch.from_numpy(TASK.encode(rows, model.processor, None, LENGTH).batch(range(24))["input_ids"])
    mine, theirs = (decoder.module(input_ids=ids).logits.log_softmax(-1) for decoder in (model, loaded(source)))
    divergence = torch.nn.functional.kl_div(mine, theirs, reduction="none", log_target=True).sum(-1).mean()
    return float(divergence), float((mine.argmax(-1) == theirs.argmax(-1)).float().mean())


def cut(source: Checkpoint) -> TorchModel:
    model = loaded(source)
    keep_layers(model.module, [0, 2])
    return model


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {
            "loss": {"temperature": 1.0, "direction": "reverse", "top_k": 64},
            "optimizer": {"decay": "cosine"},
            "memory": {"gradient_checkpointing": True},
        },
    ],
    ids=["forward", "reverse"],
)
def test_pruned_student_approaches_its_teacher(fields: dict[str, Any], source: Checkpoint, tmp_path: Path) -> None:
    stage_context = context(source, tmp_path)
    student = run(source, stage_context, **fields)
    divergence_before, after = apart(cut(source), source), apart(student, source)
    assert after[0] < 0.7 * divergence_before[0] and after[1] > divergence_before[1]
    (curve,) = (table.rows for table in stage_context.tables)
    assert curve[-1][0] == QUICK["tokens"] and curve[-1][1] < curve[0][1]


def make_trainer(source: Checkpoint, made: Context, **fields: Any) -> LanguageDistillationTrainer:
    stage = DistillLanguageModel.model_validate({**SHORT, "student": STUDENT, **fields})
    student = cut(source)
    windows = training_sequences(student.processor, stage, made)
    return LanguageDistillationTrainer.between(stage, loaded(source), student, windows, made)


def batch_of(taught: LanguageDistillationTrainer, count: int = 4) -> dict[str, torch.Tensor]:
    from compress.tasks.inference import tensors

    return tensors(taught.windows.train, list(range(count)))


def test_step_loss_equals_torch_loss_on_full_logits(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "_AT_ONCE", 3 * LENGTH)
    taught = make_trainer(source, context(source, tmp_path), loss={"temperature": 2.0, "labels_weight": 0.3})
    batch = batch_of(taught)
    pieces = taught.pieces(dict(batch))
    assert [len(piece["input_ids"]) for piece in pieces] == [3, 1]
    loss = sum(taught.loss(taught.student, piece) for piece in pieces)
    ids, student = batch["input_ids"], taught.student.body.causal
    mine, theirs = student(input_ids=ids).logits, loaded(source).module(input_ids=ids).logits.detach()
    both = [(logits / 2).log_softmax(-1) for logits in (mine, theirs)]
    expected = 4 * torch.nn.functional.kl_div(*both, reduction="none", log_target=True).sum(-1).mean()
    text = torch.nn.functional.cross_entropy(mine[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    # The teacher's states are rounded to bfloat16.
    assert float(loss.detach()) == pytest.approx(float((expected + 0.3 * text).detach()), rel=5e-3)
    gradient = torch.autograd.grad(loss, student.model.layers[0].mlp.up_proj.weight, retain_graph=True)[0]
    expected_gradient = torch.autograd.grad(expected + 0.3 * text, student.model.layers[0].mlp.up_proj.weight)[0]
    assert float((gradient - expected_gradient).norm() / expected_gradient.norm()) < 0.02


class Killed(BaseException):
    pass


def kill_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Interrupt training after a step, as a signal would, with every step saved; return a function that undoes it."""
    plain = LanguageDistillationTrainer._told

    def record(self: LanguageDistillationTrainer, done: int, share: float, loss: float) -> None:
        plain(self, done, share, loss)
        if done == steps + 1:
            raise Killed

    monkeypatch.setattr(LanguageDistillationTrainer, "_told", record)
    monkeypatch.setattr(TrainingCheckpoint, "is_due", lambda self: True)
    return lambda: monkeypatch.setattr(LanguageDistillationTrainer, "_told", plain)


def test_resumed_training_is_bit_identical(source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the first epoch, at its end, and in the second, where the best checkpoint counts too."""
    fields = {**SHORT, "tokens": None, "epochs": 2.0, "dropout": 0.1}
    data = text_data(train=26)
    whole = context(source, tmp_path / "once", data)
    once = run(source, whole, **fields)
    stage_context = context(source, tmp_path / "killed", data, progress=(notes := Notes()))
    for steps in (3, 7, 11):
        live = kill_after(steps, monkeypatch)
        with pytest.raises(Killed):
            run(source, stage_context, **fields)
        live()
    assert alike(states(run(source, stage_context, **fields)), states(once))
    assert "distill_language_model: resuming after step 11" in notes.said
    # The part of the note about the model, before the tokens per second.
    assert stage_context.notes[-1].split(";")[0] == whole.notes[-1].split(";")[0]


def test_second_student_reuses_cached_teacher_outputs(source: Checkpoint, tmp_path: Path) -> None:
    """Weights are bit-identical with cached teacher outputs and with outputs recomputed each time."""
    shared = replace(context(source, tmp_path / "one"), shared=lambda key: tmp_path / "shared" / key)
    first = run(source, shared, **SHORT)
    other = run(source, replace(shared, scratch=tmp_path / "other"), **SHORT | {"learning_rate": 1e-3})
    again = run(source, replace(shared, scratch=tmp_path / "two"), **SHORT)
    without = run(source, context(source, tmp_path / "three"), **SHORT, memory={"cache_teacher_states": False})
    assert alike(states(first), states(again)) and alike(states(first), states(without))
    assert not alike(states(first), states(other))
    remarks = [line.rpartition("; ")[2] for line in shared.notes]
    assert remarks[0] == "teacher states: 24 windows computed, 0 cached"
    assert remarks[1:] == ["teacher states: 0 windows computed, 24 cached"] * 2


def test_damaged_teacher_state_file_is_recomputed(source: Checkpoint, tmp_path: Path) -> None:
    stage_context = replace(context(source, tmp_path / "one"), shared=lambda key: tmp_path / "shared")
    first = run(source, stage_context, **SHORT)
    for file in (tmp_path / "shared").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-3])
    assert alike(states(run(source, replace(stage_context, scratch=tmp_path / "two"), **SHORT)), states(first))


def test_pruned_weights_stay_zero(source: Checkpoint, tmp_path: Path) -> None:
    model = loaded(source)
    weight = model.module.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[::2] = 0
    trained = DistillLanguageModel.model_validate(SHORT).run(copy.deepcopy(model), context(source, tmp_path))
    after = trained.module.model.layers[0].mlp.up_proj.weight
    assert (after[::2] == 0).all() and not torch.equal(after, weight)


def test_nan_stops_training_at_the_last_good_checkpoint(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingCheckpoint, "is_due", lambda self: True)
    good: list[dict[str, torch.Tensor]] = []
    plain = LanguageDistillationTrainer._told

    def record(self: LanguageDistillationTrainer, done: int, share: float, loss: float) -> None:
        plain(self, done, share, loss)
        causal = self.student.body.causal
        if done == 4:
            handles.append(causal.model.layers[1].mlp.down_proj.register_forward_hook(lambda *all: all[2] * torch.nan))
        good.append({name: tensor.clone() for name, tensor in causal.state_dict().items()})

    handles: list[Any] = []
    monkeypatch.setattr(LanguageDistillationTrainer, "_told", record)
    monkeypatch.setattr(Quality, "error", lambda *_: -1.0)
    stage_context = context(source, tmp_path)
    student = run(source, stage_context, **SHORT)
    assert len(good) == 4 and alike(states(student), good[-1])
    stopped = next(line for line in stage_context.notes if "became nan" in line)
    assert "step 5 of 6" in stopped and "after step 4" in stopped


def test_nan_before_the_first_checkpoint_is_an_error(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(self: LanguageDistillationTrainer, done: int, share: float, loss: float) -> None:
        norm = self.student.body.causal.model.layers[1].input_layernorm
        norm.weight.register_hook(lambda slope: slope * torch.inf)

    monkeypatch.setattr(LanguageDistillationTrainer, "_told", record)
    with pytest.raises(StageError, match=r"length became \w+ at step 2 of 6"):
        run(source, context(source, tmp_path), **SHORT)


def test_model_with_nan_weights_is_refused(source: Checkpoint, tmp_path: Path) -> None:
    model = loaded(source)
    with torch.no_grad():
        model.module.model.layers[2].self_attn.v_proj.weight[3, 3] = float("nan")
    with pytest.raises(StageError, match="not finite"):
        DistillLanguageModel.model_validate({**SHORT, "student": STUDENT}).run(model, context(source, tmp_path))


def with_tokenizer(model: TorchModel, words: dict[str, int]) -> TorchModel:
    """Return the model with another tokenizer that maps tokens to the given ids."""
    tokenizer_fields = json.loads(model.processor.backend_tokenizer.to_str())
    tokenizer_fields["model"]["vocab"] = words
    known = [dict(token, id=words[token["content"]]) for token in tokenizer_fields["added_tokens"]]
    tokenizer_fields["added_tokens"] = sorted(known, key=lambda token: token["id"])
    other = Tokenizer.from_str(json.dumps(tokenizer_fields))
    model.processor = PreTrainedTokenizerFast(
        tokenizer_object=other, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    return model


def test_teacher_may_have_permuted_and_additional_tokens(source: Checkpoint, tmp_path: Path) -> None:
    """Permuting the teacher's vocabulary rows and adding some changes the loss only by rounding."""
    plain = make_trainer(source, context(source, tmp_path))
    other, count = loaded(source), plain.student.body.head(torch.float32).shape[0]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    words = {token: int(order[token_id]) for token, token_id in other.processor.get_vocab().items()}
    table = torch.empty(count + 7, SMALL["hidden_size"]).fill_(0.1)
    old = other.module.get_input_embeddings().weight.detach()
    other.module.resize_token_embeddings(count + 7, mean_resizing=False)
    table[order] = old
    with torch.no_grad():
        other.module.get_input_embeddings().weight.copy_(table)
    other = with_tokenizer(other, {**words, **{f"more{token_id}": count + token_id for token_id in range(7)}})
    stage, student, stage_context = (
        DistillLanguageModel.model_validate({**SHORT, "student": STUDENT}),
        cut(source),
        context(source, tmp_path),
    )
    windows = training_sequences(student.processor, stage, stage_context)
    mixed = LanguageDistillationTrainer.between(stage, other, student, windows, stage_context)
    assert mixed.teacher.tokens is not None and mixed.student.body.tokens is None
    losses = []
    for variant in (plain, mixed):
        (piece,) = variant.pieces(batch_of(variant))
        losses.append(float(variant.loss(variant.student, piece).detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_teacher_that_lacks_tokens_is_refused(source: Checkpoint, tmp_path: Path) -> None:
    words = loaded(source).processor.get_vocab()
    words["other"] = words.pop("~")
    stage, student = DistillLanguageModel.model_validate({**SHORT, "student": STUDENT}), cut(source)
    stage_context = context(source, tmp_path)
    windows = training_sequences(student.processor, stage, stage_context)
    teacher = with_tokenizer(loaded(source), words)
    with pytest.raises(StageError, match="lacks 1 of the student's 160 tokens, such as '~'"):
        LanguageDistillationTrainer.between(stage, teacher, student, windows, stage_context)


def test_too_little_text_and_too_long_windows_are_refused(source: Checkpoint, tmp_path: Path) -> None:
    stage_context = context(source, tmp_path)
    with pytest.raises(DataError, match=r"100 tokens are too few for one step, which takes 128"):
        run(source, stage_context, tokens=100)
    with pytest.raises(DataError, match="Windows have 264 tokens, and a 'llama' model reads 256"):
        run(source, stage_context, sequence_length=264, batch_size=1)
    with pytest.raises(DataError, match="text is too short"):
        run(source, context(source, tmp_path, text_data(train=1, validation=1)))


@pytest.mark.parametrize(
    ("weights", "needed"),
    [
        ({"logits_weight": 0, "labels_weight": 1, "top_k": 4}, "logits_weight above 0"),
        ({"logits_weight": 0}, "above 0"),
    ],
)
def test_losses_without_an_effect_are_refused(weights: dict[str, Any], needed: str) -> None:
    with pytest.raises(ValidationError, match=needed):
        DistillLanguageModel.model_validate({"teacher": "start", "loss": weights})


@pytest.mark.parametrize("fields", [{"budget": "30"}, {"budget": "0m"}, {"budget": "5m", "tokens": 10}])
def test_training_length_is_one_number_with_a_unit(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="budget"):
        DistillLanguageModel.model_validate({"teacher": "start", **fields})
    assert DistillLanguageModel(teacher="start", budget="1.5h").seconds == 5400
    assert DistillLanguageModel(teacher="start", budget="10m").shortened(0.5).seconds == 300


@pytest.mark.slow
def test_two_processes_reproduce_the_loss_curve_of_one(tmp_path: Path) -> None:
    """Assistant replies of conversations give the two processes different token counts in a step."""
    save_tiny_llama(tmp_path / "teacher", hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    (alone, weights), both = taught.losses(tmp_path, 2), train_together(taught.losses, tmp_path)
    assert len(alone) == 10 and alone[-1] < 0.95 * alone[0]
    for curve, learned in both:
        np.testing.assert_allclose(curve, alone, rtol=0, atol=1e-3)
        np.testing.assert_allclose(learned, weights, rtol=0, atol=1e-4)
    assert both[0] == both[1]


@pytest.mark.slow
def test_each_of_two_processes_caches_half_of_the_teacher_states(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "teacher", hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    wrote = {"teacher_writes": {"conversations": 24, "share": 0.5}}
    first, second = train_together(partial(taught.losses, **wrote), tmp_path)
    assert first == second
    written_files = [
        sorted(file.name for file in (tmp_path / f"scratch {rank}").glob("written-questions-*")) for rank in range(2)
    ]
    assert written_files == [["written-questions-12-0.safetensors"], ["written-questions-12-1.safetensors"]]


@pytest.mark.slow
def test_failure_in_one_process_is_reported_by_both(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "teacher", hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    messages = train_together(taught.refusal, tmp_path)
    assert re.search(r"became \w+ at step 4 of 10\.", messages[0]), messages[0]
    assert messages[0] == messages[1]
