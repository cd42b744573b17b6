"""Answers of all tasks except chat and image generation: scores, embeddings, boxes, masks and transcripts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.evaluation.evaluate import artifact_labels
from compress.formats.generation import seq2seq
from compress.formats.generation.speech_recognition import HIDDEN, TRANSCRIPTS, read_rules
from compress.formats.onnx.model import find_graphs
from compress.formats.runtime import Batch, Session
from compress.models.json_file import read_json
from compress.models.processor import load_tokenizer
from compress.models.sentence_modules import MODULES, Normalize, has_modules, read_modules
from compress.numerics.token_metrics import word_errors
from compress.plugins.apps.app_type import Answers, Numbers, Rounding, round_to_float32, sampled
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


class Embeddings(Answers):
    """Embeddings of texts, which the app pools and normalises unless the graph does."""

    plural, field, web = "embeddings", "embedding", "embedding"
    meanings = {LAST_HIDDEN_STATE: "one vector a token", SENTENCE_EMBEDDING: "the finished embedding"}
    # With integers, a text of two tokens came out with a cosine of 0.985 in a page.
    rounding = (Rounding(1e-3, 0.9999), Rounding(0.1, 0.97))

    def find_postprocessing(self, model: Path, outputs: Sequence[TensorRecord]) -> Embed:
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
        if SENTENCE_EMBEDDING in names:
            return Embed(output=SENTENCE_EMBEDDING, pooling=None, normalize=False, dimensions=modules.dimensions)
        if LAST_HIDDEN_STATE not in names:
            raise ModelError(
                f"The model gives {', '.join(names)}.",
                where=str(model),
                expected=f"{SENTENCE_EMBEDDING} or {LAST_HIDDEN_STATE}",
            )
        # Without a finished embedding the app pools the token vectors itself.
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
        fields = {"output": LAST_HIDDEN_STATE, "pooling": mode, "dimensions": modules.dimensions}
        return Embed.model_validate({**fields, "normalize": bool(kinds)})

    def predict(self, session: Session, step: Embed, feed: Batch) -> Numbers:
        """Return the embedding of one input, from vectors [tokens, dimensions] or a finished embedding."""
        embedding: np.ndarray = session.predict(feed)[step.output][0]
        match step.pooling:
            case None:
                embedding = embedding.reshape(-1)
            case "mean":
                embedding = embedding.mean(axis=0)
            case "max":
                embedding = embedding.max(axis=0)
            case _:
                embedding = embedding[0 if step.pooling == "cls" else -1]
        if embedding.shape != (step.dimensions,):
            raise ModelError(
                f"The graph gives an embedding of shape {list(embedding.shape)}.",
                expected=f"{step.dimensions} values",
            )
        return round_to_float32(embedding / np.linalg.norm(embedding) if step.normalize else embedding)


class ImageEmbeddings(Embeddings):
    """Embeddings of images, which the graph pools."""

    meanings = {POOLER_OUTPUT: "the picture's embedding", LAST_HIDDEN_STATE: "one vector a place of the picture"}
    required = frozenset({POOLER_OUTPUT})

    def find_postprocessing(self, model: Path, outputs: Sequence[TensorRecord]) -> Embed:
        """Return the step with the size of the finished embedding."""
        shapes = {entry.name: entry.shape for entry in outputs}
        sizes = [side for side in shapes[POOLER_OUTPUT][1:] if isinstance(side, int)]
        return Embed(output=POOLER_OUTPUT, pooling=None, normalize=False, dimensions=math.prod(sizes))


class Labels(Answers):
    """Scores of the labels for each input."""

    plural, field, web = "scores", "logits", "labels"
    meanings = {LOGITS: "one score a class, in the order of the labels"}
    required = frozenset({LOGITS})
    rounding = (Rounding(1e-3), Rounding(0.05))

    def labels(self, model: Path) -> tuple[str, ...]:
        """Return the labels of the config. Raises `ModelError` if there are none."""
        labels = artifact_labels(model)
        if not labels:
            raise ModelError(
                "The model's config names no labels.",
                where=str(model / "config.json"),
                expected="an id2label with a name for each score",
            )
        return labels

    def find_postprocessing(self, model: Path, outputs: Sequence[TensorRecord]) -> Any:
        """Return the step with the labels of the config."""
        return Softmax(output=LOGITS, labels=self.labels(model))

    def predict(self, session: Session, step: Any, feed: Batch) -> Numbers:
        """Return one score for each label, of a text with labels for its tokens token after token."""
        scores: np.ndarray = session.predict(feed)[step.output][0]
        if scores.ndim != (2 if isinstance(step, Tag) else 1) or scores.shape[-1] != len(step.labels):
            raise ModelError(
                f"The model's config names {len(step.labels)} labels, and the graph gives "
                f"{' x '.join(map(str, scores.shape))} scores.",
                expected="an id2label in config.json with a name for each score",
            )
        return round_to_float32(scores.ravel())


class Tags(Labels):
    """Scores of the labels for each token of a text."""

    web = "tags"
    meanings = {LOGITS: "one score a label, in the order of the labels, for each token"}

    def find_postprocessing(self, model: Path, outputs: Sequence[TensorRecord]) -> Tag:
        """Return the step with the labels of the config."""
        return Tag(output=LOGITS, labels=self.labels(model))


class PairScores(Labels):
    """Relevance of the second text of a pair to the first."""

    web = "relevance"
    meanings = {
        LOGITS: "how relevant the second text is to the first, as a logit",
        RelevanceHead.answer: "logits of the second text not being relevant to the first, and of being so",
    }
    # One of two outputs is enough, which `find_postprocessing` requires.
    required = frozenset()

    def find_postprocessing(self, model: Path, outputs: Sequence[TensorRecord]) -> RelevanceStep:
        """Return the step with the relevance output of the graph. Raises `ModelError` if there is none."""
        name = next((entry.name for entry in outputs if entry.name in self.meanings), None)
        if name is None:
            raise ModelError("The model gives no logits.", where=str(model), expected=" or ".join(self.meanings))
        return RelevanceStep(output=name)

    def predict(self, session: Session, step: RelevanceStep, feed: Batch) -> Numbers:
        """Return one or two logits of a pair."""
        scores: np.ndarray = session.predict(feed)[step.output][0]
        if scores.shape not in ((1,), (2,)):
            raise ModelError(f"The graph gives scores of shape {list(scores.shape)}.", expected="one or two of a pair")
        return round_to_float32(scores)


class Spans(Labels):
    """Scores of the tokens of being the first or last of an answer."""

    web = "span"
    meanings = {
        START: "one score a token: whether an answer begins there",
        END: "one score a token: whether it ends there",
    }
    required = frozenset({START, END})

    def find_postprocessing(self, model: Path, outputs: Sequence[TensorRecord]) -> FindSpan:
        """Return the step, which is that of every model."""
        return FindSpan(output=START, end_output=END, max_tokens=MOST_TOKENS)

    def predict(self, session: Session, step: FindSpan, feed: Batch) -> Numbers:
        """Return the start scores of all tokens, then their end scores."""
        outputs = session.predict(feed)
        return round_to_float32(np.concatenate([outputs[step.output][0], outputs[step.end_output][0]]))


class MaskedTokens(Labels):
    """Scores of some tokens in the place of a mask."""

    web = "unmask"
    meanings = {LOGITS: "one score for each token of the vocabulary, at each place"}

    def find_postprocessing(self, model: Path, outputs: Sequence[TensorRecord]) -> Unmask:
        """Return the step with the tokenizer's mask token."""
        tokenizer = load_tokenizer(model)
        # A few tokens, spread over the vocabulary, keep the self-test small.
        tested_ids = np.unique(np.linspace(0, len(tokenizer) - 1, 64).astype(int)).tolist()
        mask, mask_id = tokenizer.mask_token, tokenizer.mask_token_id
        return Unmask(output=LOGITS, mask=mask, mask_id=mask_id, tested_ids=tuple(tested_ids))

    def predict(self, session: Session, step: Unmask, feed: Batch) -> Numbers:
        """Return the scores of the tested tokens at the first mask."""
        positions = np.flatnonzero(feed["input_ids"][0] == step.mask_id)
        if not len(positions):
            raise ModelError(f"The text has no {step.mask}, or it is cut off.", expected="a mask where a word is asked")
        # Scores at other positions are not part of the answer.
        scores: np.ndarray = session.predict(feed)[step.output][0, positions[0]]
        return round_to_float32(scores[list(step.tested_ids)])


