"""Answers of all tasks except chat and image generation: scores, embeddings, boxes, masks and transcripts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from compress.evaluation.evaluate import artifact_labels
from compress.formats.generation import seq2seq
from compress.formats.generation.speech_recognition import HIDDEN, TRANSCRIPTS, read_rules
from compress.formats.onnx.model import find_graphs
from compress.formats.runtime import Batch, Session
from compress.models.json_file import read_json
from compress.models.processor import load_tokenizer
from compress.models.sentence_modules import MODULES, Normalize, SentenceModules, has_modules, read_modules
from compress.numerics.token_metrics import word_errors
from compress.plugins.apps.app_type import Answers, Numbers, Rounding, round_to_float32
from compress.plugins.apps.image import sampled
from compress.plugins.apps.manifest import MODEL_FOLDER, TensorRecord
from compress.plugins.apps.postprocess import (
    POOLED,
    Embed,
    FindBoxes,
    FindSpan,
    RelevanceStep,
    Rewrite,
    Segment,
    Softmax,
    Tag,
    Transcribe,
    Unmask,
)
from compress.tasks.image_feature_extraction import POOLED as POOLER_OUTPUT
from compress.tasks.object_detection import BOXES as BOXES_OUTPUT
from compress.tasks.object_detection import is_separate
from compress.tasks.question_answering import END, START
from compress.tasks.spans import MOST_TOKENS
from compress.tasks.task import LAST_HIDDEN_STATE, LOGITS, SENTENCE_EMBEDDING
from compress.tasks.text_ranking import Relevance as RelevanceHead
from compress.utils.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def _find_pooling(model: Path, outputs: Sequence[TensorRecord]) -> Embed:
    """Return the step with the pooling and normalisation of `modules.json`, unless the graph contains them.

    Raises:
        ModelError: The modules are missing or unsupported.
    """
    if not has_modules(model):
        raise ModelError(
            f"There is no {MODULES}, which says how the vectors of a text's tokens become one.",
            where=str(model),
            hint="export the model with `compress`, or save it with sentence-transformers",
        )
    modules, names = read_modules(model), [entry.name for entry in outputs]
    if not {SENTENCE_EMBEDDING, LAST_HIDDEN_STATE} & set(names):
        raise ModelError(
            f"The model gives {', '.join(names)}.",
            where=str(model),
            expected=f"{SENTENCE_EMBEDDING} or {LAST_HIDDEN_STATE}",
        )
    fields = {"output": SENTENCE_EMBEDDING, "pooling": None, "normalize": False, "dimensions": modules.dimensions}
    # Without a finished embedding the app pools the token vectors itself.
    if SENTENCE_EMBEDDING not in names:
        mode, normalize = _simple(modules, model)
        fields |= {"output": LAST_HIDDEN_STATE, "pooling": mode, "normalize": normalize}
    return Embed.model_validate(fields)


def _predict_embedding(session: Session, step: Embed, feed: Batch, known: Numbers) -> Numbers:
    """Return the embedding of one input."""
    embedding = _pooled(session.predict(feed)[step.output][0], step)
    if embedding.shape != (step.dimensions,):
        raise ModelError(
            f"The graph gives an embedding of shape {list(embedding.shape)}.",
            expected=f"{step.dimensions} values",
        )
    return round_to_float32(embedding / np.linalg.norm(embedding) if step.normalize else embedding)


def _simple(modules: SentenceModules, model: Path) -> tuple[str, bool]:
    """Return the pooling mode, and True if a normalisation follows. Raises `ModelError` for other modules."""
    [mode, *more] = modules.modes
    kinds = [type(step) for step in modules.steps]
    if more or mode not in POOLED or kinds not in ([], [Normalize]):
        steps = ", ".join((f"pooling by {' and '.join(modules.modes)}", *(kind.__name__ for kind in kinds)))
        raise ModelError(
            f"An app would have to compute what follows the graph: {steps}.",
            where=str(model / MODULES),
            expected=f"pooling by one of {', '.join(POOLED)}, then perhaps Normalize",
            hint="onnx: {sentence_embedding: true} has the graph compute it, for a mean or the first token",
        )
    return mode, bool(kinds)


def _pooled(values: np.ndarray, step: Embed) -> np.ndarray:
    """Pool vectors [tokens, dimensions], or flatten a finished embedding."""
    if step.pooling is None:
        return values.reshape(-1)
    if step.pooling == "mean":
        return cast(np.ndarray, values.mean(axis=0))
    return cast(np.ndarray, values.max(axis=0) if step.pooling == "max" else values[0 if step.pooling == "cls" else -1])


EMBEDDINGS = Answers(
    plural="embeddings",
    field="embedding",
    folder="embedding",
    meanings={LAST_HIDDEN_STATE: "one vector a token", SENTENCE_EMBEDDING: "the finished embedding"},
    # With integers, a text of two tokens came out with a cosine of 0.985 in a page.
    rounding=(Rounding(1e-3, 0.9999), Rounding(0.1, 0.97)),
    find_postprocessing=_find_pooling,
    predict=_predict_embedding,
)


def _find_pooled(model: Path, outputs: Sequence[TensorRecord]) -> Embed:
    """Return the step for an image embedding, which the graph pools."""
    shapes = {entry.name: entry.shape for entry in outputs}
    sizes = [side for side in shapes[POOLER_OUTPUT][1:] if isinstance(side, int)]
    return Embed(output=POOLER_OUTPUT, pooling=None, normalize=False, dimensions=math.prod(sizes))


IMAGE_EMBEDDINGS = replace(
    EMBEDDINGS,
    meanings={POOLER_OUTPUT: "the picture's embedding", LAST_HIDDEN_STATE: "one vector a place of the picture"},
    required=frozenset({POOLER_OUTPUT}),
    find_postprocessing=_find_pooled,
)


def _find_labels(model: Path, outputs: Sequence[TensorRecord]) -> Softmax:
    """Return the step with the labels of the config."""
    labels = artifact_labels(model)
    if not labels:
        raise ModelError(
            "The model's config names no labels.",
            where=str(model / "config.json"),
            expected="an id2label with a name for each score",
        )
    return Softmax(output=LOGITS, labels=labels)


def _predict_scores(session: Session, step: Softmax, feed: Batch, known: Numbers) -> Numbers:
    """Return one score for each label."""
    scores: np.ndarray = session.predict(feed)[step.output][0]
    if len(scores) != len(step.labels):
        raise ModelError(
            f"The model's config names {len(step.labels)} labels, and the graph gives {len(scores)} scores.",
            expected="an id2label in config.json with a name for each score",
        )
    return round_to_float32(scores)


LABELS = Answers(
    plural="scores",
    field="logits",
    folder="labels",
    meanings={LOGITS: "one score a class, in the order of the labels"},
    required=frozenset({LOGITS}),
    rounding=(Rounding(1e-3), Rounding(0.05)),
    find_postprocessing=_find_labels,
    predict=_predict_scores,
)


_TRIED = 64
_OF_PAIRS: Mapping[str, str] = {
    LOGITS: "how relevant the second text is to the first, as a logit",
    RelevanceHead.answer: "logits of the second text not being relevant to the first, and of being so",
}


def _predict_tags(session: Session, step: Tag, feed: Batch, known: Numbers) -> Numbers:
    """Return one score for each label of each token, token after token."""
    scores: np.ndarray = session.predict(feed)[step.output][0]
    if scores.ndim != 2 or scores.shape[1] != len(step.labels):
        raise ModelError(
            f"The model's config names {len(step.labels)} labels, and the graph gives {list(scores.shape)} scores.",
            expected="an id2label in config.json with a name for each score of a token",
        )
    return round_to_float32(scores.ravel())


def _find_relevance(model: Path, outputs: Sequence[TensorRecord]) -> RelevanceStep:
    """Return the step with the relevance output of the graph. Raises `ModelError` if there is none."""
    names = [entry.name for entry in outputs if entry.name in _OF_PAIRS]
    if not names:
        raise ModelError("The model gives no logits.", where=str(model), expected=" or ".join(_OF_PAIRS))
    return RelevanceStep(output=names[0])


def _predict_relevance(session: Session, step: RelevanceStep, feed: Batch, known: Numbers) -> Numbers:
    """Return one or two logits of a pair."""
    scores: np.ndarray = session.predict(feed)[step.output][0]
    if scores.shape not in ((1,), (2,)):
        raise ModelError(f"The graph gives scores of shape {list(scores.shape)}.", expected="one or two of a pair")
    return round_to_float32(scores)


def _predict_span(session: Session, step: FindSpan, feed: Batch, known: Numbers) -> Numbers:
    """Return the start scores of all tokens, then their end scores."""
    outputs = session.predict(feed)
    return round_to_float32(np.concatenate([outputs[step.output][0], outputs[step.end_output][0]]))


def _find_mask(model: Path, outputs: Sequence[TensorRecord]) -> Unmask:
    """Return the step with the tokenizer's mask token."""
    # A few tokens, spread over the vocabulary, keep the self-test small.
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(model)
    tested_ids = np.unique(np.linspace(0, len(tokenizer) - 1, _TRIED).astype(int)).tolist()
    return Unmask(
        output=LOGITS, mask=tokenizer.mask_token, mask_id=tokenizer.mask_token_id, tested_ids=tuple(tested_ids)
    )


