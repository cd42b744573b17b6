"""Tests of chat prompts: token ids in transformers.js are compared with transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from many_lines import LINES, lines
from transformers_js_page import run_node

pytest.importorskip("compress.plugins.apps")


@pytest.mark.slow
def test_ids_in_node_match_transformers_on_10_000_messages(library: Path, smollm2: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from compress.plugins.apps.chat import ChatPrompts
    from compress.plugins.apps.preprocess import Prompt

    model = tmp_path / "model"
    model.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        if (smollm2 / name).is_file():
            shutil.copyfile(smollm2 / name, model / name)
    processor, asked = AutoTokenizer.from_pretrained(model), lines()
    rule = ChatPrompts.find_rule(tmp_path, processor, 512)
    assert isinstance(rule, Prompt)
    right = [
        list(
            processor.apply_chat_template([{"role": "user", "content": line}], add_generation_prompt=True)["input_ids"]
        )
        for line in asked
    ]
    [(name, content)] = ChatPrompts(tmp_path, rule).more_for_page().items()
    assert name == rule.tokenizer
    (tmp_path / name).write_bytes(content)
    (tmp_path / "lines.json").write_text(json.dumps([f"{rule.before}{line}{rule.after}" for line in asked]))
    ids = run_node("prompt_ids.mjs", library, tmp_path, "model", tmp_path / "lines.json")
    wrong = [line for line, ours, theirs in zip(asked, right, ids, strict=True) if ours != theirs]
    assert (len(ids), wrong[:3]) == (LINES, [])