class Boxes(Labels):
    """Scores and boxes of detected objects."""

    web = "boxes"
    meanings = {
        LOGITS: "for each query one score a class, in the order of the labels; `chances: softmax` has one for nothing",
        BOXES_OUTPUT: "for each query its box: centre, width and height in shares of the picture",
    }
    required = frozenset({LOGITS, BOXES_OUTPUT})

    def find_postprocessing(self, model: Path, outputs: Sequence[TensorRecord]) -> FindBoxes:
        """Return the step with the labels of the config and, by the model type, whether a last class means nothing."""
        activation = "sigmoid" if is_separate(read_json(model / "config.json")) else "softmax"
        return FindBoxes(chances=activation, output=LOGITS, boxes_output=BOXES_OUTPUT, labels=self.labels(model))

    def predict(self, session: Session, step: FindBoxes, feed: Batch) -> Numbers:
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


class Masks(Labels):
    """Scores of the classes on a grid over an image."""

    web = "masks"
    meanings = {LOGITS: "one score a class, in the order of the labels, for each place of a grid"}

    def find_postprocessing(self, model: Path, outputs: Sequence[TensorRecord]) -> Segment:
        """Return the step with the size of the output grid. Raises `ModelError` for a grid without a fixed size."""
        labels = self.labels(model)
        (shape,) = (entry.shape for entry in outputs if entry.name == LOGITS)
        if len(shape) != 4 or shape[1] != len(labels) or not all(isinstance(side, int) for side in shape[2:]):
            raise ModelError(
                f"The graph gives scores of shape {list(shape)}.",
                where=str(model),
                expected=f"[batch, {len(labels)}, height, width], as the config names {len(labels)} labels",
            )
        return Segment(output=LOGITS, labels=labels, height=int(shape[2]), width=int(shape[3]))

    def predict(self, session: Session, step: Segment, feed: Batch) -> Numbers:
        """Return some of the scores, which are enough."""
        return sampled(session.predict(feed)[step.output][0])