def _predict_masked(session: Session, step: Unmask, feed: Batch, known: Numbers) -> Numbers:
    """Return the scores of the tested tokens at the first mask."""
    # Scores at other positions are not part of the answer.
    positions = np.flatnonzero(feed["input_ids"][0] == step.mask_id)
    if not len(positions):
        raise ModelError(f"The text has no {step.mask}, or it is cut off.", expected="a mask where a word is asked")
    scores: np.ndarray = session.predict(feed)[step.output][0, positions[0]]
    return round_to_float32(scores[list(step.tested_ids)])


TAGS = replace(
    LABELS,
    folder="tags",
    meanings={LOGITS: "one score a label, in the order of the labels, for each token"},
    find_postprocessing=lambda model, outputs: Tag(
        output=LOGITS, labels=LABELS.find_postprocessing(model, outputs).labels
    ),
    predict=_predict_tags,
)
# One of two outputs is enough, and `_find_relevance` requires it.
RELEVANCE = replace(
    LABELS,
    folder="relevance",
    meanings=_OF_PAIRS,
    required=frozenset(),
    find_postprocessing=_find_relevance,
    predict=_predict_relevance,
)
SPANS = replace(
    LABELS,
    folder="span",
    meanings={
        START: "one score a token: whether an answer begins there",
        END: "one score a token: whether it ends there",
    },
    required=frozenset({START, END}),
    find_postprocessing=lambda model, outputs: FindSpan(output=START, end_output=END, max_tokens=MOST_TOKENS),
    predict=_predict_span,
)
MASKED = replace(
    LABELS,
    folder="unmask",
    meanings={LOGITS: "one score for each token of the vocabulary, at each place"},
    find_postprocessing=_find_mask,
    predict=_predict_masked,
)


