"""Answers to instructions through ONNX Runtime against the same mathematics in numpy, and what is made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from decoder_graphs import TinyDecoder
from quantized import tiny_tokenizer

from compress.data.instructions import Instruction
from compress.evaluation.instruction_following import answer_instructions, instruction_rows
from compress.formats.targets import TARGETS
from compress.utils.errors import DataError
from compress.utils.progress import SilentProgress

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}: {{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
ASKED = [Instruction("say no", {"one_of": ["no"]}), Instruction("be brief", {"words_at_most": 3, "commas": 0})]


def write(folder: Path, template: str | None = TEMPLATE) -> TinyDecoder:
    decoder = TinyDecoder(vocabulary=160)
    decoder.write(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return decoder


def answers(folder: Path) -> list[str]:
    return answer_instructions(folder, ASKED, 7, TARGETS["cpu"], 1, SilentProgress(), "")


def test_each_instruction_is_a_turn_of_a_chat_that_the_model_goes_on_with(tmp_path: Path) -> None:
    decoder, tokenizer = write(tmp_path), tiny_tokenizer()
    expected = []
    for text in ("u: say no;a:", "u: be brief;a:"):
        ids = decoder.continuation(tokenizer(text, add_special_tokens=False)["input_ids"], 7)
        expected.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
    assert answers(tmp_path) == expected


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    write(tmp_path, template=None)
    with pytest.raises(DataError, match="asked as a chat, and the model's tokenizer has no chat template"):
        answers(tmp_path)


def test_instructions_count_whole_and_checks_one_by_one() -> None:
    whole, checks = instruction_rows(ASKED, ["No.", "well, two"], "final", "cpu")
    assert (whole.metric, whole.raw, whole.value) == ("instructions_followed", (1.0, 0.0), 0.5)
    assert (checks.metric, checks.raw, checks.value) == ("checks_passed", (1.0, 1.0, 0.0), pytest.approx(2 / 3))
    assert whole.low is not None and whole.high is not None and whole.low < 0.5 < whole.high