def decoding_files(model: Path) -> dict[str, str]:
    """Return the paths of the decoder and the tokenizer in a bundle."""
    _, decoder = find_graphs(model)
    return {
        "decoder": f"{MODEL_FOLDER}/{decoder.relative_to(model).as_posix()}",
        "tokenizer": f"{MODEL_FOLDER}/tokenizer.json",
    }


class Transcripts(Answers):
    """Texts that are said in recordings."""

    plural, field, web = "transcripts", "transcript", "transcript"
    meanings = {HIDDEN: "what the decoder reads of the recording"}
    required = frozenset({HIDDEN})
    # The tolerance is a share of the words. With integers a token that was nearly as likely may come first.
    rounding = (Rounding(0.01), Rounding(0.2))
    text_output = TRANSCRIPTS

    def find_postprocessing(self, model: Path, outputs: Sequence[TensorRecord]) -> Any:
        """Return the step for greedy decoding with the token rules of the generation config."""
        rules = read_rules(model)
        return Transcribe(
            output=HIDDEN,
            prompt_ids=rules.prompt,
            end_ids=tuple(sorted(rules.ends)),
            never_ids=tuple(rules.never.tolist()),
            not_first_ids=tuple(rules.not_first.tolist()),
            max_length=rules.longest,
            **decoding_files(model),
        )

    def predict(self, session: Session, step: Any, feed: Batch) -> str:
        """Return the text."""
        return str(session.predict(feed)[self.text_output][0])

    def span(self, answers: Sequence[str]) -> float:
        """Return 1, since the difference of two texts is a share itself."""
        return 1.0

    def difference(self, answer: str, expected: str) -> float:
        """Return the word error rate."""
        return word_errors(expected.split(), answer.split()) / max(1, len(expected.split()))

    def shown(self, answer: str) -> str:
        """Return a text in quotes."""
        return repr(answer)


class WrittenTexts(Transcripts):
    """Texts that a model writes of other texts."""

    plural, field = "texts", "written"
    meanings = {seq2seq.HIDDEN: "what the decoder reads of the text"}
    text_output = seq2seq.TEXTS

    def find_postprocessing(self, model: Path, outputs: Sequence[TensorRecord]) -> Rewrite:
        """Return the step for greedy decoding with the token rules of the generation config.

        Raises:
            ModelError: The model needs beam search or penalties.
        """
        rules = seq2seq.read_rules(model)
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
            prompt_ids=(rules.start,) if rules.first is None else (rules.start, rules.first),
            end_ids=rules.ends,
            never_ids=rules.never,
            last_ids=rules.last,
            max_length=rules.longest,
            **decoding_files(model),
        )