def _find_boxes(model: Path, outputs: Sequence[TensorRecord]) -> FindBoxes:
    """Return the step with the labels of the config. The model type decides whether a last class means no object."""
    labels = LABELS.find_postprocessing(model, outputs).labels
    activation = "sigmoid" if is_separate(read_json(model / "config.json")) else "softmax"
    return FindBoxes(chances=activation, output=LOGITS, boxes_output=BOXES_OUTPUT, labels=labels)


def _predict_boxes(session: Session, step: FindBoxes, feed: Batch, known: Numbers) -> Numbers:
    """Return some of the scores and boxes of all queries.

    Independent queries have no order, and rounding may exchange them. Each column is sorted for this reason.
    """
    outputs = session.predict(feed)
    scores, boxes = outputs[step.output][0], outputs[step.boxes_output][0]
    independent = step.chances == "sigmoid"
    # With softmax one more score stands for no object.
    if scores.shape != (len(boxes), len(step.labels) + (not independent)) or boxes.shape[1:] != (4,):
        raise ModelError(
            f"The graph gives scores {list(scores.shape)} and boxes {list(boxes.shape)}.",
            expected=f"{len(step.labels)} labels{'' if independent else ' and none'} for each query, and a box",
        )
    if independent:
        scores, boxes = np.sort(scores, axis=0), np.sort(boxes, axis=0)
    return sampled(np.concatenate([scores.ravel(), boxes.ravel()]))


