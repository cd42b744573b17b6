"""A model judged beside its own rows: which choice it finds likeliest after a prompt, and human similarities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.data.judged import Question, RatedPairs
from compress.evaluation.evaluate import predict, share_row
from compress.formats.runtimes import get_runtime
from compress.formats.target_profile import Target
from compress.models.processor import load_processor, load_tokenizer
from compress.numerics.correlation import pearson, spearman
from compress.numerics.embeddings import normalized
from compress.numerics.next_token import negative_log_likelihood
from compress.results.measurement import Measurement
from compress.runtimes.decoder import feeder
from compress.tasks.embeddings import EMBEDDING
from compress.tasks.task import Task
from compress.utils.errors import DataError, ModelError
from compress.utils.progress import Progress

_DELIMITER = " "
"""Between prompt and choice, unless either has white space there; it is scored with the choice."""


def choice_scores(
    artifact: Path,
    questions: Sequence[Question],
    target: Target,
    threads: int,
    progress: Progress,
    description: str,
) -> list[list[float]]:
    """log p(choice | prompt) in nats of every choice, by the tokenizer beside the model.

    Raises what opening and running raise, and `DataError` for a choice that has no token of its own.
    """
    tokenizer = load_tokenizer(artifact)
    session = get_runtime(target.runtime).open(artifact, target, threads)
    feed = feeder(session, str(artifact))
    scores: list[list[float]] = []
    for question in progress.track(questions, description, len(questions)):
        scores.append([])
        for choice in question.choices:
            ids, first = _tokens(tokenizer, question.prompt, choice)
            batch = {"input_ids": ids[None], "attention_mask": np.ones_like(ids)[None]}
            logits = session.predict(feed(batch))["logits"][0]
            if len(logits) != len(ids):
                raise ModelError("The model gives logits of the last token alone.", where=str(artifact))
            scores[-1].append(-float(negative_log_likelihood(logits[first - 1 : -1], ids[first:]).sum()))
    return scores


def _tokens(tokenizer: Any, prompt: str, choice: str) -> tuple[np.ndarray, int]:
    """Prompt and choice as ids, and the place of the choice's first token.

    White space at the prompt's end goes to the choice, since most tokenizers begin words with their space.
    """
    bare = prompt.rstrip()
    between = prompt[len(bare) :] or ("" if choice[:1].isspace() else _DELIMITER)
    whole = np.array(tokenizer(bare + between + choice, verbose=False)["input_ids"], dtype=np.int64)
    first = len(tokenizer(bare, verbose=False)["input_ids"])
    if not 1 <= first < len(whole):
        raise DataError(
            f"The choice {choice!r} has no token of its own after {bare!r:.40}.", expected="text that adds tokens"
        )
    return whole, first


def choice_rows(
    questions: Sequence[Question], scores: Sequence[Sequence[float]], model: str, target: str
) -> list[Measurement]:
    """How often the right choice is the likeliest, as it is and by its likelihood a byte, with Wilson intervals.

    The latter doesn't favour short choices (Gao et al., lm-evaluation-harness: acc and acc_norm).
    """
    plain, a_byte = [], []
    for question, found in zip(questions, scores, strict=True):
        sizes = [len(choice.encode()) for choice in question.choices]
        plain.append(float(np.argmax(found) == question.answer))
        a_byte.append(float(np.argmax(np.divide(found, sizes)) == question.answer))
    return [
        share_row("choice_accuracy", plain, model, target),
        share_row("choice_accuracy_normalized", a_byte, model, target),
    ]


def cosines(
    artifact: Path,
    task: Task,
    rated: Sequence[RatedPairs],
    max_length: int,
    target: Target,
    threads: int,
    progress: Progress,
    description: str,
) -> list[list[float]]:
    """Of each set, the cosine of every pair's embeddings. Raises what opening and running raise."""
    import pyarrow as pa

    texts = list(dict.fromkeys(text for part in rated for text in (*part.texts, *part.pairs)))
    place = {text: index for index, text in enumerate(texts)}
    examples = task.encode(pa.table({"text": texts}), load_processor(artifact), None, max_length)
    kept = predict(artifact, task, examples, target, threads, progress, description).kept
    embeddings = normalized(kept[EMBEDDING])
    return [
        np.einsum(
            "nd,nd->n",
            embeddings[[place[text] for text in part.texts]],
            embeddings[[place[text] for text in part.pairs]],
        ).tolist()
        for part in rated
    ]


def similarity_rows(
    rated: Sequence[RatedPairs], found: Sequence[Sequence[float]], model: str, target: str
) -> list[Measurement]:
    """`spearman_NAME` and `pearson_NAME` of each set, with 95% intervals as for independent pairs."""
    rows = []
    for part, values in zip(rated, found, strict=True):
        for name, correlation in (("spearman", spearman), ("pearson", pearson)):
            estimate = correlation(values, part.scores)
            rows.append(
                Measurement(
                    model=model,
                    metric=f"{name}_{part.name}",
                    target=target,
                    unit="",
                    n=len(values),
                    **estimate._asdict(),
                )
            )
    return rows
