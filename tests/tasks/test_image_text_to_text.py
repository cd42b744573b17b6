"""Tests of visual question answering: inputs, loss and generated texts compared with transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_questions
import torch
from PIL import Image
from tiny_questions import table
from transformers import AutoModelForImageTextToText, LlavaProcessor, pipeline

from compress.data.media import decode
from compress.formats.runtime import get_runtime
from compress.formats.targets import TARGETS
from compress.tasks.evaluation import Evaluation
from compress.tasks.image_text_to_text import TASK
from compress.tasks.inference import loss_of, merit, predict, tensors
from compress.utils.errors import DataError, ModelError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_questions.write_model(tmp_path_factory.mktemp("llava"))


def _image(rows: Any, row: int) -> Image.Image:
    return decode(rows["image"][row].as_py(), "RGB", {})


def _asked(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def test_inputs_equal_transformers_processor(folder: Path) -> None:
    model, rows = TASK.load(folder, None, trust_remote_code=False), table(4)
    examples = TASK.eval_examples(rows, model.processor, None, 64, Evaluation())
    transformers_processor = LlavaProcessor.from_pretrained(folder, backend="pil")
    for row in range(4):
        prompt = transformers_processor.apply_chat_template(
            _asked(rows["text"][row].as_py()), add_generation_prompt=True, tokenize=False
        )
        given = transformers_processor(
            images=_image(rows, row), text=prompt, add_special_tokens=False, return_tensors="np"
        )
        assert examples.inputs[row].keys() == given.keys()
        for name, array in given.items():
            np.testing.assert_array_equal(examples.inputs[row][name], array[0])
    assert examples.labels is not None and examples.labels.tolist() == rows["target"].to_pylist()


def test_loss_equals_transformers_loss_of_answer(folder: Path) -> None:
    model, rows = TASK.load(folder, None, trust_remote_code=False), table(5)
    examples = TASK.encode(rows, model.processor, None, 64)
    batch = tensors(examples, list(range(5)))
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    tokenizer = model.processor.tokenizer
    with torch.inference_mode():
        loss = loss_of(TASK, model.module, batch)
        inputs = {name: batch[name] for name in examples.padding}
        expected_loss = plain(**inputs, labels=batch["labels"].long()).loss
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)
    for row, labels in enumerate(batch["labels"]):
        assert tokenizer.decode(labels[labels != -100]) == f"{rows['target'][row].as_py()} </s>"


def test_merit_is_accuracy_of_answer_tokens(folder: Path) -> None:
    model = TASK.load(folder, None, trust_remote_code=False)
    examples = TASK.encode(table(8), model.processor, None, 64)
    right = []
    logits = predict(model.module, examples)
    for row in range(8):
        batch = tensors(examples, [row])
        with torch.inference_mode():
            whole = model.module(**{name: batch[name] for name in examples.padding}).logits[0]
        places = (batch["labels"][0] != -100).nonzero().flatten()
        expected_tokens = batch["labels"][0][places]
        right.append(float((whole[places - 1].argmax(-1) == expected_tokens).float().mean()))
        torch.testing.assert_close(torch.from_numpy(logits[row, : len(places)]), whole[places - 1])
    assert merit(TASK, model.module, examples) == pytest.approx(np.mean(right), abs=1e-6)


def test_generated_texts_equal_transformers_pipeline(folder: Path) -> None:
    rows, model = table(6), TASK.load(folder, None, trust_remote_code=False)
    examples = TASK.eval_examples(rows, model.processor, None, 64, Evaluation())
    session = get_runtime("torch").open(folder, TARGETS["torch"], 1)
    texts = session.predict(examples.batch(range(6)))["texts"]
    transformers_pipeline = pipeline("image-text-to-text", model=str(folder), processor=model.processor, device="cpu")
    for row in range(6):
        conversation = _asked(rows["text"][row].as_py())
        conversation[0]["content"][0] = {"type": "image", "image": _image(rows, row)}
        (answer,) = transformers_pipeline(text=conversation, return_full_text=False)
        assert texts[row] == answer["generated_text"].strip()
    assert len(set(texts)) > 1
    assert TASK.collect({"texts": texts}, examples, [0])["texts"].tolist() == texts.tolist()


def test_metrics_match_values_by_hand() -> None:
    written, expected = np.array(["It is a bag.", "red shoe", ""]), np.array(["it is bag", "a red coat", "dress"])
    match, f1 = TASK.measure({"texts": written}, expected, "m", "t")
    assert match.raw == (1.0, 0.0, 0.0)
    assert f1.raw == pytest.approx((1.0, 0.5, 0.0))


def test_prompt_without_image_token_is_rejected(tmp_path: Path, folder: Path) -> None:
    plain = TASK.load(tiny_questions.write_model(tmp_path / "plain", template=None), None, trust_remote_code=False)
    rows = table(2)
    with pytest.raises(DataError, match=r"'where is it bright \?' has the image's token <image> 0 times") as caught:
        TASK.encode(rows, plain.processor, None, 64)
    assert caught.value.where == "row 1" and "write <image> into the text" in str(caught.value.hint)
    whole = rows.set_column(1, "text", [["<image> where ?", "user : <image> what ?"]])
    assert TASK.encode(whole, plain.processor, None, 64).inputs[1]["input_ids"][:6].tolist() == [5, 7, 4, 4, 4, 4]
    twice = rows.set_column(1, "text", [["where ?", "<image> what ?"]])
    chat = TASK.load(folder, None, trust_remote_code=False)
    with pytest.raises(DataError, match="1 times") as caught:
        TASK.encode(twice, chat.processor, None, 64)
    assert caught.value.where == "row 2" and "take <image> out" in str(caught.value.hint)


def test_too_long_prompt_is_rejected_and_answer_truncated(folder: Path) -> None:
    model = TASK.load(folder, None, trust_remote_code=False)
    with pytest.raises(DataError, match="row 1 has 14 tokens, those of its image included"):
        TASK.encode(table(2), model.processor, None, 14)
    examples = TASK.encode(table(2), model.processor, None, 16)
    assert examples.labels is not None and (examples.labels != -100).sum(axis=1).tolist() == [2, 2]


def test_inconsistent_image_token_counts_are_rejected(tmp_path: Path) -> None:
    wrong = tiny_questions.write_model(tmp_path / "wrong")
    fields = json.loads((wrong / "processor_config.json").read_text())
    (wrong / "processor_config.json").write_text(json.dumps(fields | {"num_additional_image_tokens": 0}))
    with pytest.raises(ModelError, match="an image has 4 features, and its processor writes 3 tokens"):
        TASK.load(wrong, None, trust_remote_code=False)
    (wrong / "processor_config.json").write_text(json.dumps(fields | {"patch_size": None}))
    with pytest.raises(ModelError, match="says no patch_size"):
        TASK.load(wrong, None, trust_remote_code=False)


def test_siglip_tower_with_qwen2_decoder(tmp_path: Path) -> None:
    model_folder = tiny_questions.write_model(tmp_path, text="qwen2", tower="siglip_vision_model")
    model = TASK.load(model_folder, None, trust_remote_code=False)
    examples = TASK.encode(table(2), model.processor, None, 64)
    assert np.isfinite(predict(model.module, examples)).all()
