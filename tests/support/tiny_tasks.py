"""Tiny models and data of further tasks, over the words of `tiny_run`, and a recipe that runs them."""

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
    """A sentence in which praise and blame are entities of one or two words."""
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
    """A query of praise or blame, and a text that has some of it, or of the other."""
    kind = chance.choice(("good", "bad"))
    relevant = chance.random() < 0.5
    text = [*chance.sample(PLAIN, 4), *chance.sample(POLAR[kind if relevant else ("bad", "good")[kind == "bad"]], 2)]
    chance.shuffle(text)
    query = f"{chance.choice(PLAIN)} {chance.choice(POLAR[kind])}"
    return {"text": query, "pair": " ".join(text), "label": float(relevant)}


def written(chance: random.Random) -> Row:
    """A text whose words repeat, so that one can be told from the others."""
    words = chance.sample(PLAIN, 3)
    return {"text": " ".join(words * 3)}


def asked(chance: random.Random) -> Row:
    """Which words of praise, or of blame, stand in a text."""
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
"""What makes a row of a task, and the ending of transformers' class for it."""


def rows(task: str, seed: int = 0) -> Iterator[tuple[str, list[Row]]]:
    """Splits with different rows each."""
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
    """A model of two layers without a trained head, or with one where ``config`` names its labels."""
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
    """Model, data and recipe in ``folder``; the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model", task)
    for split, split_rows in rows(task):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, split_rows)) + "\n")
    fields = {"max_length": 32, "baseline": "finetune", "benchmark": BENCHMARK, **changes}
    return stage_context.write_recipe(folder, task, (*ROWS,), stages, **fields)
