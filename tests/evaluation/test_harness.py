"""Tests of lm-evaluation-harness on our artifacts: scores against transformers' log probabilities."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoder_graphs import TinyDecoder
from quantized import save_tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from compress.utils.errors import InputError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    from lm_eval.api.instance import Instance

    from compress.evaluation.harness import CompressLM

pytestmark = pytest.mark.filterwarnings("ignore")
TASK = """task: words
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
QUESTIONS = [("some", ["words", "meaning"], 0), ("no", ["row", "other", "in"], 2), ("that stand", ["a", "in"], 1)]


def write_decoder(folder: Path) -> TinyDecoder:
    decoder = TinyDecoder(vocabulary=160)
    decoder.write(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return decoder


def asked(*arguments: Any) -> list[Instance]:
    return [Instance("loglikelihood", {}, given, index) for index, given in enumerate(arguments)]


def log_likelihood(folder: Path, context: list[int], ids: list[int]) -> tuple[float, bool]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([[*context, *ids]])).logits[0, len(context) - 1 : -1].double().log_softmax(-1)
    scored = logits[torch.arange(len(ids)), torch.tensor(ids)]
    return float(scored.sum()), bool((logits.argmax(-1) == torch.tensor(ids)).all())


def test_log_likelihoods_equal_transformers(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    model, tokenizer = CompressLM(str(tmp_path), target="torch", max_length=12), tiny_tokenizer()
    results = model.loglikelihood(asked(("abc", "def"), ("abc ", "d"), ("", "ab")))
    ids = [tokenizer(text)["input_ids"] for text in ("abc", "def", " d", "ab")]
    begin = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    expected = [log_likelihood(tmp_path, *pair) for pair in ((ids[0], ids[1]), (ids[0], ids[2]), (begin, ids[3]))]
    assert results == [(pytest.approx(value, rel=1e-5), likely) for value, likely in expected]
    text = tokenizer("abcdefgh" * 4)["input_ids"]
    # Windows of 12 scored tokens, each following the previous one.
    windows = ((begin, text[:12]), (text[11:12], text[12:24]), (text[19:24], text[24:]))
    parts = [log_likelihood(tmp_path, *window) for window in windows]
    assert model.loglikelihood_rolling(asked(("abcdefgh" * 4,))) == [
        pytest.approx(sum(value for value, _ in parts), rel=1e-5)
    ]
    with pytest.raises(InputError, match="leaves no room"):
        model.loglikelihood(asked(("a", "b" * 13)))


def test_harness_evaluates_an_onnx_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lm_eval` runs a custom task; expected values are numpy's probabilities of the same graph."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    artifact = tmp_path / "artifact"
    decoder, tokenizer = write_decoder(artifact), tiny_tokenizer()
    rows = [dict(zip(("question", "choices", "answer"), question_row, strict=True)) for question_row in QUESTIONS]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "words.yaml").write_text(TASK.replace("DATA", str(tmp_path / "data.jsonl")))
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    evaluated = simple_evaluate(
        model="compress", model_args=f"path={artifact}", tasks=["words"], task_manager=manager, bootstrap_iters=0
    )
    right = {"acc,none": 0, "acc_norm,none": 0}
    for question, choices, answer in QUESTIONS:
        scores = []
        for choice in choices:
            context, choice_ids = (tokenizer(text)["input_ids"] for text in (question, f" {choice}"))
            logits = torch.from_numpy(decoder.logits([*context, *choice_ids])).log_softmax(-1).numpy()
            scores.append(sum(logits[len(context) + index - 1, token] for index, token in enumerate(choice_ids)))
        right["acc,none"] += int(np.argmax(scores) == answer)
        right["acc_norm,none"] += int(np.argmax(np.divide(scores, [len(option) for option in choices])) == answer)
    for metric, count in right.items():
        assert evaluated["results"]["words"][metric] == pytest.approx(count / len(QUESTIONS))


def test_generation_is_greedy_up_to_a_stop_string(tmp_path: Path) -> None:
    decoder, tokenizer = write_decoder(tmp_path), tiny_tokenizer()
    model, ids = CompressLM(str(tmp_path)), tokenizer("abc")["input_ids"]
    whole = tokenizer.decode(decoder.continuation(ids, 9), skip_special_tokens=True)
    requests = [("abc", {"until": [], "max_gen_toks": 9}), ("abc", {"until": [whole[4]], "max_gen_toks": 9})]
    assert model.generate_until(asked(*requests)) == [whole, whole.split(whole[4])[0]]
    with pytest.raises(InputError, match="greedy generation"):
        model.generate_until(asked(("abc", {"do_sample": True, "temperature": 0.7})))
