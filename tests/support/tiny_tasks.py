"""Tiny models and data of further tasks over the vocabulary of `tiny_run`, and a recipe that runs them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import stage_context
import torch
import transformers
from tiny_run import BENCHMARK, PLAIN, POLAR, tokenizer

ROWS = {"train": 120, "validation": 40, "test": 60}
Row = dict[str, Any]


def tagged(chance: random.Random) -> Row:
    """Return a sentence in which positive and negative phrases of one or two words are tagged as entities."""
    words: list[str] = []
    tags: list[str] = []
    for _ in range(chance.randrange(2, 5)):
        more = chance.sample(PLAIN, chance.randrange(1, 3))
        kind = chance.choice(("good", "bad"))
        named = chance.sample(POLAR[kind], chance.randrange(1, 3))
        words += [*more, *named]
        tags += ["O"] * len(more) + [f"{'I' if index else 'B'}-{kind.upper()}" for index in range(len(named))]
    return {"tokens": words, "tags": tags}


def judged(chance: random.Random) -> Row:
    """Return a positive or negative query and a text, with label 1.0 if their sentiments agree and 0.0 otherwise."""
    kind = chance.choice(("good", "bad"))
    relevant = chance.random() < 0.5
    text = [*chance.sample(PLAIN, 4), *chance.sample(POLAR[kind if relevant else ("bad", "good")[kind == "bad"]], 2)]
    chance.shuffle(text)
    query = f"{chance.choice(PLAIN)} {chance.choice(POLAR[kind])}"
    return {"text": query, "pair": " ".join(text), "label": float(relevant)}


def written(chance: random.Random) -> Row:
    """Return a text that repeats three words, so that a masked word can be predicted from the others."""
    words = chance.sample(PLAIN, 3)
    return {"text": " ".join(words * 3)}


def asked(chance: random.Random) -> Row:
    """Return a question for the positive or the negative words of a context, with their position."""
    kind, other = chance.sample(("good", "bad"), 2)
    answer = " ".join(chance.sample(POLAR[kind], chance.randrange(1, 3)))
    parts = [" ".join(chance.sample(PLAIN, 4)), answer, " ".join(chance.sample(PLAIN, 3)), chance.choice(POLAR[other])]
    context = " ".join(parts)
    answers = {"text": [answer], "answer_start": [context.index(answer)]}
    return {"question": f"the {kind[0]} film", "context": context, "answers": answers}


MAKERS: dict[str, tuple[Callable[[random.Random], Row], str]] = {
    "token-classification": (tagged, "TokenClassification"),
    "text-ranking": (judged, "SequenceClassification"),
    "fill-mask": (written, "MaskedLM"),
    "question-answering": (asked, "QuestionAnswering"),
}
"""Task -> (function that returns one row, suffix of the transformers model class)."""


def rows(task: str, seed: int = 0) -> Iterator[tuple[str, list[Row]]]:
    """Yield each split with its rows; no row occurs twice."""
    chance, seen = random.Random(seed), set()
    for split, count in ROWS.items():
        task_rows: list[Row] = []
        while len(task_rows) < count:
            row = MAKERS[task][0](chance)
            if (key := json.dumps(list(row.values())[: max(1, len(row) - 1)])) not in seen:
                seen.add(key)
                task_rows.append(row)
        yield split, task_rows


def write_model(folder: Path, task: str, architecture: str = "Bert", **config: Any) -> Any:
    """Write a two-layer model and its tokenizer, without a task head unless ``config`` gives its labels."""
    word_tokenizer = tokenizer()
    shape = transformers.BertConfig(
        vocab_size=len(word_tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
        initializer_range=0.1,
        **config,
    )
    torch.manual_seed(0)
    ending = f"For{MAKERS[task][1]}" if config else "Model"
    module = getattr(transformers, f"{architecture}{ending}")(shape).eval()
    module.save_pretrained(folder)
    word_tokenizer.model_max_length = 64
    word_tokenizer.save_pretrained(folder)
    return module


def write_all(folder: Path, task: str, stages: list[Any], **changes: Any) -> Path:
    """Write model, data and recipe into ``folder`` and return the path of the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model", task)
    for split, split_rows in rows(task):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, split_rows)) + "\n")
    fields = {"max_length": 32, "baseline": "finetune", "benchmark": BENCHMARK, **changes}
    return stage_context.write_recipe(folder, task, (*ROWS,), stages, **fields)
