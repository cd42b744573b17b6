"""Zero-shot evaluations of text models: multiple-choice questions, and similarity of sentences rated by people.

Choices are compared by the log-likelihood of their tokens, as in the lm-evaluation-harness.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.data.judged import Question, RatedPairs
from compress.evaluation.evaluate import embed_texts, open_reader, share_row
from compress.formats.target_profile import Target
from compress.models.processor import load_tokenizer
from compress.numerics.statistics import pearson, spearman
from compress.numerics.token_metrics import negative_log_likelihood
from compress.results.report import Measurement
from compress.tasks.task import Task
from compress.utils.errors import DataError
from compress.utils.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_DELIMITER = " "
"""Text between prompt and choice unless either has white space there. It is scored with the choice."""


def choice_scores(
    artifact: Path, questions: Sequence[Question], target: Target, threads: int, progress: Progress, description: str
) -> list[list[float]]:
    """Return log p(choice | prompt) of every choice in nats.

    Raises the errors of opening and running the model, and `DataError` for a choice without a token of its own.

    Args:
        artifact: Model folder or file.
        questions: Questions with their choices.
        target: Target that runs the model.
        threads: Number of threads.
        progress: Progress display.
        description: Text of the progress bar.
    """
    tokenizer, read = load_tokenizer(artifact), open_reader(artifact, target, threads)
    scores: list[list[float]] = []
    for question in progress.track(questions, description, len(questions)):
        scores.append([])
        for choice in question.choices:
            ids, first = _tokens(tokenizer, question.prompt, choice)
            losses = negative_log_likelihood(read(ids)[first - 1 : -1], ids[first:])
            scores[-1].append(-float(losses.sum()))
    return scores


def _tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, choice: str) -> tuple[np.ndarray, int]:
    """Return prompt and choice as ids, and the position of the choice's first token.

    White space at the end of the prompt belongs to the choice, because most tokenizers begin words with their space.
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
    """Return how often the correct choice is the likeliest, and by likelihood per byte, with Wilson intervals.

    Likelihood per byte doesn't favour short choices (Gao et al., lm-evaluation-harness: acc and acc_norm).

    Args:
        questions: Questions with their choices.
        scores: Score of each choice.
        model: Label of the model.
        target: Name of the target.
    """
    plain, a_byte = [], []
    for question, choice_scores_of_question in zip(questions, scores, strict=True):
        sizes = [len(choice.encode()) for choice in question.choices]
        plain.append(float(np.argmax(choice_scores_of_question) == question.answer))
        a_byte.append(float(np.argmax(np.divide(choice_scores_of_question, sizes)) == question.answer))
    return [
        share_row("choice_accuracy", plain, model, target),
        share_row("choice_accuracy_normalized", a_byte, model, target),
    ]


def pair_cosines(
    artifact: Path,
    task: Task,
    rated: Sequence[RatedPairs],
    max_length: int,
    target: Target,
    threads: int,
    progress: Progress,
    description: str,
) -> list[list[float]]:
    """Return the cosine of the embeddings of every pair, for each set of pairs.

    Raises the errors of opening and running the model.

    Args:
        artifact: Model folder or file.
        task: Task of the model.
        rated: Sets of pairs with ratings.
        max_length: Largest number of tokens of a text.
        target: Target that runs the model.
        threads: Number of threads.
        progress: Progress display.
        description: Text of the progress bar.
    """
    texts = list(dict.fromkeys(text for pairs in rated for text in (*pairs.texts, *pairs.pairs)))
    index_of_text = {text: index for index, text in enumerate(texts)}
    embeddings = embed_texts(artifact, task, texts, max_length, target, threads, progress, description)
    cosines = []
    for pairs in rated:
        sides = (embeddings[[index_of_text[text] for text in side]] for side in (pairs.texts, pairs.pairs))
        cosines.append(np.einsum("nd,nd->n", *sides).tolist())
    return cosines


def similarity_rows(
    rated: Sequence[RatedPairs], cosines: Sequence[Sequence[float]], model: str, target: str
) -> list[Measurement]:
    """Return `spearman_NAME` and `pearson_NAME` of each set, with 95% intervals as for independent pairs.

    Args:
        rated: Sets of pairs with ratings.
        cosines: Cosine of each pair.
        model: Label of the model.
        target: Name of the target.
    """
    rows = []
    for pairs, values in zip(rated, cosines, strict=True):
        for name, correlation in (("spearman", spearman), ("pearson", pearson)):
            fields = {"metric": f"{name}_{pairs.name}", "n": len(values), **correlation(values, pairs.scores)._asdict()}
            rows.append(Measurement(model=model, target=target, unit="", **fields))
    return rows
