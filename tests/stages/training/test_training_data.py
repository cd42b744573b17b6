"""Tests of teacher-generated text against transformers' greedy decoding, and of image augmentation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import tiny
import tiny_images
import torch
from causal import LENGTH, context
from pydantic import ValidationError
from quantized import save_tiny_llama
from tokenizers.pre_tokenizers import UnicodeScripts
from torch import nn

from compress.models.checkpoint import Checkpoint
from compress.models.model import TorchModel
from compress.stages.distill.stage import Distill
from compress.stages.distill_language_model.settings import with_remaining_budget
from compress.stages.distill_language_model.stage import DistillLanguageModel
from compress.stages.finetune import Finetune
from compress.stages.protocols import fields_without_effect
from compress.stages.qat.stage import Qat
from compress.stages.sparsify.stages import SparsifyGradually
from compress.stages.training import synthetic_data
from compress.stages.training.augmentation import Augmentation
from compress.stages.training.loop import Trainee, train
from compress.stages.training.sequences import TokenSequences, training_sequences
from compress.stages.training.settings import Augment, TeacherWrites, Training
from compress.stages.training.synthetic_data import with_synthetic_text
from compress.tasks.inference import tensors
from compress.tasks.registry import TASKS
from compress.utils.errors import DataError, StageError
from compress.utils.progress import SilentProgress

TASK = TASKS["text-generation"]
STAGE = DistillLanguageModel(teacher="start", batch_size=4, precision="fp32")
TURNS = "{% for turn in messages %}<s>{{ turn.role }} {{ turn.content }}</s>{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}<s>a {% endif %}"


def lesson_text(windows: TokenSequences, settings: TeacherWrites, teacher: TorchModel, made: Any) -> TokenSequences:
    """Return the training windows, without the elapsed seconds, for a student with the same tokenizer."""
    return with_synthetic_text(windows, settings, teacher, teacher.processor, made)[0]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save_tiny_llama(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def teacher(source: Checkpoint) -> TorchModel:
    model = TorchModel.load(source.folder, TASK)
    model.processor.chat_template = TEMPLATE
    return model


@pytest.fixture
def windows(source: Checkpoint, teacher: TorchModel, tmp_path: Path) -> TokenSequences:
    return training_sequences(teacher.processor, STAGE, context(source, tmp_path))


def alone(teacher: TorchModel, beginning: np.ndarray) -> list[int]:
    """Return transformers' greedy continuation of one prompt, unbatched and without `generate`."""
    ids = beginning.tolist()
    while len(ids) < LENGTH:
        with torch.no_grad():
            logits = teacher.module(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids


RUNTIMES = pytest.mark.parametrize("runtime", get_args(TeacherWrites.model_fields["runtime"].annotation))


@RUNTIMES
def test_teacher_decodes_greedily_up_to_an_end_token(
    windows: TokenSequences, teacher: TorchModel, source: Checkpoint, tmp_path: Path, monkeypatch: Any, runtime: Any
) -> None:
    monkeypatch.setattr(synthetic_data, "_AT_ONCE", 2)
    prompts = [example["input_ids"][:start] for example, start in zip(windows.train.inputs, (4, 9, 3), strict=False)]
    texts = [alone(teacher, prompt) for prompt in prompts]
    end = texts[0][len(prompts[0]) + 3]
    expected = []
    for prompt, text in zip(prompts, texts, strict=True):
        answer = text[len(prompt) :]
        expected.append(answer[: answer.index(end) + 1] if end in answer else answer)
    teacher.module.generation_config.eos_token_id = [end]
    stage_context = context(source, tmp_path)
    writer = synthetic_data._Writer(teacher, stage_context, False)
    if runtime != "torch":
        writer = synthetic_data._RuntimesWriter(teacher, stage_context, False, runtime)
    answers = writer.write("answers", prompts, [LENGTH - len(prompt) for prompt in prompts])
    assert [answer.tolist() for answer in answers] == expected
    assert stage_context.notes == [f"the teacher generated {sum(map(len, expected))} tokens, 3 answers"]


def test_torch_runs_a_teacher_that_openvino_does_not_support(
    windows: TokenSequences, teacher: TorchModel, source: Checkpoint, tmp_path: Path
) -> None:
    # OpenVINO cannot convert its tokenizer.
    teacher.processor._tokenizer.pre_tokenizer = UnicodeScripts()
    stage_context = context(source, tmp_path)
    with pytest.raises(StageError, match="openvino doesn't run the teacher") as caught:
        lesson_text(windows, TeacherWrites(conversations=8, runtime="openvino"), teacher, stage_context)
    assert caught.value.where == "teacher_writes.runtime" and caught.value.hint == (
        "remove runtime: torch generates instead, more slowly"
    )
    assert not [*tmp_path.iterdir()]
    assert len(lesson_text(windows, TeacherWrites(conversations=8), teacher, stage_context).train)


def test_text_generated_before_a_kill_is_reused(
    windows: TokenSequences, teacher: TorchModel, source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic_data, "_AT_ONCE", 4)
    stage_context, plain, calls = context(source, tmp_path), teacher.module.generate, 0

    def killed(**given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return plain(**given)

    monkeypatch.setattr(teacher.module, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        lesson_text(windows, TeacherWrites(conversations=8), teacher, stage_context)
    again = lesson_text(windows, TeacherWrites(conversations=8), teacher, stage_context)
    resumed_calls = calls - 2
    whole = lesson_text(windows, TeacherWrites(conversations=8), teacher, context(source, tmp_path / "another"))
    assert calls - 2 - resumed_calls == resumed_calls + 1
    for resumed_row, other in zip(again.train.inputs, whole.train.inputs, strict=True):
        assert np.array_equal(resumed_row["input_ids"], other["input_ids"])


def test_generation_time_counts_in_the_budget_also_after_a_kill(
    windows: TokenSequences, teacher: TorchModel, source: Checkpoint, tmp_path: Path
) -> None:
    given = windows, TeacherWrites(conversations=8), teacher, teacher.processor, context(source, tmp_path)
    (_, seconds), (_, again) = with_synthetic_text(*given), with_synthetic_text(*given)
    assert 0 < seconds == again
    assert with_remaining_budget(STAGE, seconds) is STAGE
    timed = STAGE.model_copy(update={"budget": "90s"})
    assert with_remaining_budget(timed, 30.5).seconds == 59.5
    with pytest.raises(StageError, match="took 90 s, which leaves nothing of a budget of 90 s") as refused:
        with_remaining_budget(timed, 90)
    assert refused.value.where == "budget"


def test_bfloat16_copy_of_the_teacher_generates(
    windows: TokenSequences, teacher: TorchModel, source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, plain = [], type(teacher.module).generate

    def generate(self: Any, **given: Any) -> Any:
        seen.append(self.dtype)
        return plain(self, **given)

    monkeypatch.setattr(type(teacher.module), "generate", generate)
    given = windows, TeacherWrites(conversations=4), teacher, teacher.processor
    for folder_number, bf16 in enumerate((False, True)):
        with_synthetic_text(*given, context(source, tmp_path / str(folder_number)), bf16)
    assert seen == 2 * [torch.float32] + 2 * [torch.bfloat16] and teacher.module.dtype == torch.float32


def test_teacher_with_other_tokens_or_no_chat_template_is_refused(
    windows: TokenSequences, teacher: TorchModel, source: Checkpoint, tmp_path: Path
) -> None:
    other = TorchModel.load(source.folder, TASK)
    other.processor.add_tokens(["another"])
    writes = TeacherWrites(conversations=4)
    with pytest.raises(StageError, match="different tokenizers") as refused:
        with_synthetic_text(windows, writes, teacher, other.processor, context(source, tmp_path))
    assert refused.value.where == "teacher_writes"
    model = TorchModel.load(source.folder, TASK)
    teacher.processor.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        with_synthetic_text(windows, writes, teacher, model.processor, context(source, tmp_path))


@RUNTIMES
def test_teacher_generates_questions_and_replies(
    windows: TokenSequences, teacher: TorchModel, source: Checkpoint, tmp_path: Path, runtime: Any
) -> None:
    writes = TeacherWrites(conversations=20, runtime=runtime)
    teacher.module.generation_config.eos_token_id = teacher.processor.eos_token_id
    stage_context = context(source, tmp_path)
    lesson = lesson_text(windows, writes, teacher, stage_context).train
    counts = [note.split(", ")[-1] for note in stage_context.notes]
    # One of the questions that torch samples consists only of the end token.
    assert lesson.labels is None and counts == ["20 questions", f"{19 if runtime == 'torch' else 20} answers"]
    ids = np.concatenate([example["input_ids"] for example in lesson.inputs])
    assert all(len(example["input_ids"]) == LENGTH for example in lesson.inputs)
    begun, opened = (
        teacher.processor(text, add_special_tokens=False)["input_ids"] for text in ("<s>user ", "</s><s>a ")
    )
    text = teacher.processor.decode(ids)
    assert text.startswith(teacher.processor.decode(begun)) and text.count(teacher.processor.decode(opened)) >= 2
    # The first reply is the greedy continuation of the first question.
    answer_start = next(at for at in range(len(ids)) if ids[at : at + len(opened)].tolist() == opened) + len(opened)
    with torch.no_grad():
        for more in range(4):
            logits = teacher.module(input_ids=torch.from_numpy(ids[None, : answer_start + more])).logits
            assert int(logits[0, -1].argmax()) == ids[answer_start + more]
    again = lesson_text(windows, writes, teacher, context(source, tmp_path / "2")).train
    assert np.array_equal(np.concatenate([example["input_ids"] for example in again.inputs]), ids)


def test_unfinished_replies_are_dropped(
    windows: TokenSequences, teacher: TorchModel, source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = teacher.processor.eos_token_id
    teacher.module.generation_config.eos_token_id = end
    wrote = {"questions": [], "answers": [[7] * 40 + [end], [8] * 256, [9] * 40 + [end]]}

    def write(self: Any, what: str, begun: Any, room: Any, **options: Any) -> list[np.ndarray]:
        return [np.array(ids or [5, 6, end]) for ids in wrote[what] or [[]] * 3]

    monkeypatch.setattr(synthetic_data._Writer, "write", write)
    lesson = lesson_text(windows, TeacherWrites(conversations=3), teacher, context(source, tmp_path)).train
    read = np.concatenate([example["input_ids"] for example in lesson.inputs])
    assert (read == 7).sum() == 40 and not (read == 8).any() and (read == end).sum() >= 2


def test_generated_text_has_the_requested_share(
    windows: TokenSequences, teacher: TorchModel, source: Checkpoint, tmp_path: Path
) -> None:
    marks = np.ones((len(windows.train), LENGTH), np.int64)
    marks[:, 0] = 0
    given, text = replace(windows, train=replace(windows.train, labels=marks)), len(windows.train)
    written = len(lesson_text(given, TeacherWrites(conversations=3), teacher, context(source, tmp_path)).train)
    settings = TeacherWrites(conversations=3, share=0.25)
    lesson = lesson_text(given, settings, teacher, context(source, tmp_path)).train
    assert len(lesson) == text + round(text / 3) and lesson.labels is not None
    assert all(lesson.inputs[row]["input_ids"] is windows.train.inputs[row]["input_ids"] for row in range(text))
    assert np.array_equal(lesson.labels[:text], marks) and lesson.labels[text:].all()
    for row in range(text + written, len(lesson)):
        assert np.array_equal(lesson.inputs[row]["input_ids"], lesson.inputs[row - written]["input_ids"])


BOTH = {"crop_padding": 1, "horizontal_flip": 0.5}
QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "precision": "fp32"}


def shown(augment: dict[str, Any] | None, seed: int = 0) -> tuple[list[np.ndarray], list[torch.Tensor]]:
    """Return what two epochs over 16 images show: indices [2 x 16] and pixels [2 x 16, C, H, W]."""
    model = tiny_images.vit(hidden_size=8, num_hidden_layers=1, intermediate_size=8)
    examples = tiny_images.context(tiny_images.dataset(train=16)).encode("train", model)
    places, pixels = [], []

    def loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        places.append(batch["index"].numpy())
        pixels.append(batch["pixel_values"].clone())
        return sum(parameter.sum() for parameter in module.parameters()) * 0  # type: ignore[return-value]

    varied = None if augment is None else Augment.model_validate(augment)
    trainee = Trainee(model.module, examples, loss, augment=varied)
    train(trainee, Training.model_validate(QUICK), seed, SilentProgress(), "test")
    return places, pixels


def variants(image: np.ndarray, black: np.ndarray) -> list[np.ndarray]:
    """Return all variants that a padding of 1 and a flip can produce, [18, C, H, W]."""
    padded = np.stack([np.pad(plane, 1, constant_values=value) for plane, value in zip(image, black, strict=True)])
    height, width = image.shape[1:]
    windows = [padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return windows + [window[:, :, ::-1] for window in windows]


def test_each_epoch_augments_images_differently():
    places, pixels = shown(BOTH)
    plain_places, plain = shown(None)
    assert all(map(np.array_equal, places, plain_places)), "the order of the examples is that of plain training"
    # Black is 0; preprocessing subtracts 0.5 and divides by 0.5.
    black = np.array([-1.0, -1.0, -1.0], np.float32)
    originals = {row: image.numpy() for row, image in zip(plain_places[0], plain[0], strict=True)}
    originals |= {row: image.numpy() for row, image in zip(plain_places[1], plain[1], strict=True)}
    taken: dict[int, list[int]] = {row: [] for row in range(16)}
    for row, image in zip(np.concatenate(places), torch.cat(pixels).numpy(), strict=True):
        matches = [i for i, variant in enumerate(variants(originals[row], black)) if np.array_equal(variant, image)]
        assert len(matches) == 1
        taken[row].append(matches[0])
    assert len({first for first, _ in taken.values()}) > 5, "images of one epoch are moved apart from each other"
    assert any(first != second for first, second in taken.values()), "epochs differ"


def test_augmentation_depends_on_seed_and_epoch_only():
    examples = tiny_images.context(tiny_images.dataset(train=16)).encode("train", tiny_images.vit())
    augmentation = Augmentation.of(Augment.model_validate(BOTH), examples, seed=0)
    batch = tensors(examples, list(range(16)))
    first, second, again = (augmentation.vary(batch, range(16), epoch)["pixel_values"] for epoch in (1, 2, 1))
    assert torch.equal(first, again) and not torch.equal(first, second)
    other = Augmentation.of(Augment.model_validate(BOTH), examples, seed=1).vary(batch, range(16), 1)
    assert not torch.equal(first, other["pixel_values"])


def test_images_are_unchanged_without_augment():
    places, pixels = shown(None)
    model = tiny_images.vit()
    examples = tiny_images.context(tiny_images.dataset(train=16)).encode("train", model)
    for chosen, batch in zip(places, pixels, strict=True):
        assert np.array_equal(batch.numpy(), examples.batch(chosen.tolist())["pixel_values"])


def watched(model: TorchModel) -> list[tuple[bool, torch.Tensor]]:
    """Return a list that collects the training flag and the pixels of each forward pass of the module or its copies."""
    seen: list[tuple[bool, torch.Tensor]] = []

    def keep(module: nn.Module, _: Any, inputs: dict[str, Any]) -> None:
        seen.append((module.training, inputs["pixel_values"].clone()))

    model.module.register_forward_pre_hook(keep, with_kwargs=True)
    return seen


def test_teacher_gets_the_augmented_image_of_its_student():
    student, teacher = tiny_images.vit(seed=0), tiny_images.vit(seed=1)
    learned, taught = watched(student), watched(teacher)
    context = replace(tiny_images.context(tiny_images.dataset(train=16)), earlier=lambda label: teacher)
    Distill.model_validate({**QUICK, "teacher": "start", "augment": BOTH}).run(student, context)
    assert len(taught) == 4 and not any(training for training, _ in taught)
    assert all(torch.equal(mine, theirs) for (_, mine), (_, theirs) in zip(learned, taught, strict=True))


def test_teacher_with_other_image_preprocessing_is_refused():
    student, teacher = tiny_images.vit(), tiny_images.vit()
    teacher.processor = tiny_images.processor(image_mean=[0.4, 0.5, 0.5])
    context = replace(tiny_images.context(tiny_images.dataset(train=16)), earlier=lambda label: teacher)
    with pytest.raises(StageError, match="prepare images differently"):
        Distill.model_validate({**QUICK, "teacher": "start", "augment": BOTH}).run(student, context)


def test_augment_on_text_is_refused_before_training():
    model = tiny.encoder()
    weight_before = model.module.classifier.weight.detach().clone()
    with pytest.raises(StageError, match="applies to images, and the training examples have none"):
        Finetune.model_validate({**QUICK, "augment": BOTH}).run(model, tiny.context())
    assert torch.equal(model.module.classifier.weight, weight_before)


def test_crop_padding_as_wide_as_the_image_is_refused():
    assert shown({"crop_padding": tiny_images.SIDE - 1})
    with pytest.raises(StageError, match="crop_padding is 16, and images have 16 x 16 pixels"):
        shown({"crop_padding": tiny_images.SIDE})


def test_out_of_range_fields_are_refused():
    for wrong in ({}, {"crop_padding": 0, "horizontal_flip": 0}, {"horizontal_flip": 1.0}, {"crop_padding": -1}):
        with pytest.raises(ValidationError):
            Augment.model_validate(wrong)


@pytest.mark.parametrize("kind", [Finetune, Distill, Qat, SparsifyGradually])
def test_augment_has_no_effect_on_text_tasks(kind: type[Any]):
    more = {"teacher": "start"} if kind is Distill else {"sparsity": 0.5} if kind is SparsifyGradually else {}
    stage = kind.model_validate({**more, "augment": BOTH})
    assert "augment" in fields_without_effect(stage, TASKS["text-classification"].capabilities)
    assert "augment" not in fields_without_effect(stage, TASKS["image-classification"].capabilities)