def _find_masks(model: Path, outputs: Sequence[TensorRecord]) -> Segment:
    """Return the step with the size of the output grid.

    Raises:
        ModelError: The graph's grid has no fixed size.
    """
    labels = LABELS.find_postprocessing(model, outputs).labels
    (shape,) = (entry.shape for entry in outputs if entry.name == LOGITS)
    if len(shape) != 4 or shape[1] != len(labels) or not all(isinstance(side, int) for side in shape[2:]):
        raise ModelError(
            f"The graph gives scores of shape {list(shape)}.",
            where=str(model),
            expected=f"[batch, {len(labels)}, height, width], as the config names {len(labels)} labels",
        )
    return Segment(output=LOGITS, labels=labels, height=int(shape[2]), width=int(shape[3]))


BOXES = replace(
    LABELS,
    folder="boxes",
    meanings={
        LOGITS: "for each query one score a class, in the order of the labels; `chances: softmax` has one for nothing",
        BOXES_OUTPUT: "for each query its box: centre, width and height in shares of the picture",
    },
    required=frozenset({LOGITS, BOXES_OUTPUT}),
    find_postprocessing=_find_boxes,
    predict=_predict_boxes,
)
MASKS: Answers = replace(
    LABELS,
    folder="masks",
    meanings={LOGITS: "one score a class, in the order of the labels, for each place of a grid"},
    find_postprocessing=_find_masks,
    # Some of the scores are enough.
    predict=lambda session, step, feed, known: sampled(session.predict(feed)[step.output][0]),
)


def _find_transcription(model: Path, outputs: Sequence[TensorRecord]) -> Transcribe:
    """Return the step for greedy decoding with the token rules of the generation config."""
    rules, (_, decoder) = read_rules(model), find_graphs(model)
    return Transcribe(
        output=HIDDEN,
        decoder=f"{MODEL_FOLDER}/{decoder.relative_to(model).as_posix()}",
        tokenizer=f"{MODEL_FOLDER}/tokenizer.json",
        prompt_ids=rules.prompt,
        end_ids=tuple(sorted(rules.ends)),
        never_ids=tuple(rules.never.tolist()),
        not_first_ids=tuple(rules.not_first.tolist()),
        max_length=rules.longest,
    )


def _word_error_rate(predicted: str, known: str) -> float:
    """Return the word error rate."""
    return word_errors(known.split(), predicted.split()) / max(1, len(known.split()))


TRANSCRIPTS_OF_SPEECH = Answers(
    plural="transcripts",
    field="transcript",
    folder="transcript",
    meanings={HIDDEN: "what the decoder reads of the recording"},
    required=frozenset({HIDDEN}),
    # The tolerance is a share of the words. With integers a token that was nearly as likely may come first.
    rounding=(Rounding(0.01), Rounding(0.2)),
    find_postprocessing=_find_transcription,
    predict=lambda session, step, feed, known: str(session.predict(feed)[TRANSCRIPTS][0]),
    span=lambda transcripts: 1.0,
    difference=_word_error_rate,
    shown=repr,
)


def _find_rewrite(model: Path, outputs: Sequence[TensorRecord]) -> Rewrite:
    """Return the step for greedy decoding with the token rules of the generation config.

    Raises:
        ModelError: The model needs beam search or penalties.
    """
    rules, (_, decoder) = seq2seq.read_rules(model), find_graphs(model)
    # The page decodes greedily. Beam search or penalties would give another text.
    if rules.beams > 1 or rules.no_repeat or rules.shortest > 1:
        raise ModelError(
            "The model writes by beam search, or with penalties, which an app does not.",
            where=str(model / "generation_config.json"),
            expected="the likeliest token each time: no num_beams above 1, no_repeat_ngram_size or min_length",
            hint="set them so in generation_config.json, and evaluate the model anew: it writes otherwise then",
        )
    return Rewrite(
        output=seq2seq.HIDDEN,
        decoder=f"{MODEL_FOLDER}/{decoder.relative_to(model).as_posix()}",
        tokenizer=f"{MODEL_FOLDER}/tokenizer.json",
        prompt_ids=(rules.start,) if rules.first is None else (rules.start, rules.first),
        end_ids=rules.ends,
        never_ids=rules.never,
        last_ids=rules.last,
        max_length=rules.longest,
    )


WRITTEN_TEXTS = replace(
    TRANSCRIPTS_OF_SPEECH,
    plural="texts",
    field="written",
    meanings={seq2seq.HIDDEN: "what the decoder reads of the text"},
    find_postprocessing=_find_rewrite,
    predict=lambda session, step, feed, known: str(session.predict(feed)[seq2seq.TEXTS][0]),
)
