"""Comparison of an evaluation's predictions with those of transformers' pipelines, for each task."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import soundfile
import torch
import transformers
from PIL import Image

from compress.evaluation.evaluate import artifact_labels
from compress.formats.generation.decoder import Decoder
from compress.formats.runtime import get_runtime
from compress.formats.targets import TARGETS
from compress.models.processor import load_processor, load_tokenizer
from compress.tasks.task import CollectedOutputs, Examples, Task
from compress.tasks.tokens import by_length, keep_all

TARGET = TARGETS["cpu"]
_PARAGRAPHS, _BEGINNING, _CONTINUED = 200, 100, 8
"""Text generation: number of paragraphs, characters of each in the prompt, and generated tokens."""


class Pair(NamedTuple):
    """Whether both predictions for an example are the same, and the difference of their scores, if there are any."""

    same: bool
    difference: float | None = None


@dataclass(frozen=True)
class Case:
    """The rows of a task, the ``graph`` that our runtime evaluates, and the ``folder`` that transformers opens."""

    task: Task
    folder: Path
    graph: Path
    rows: pa.Table
    examples: Examples

    @property
    def collected(self) -> CollectedOutputs:
        """What the task collects of our outputs, by example."""
        return self._predictions[0]

    @property
    def outputs(self) -> Sequence[Mapping[str, np.ndarray]]:
        """The outputs of the graph for each example."""
        return self._predictions[1]

    @cached_property
    def _predictions(self) -> tuple[CollectedOutputs, Sequence[Mapping[str, np.ndarray]]]:
        session = get_runtime(TARGET.runtime).open(self.graph, TARGET, 1)
        outputs: list[Mapping[str, np.ndarray]] = [{}] * len(self.examples)

        def predict(indices: list[int]) -> dict[str, np.ndarray]:
            batch_outputs = session.predict(self.examples.batch(indices))
            for position, row in enumerate(indices):
                outputs[row] = {
                    key: array[position] for key, array in batch_outputs.items() if len(array) == len(indices)
                }
            return batch_outputs

        batches = by_length(self.examples, self.task.batch_size)
        return keep_all(self.task, self.examples, batches, predict), outputs

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The model's classes."""
        labels = artifact_labels(self.folder)
        assert labels is not None, "a classifier has labels"
        return labels

    def pipeline(self, kind: str | None = None, **options: Any) -> Any:
        """Return transformers' pipeline for this ``kind`` of task, in fp32."""
        return transformers.pipeline(
            kind or self.task.name, model=str(self.folder), dtype=torch.float32, device="cpu", **options
        )

    def images(self) -> Iterator[Image.Image]:
        """Return the image of each row, in RGB."""
        return (Image.open(io.BytesIO(value["bytes"])).convert("RGB") for value in self.rows["image"].to_pylist())

    def image_pipeline(self) -> Any:
        """Return the pipeline; images are converted back to gray levels if the model has one channel."""
        pipeline = self.pipeline(image_processor=load_processor(self.folder))
        image_processor = getattr(pipeline.image_processor, "image_processor", pipeline.image_processor)
        pipeline.image_processor = (
            _GrayProcessor(image_processor) if len(image_processor.image_mean) == 1 else image_processor
        )
        return pipeline

    def sounds(self) -> Iterator[dict[str, Any]]:
        """Yield the waveform of each row."""
        for value in self.rows["audio"].to_pylist():
            samples, rate = soundfile.read(io.BytesIO(value["bytes"]), dtype="float32")
            yield {"raw": samples, "sampling_rate": rate}


@dataclass(frozen=True)
class _GrayProcessor:
    """An image processor of one channel that converts RGB images."""

    processor: Any

    def __call__(self, images: Any, **options: Any) -> Any:
        batch = images if isinstance(images, list) else [images]
        return self.processor([image.convert("L") for image in batch], **options)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities over the last axis."""
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: np.ndarray = shares / shares.sum(axis=-1, keepdims=True)
    return probabilities


def _scores(results: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> np.ndarray:
    """Return the scores of a pipeline in the order of ``labels``."""
    by_label = {score["label"]: score["score"] for score in results}
    return np.array([by_label[label] for label in labels])


def _classes(case: Case, results: Iterator[Sequence[Mapping[str, Any]]]) -> Iterator[Pair]:
    for logits, answer in zip(case.collected["logits"], results, strict=True):
        probabilities = softmax(logits)
        yield Pair(
            case.labels[probabilities.argmax()] == answer[0]["label"],
            np.abs(probabilities - _scores(answer, case.labels)).max(),
        )


def text_classes(case: Case) -> Iterator[Pair]:
    """Compare the most likely class of each text, and the probability of every class."""
    pipeline = case.pipeline()
    yield from _classes(case, (pipeline(text, top_k=None) for text in case.rows["text"].to_pylist()))


def image_classes(case: Case) -> Iterator[Pair]:
    """Compare the most likely class of each image, and the probability of every class."""
    pipeline = case.image_pipeline()
    yield from _classes(case, (pipeline(image, top_k=len(case.labels)) for image in case.images()))


def audio_classes(case: Case) -> Iterator[Pair]:
    """Compare the most likely class of each recording, and the probability of every class."""
    pipeline = case.pipeline()
    yield from _classes(case, (pipeline(sound, top_k=len(case.labels)) for sound in case.sounds()))


def token_labels(case: Case) -> Iterator[Pair]:
    """Compare the label of each word's first token, and its probability."""
    pipeline = case.pipeline(ignore_labels=[])
    assert case.examples.labels is not None
    for row, text in enumerate(case.rows["tokens"].to_pylist()):
        theirs = {token["index"]: token for token in pipeline(text)}
        real = np.flatnonzero(case.examples.labels[row] >= 0)
        probabilities = softmax(case.outputs[row]["logits"][real])
        labels = case.collected["found"][row].split(" ")
        tokens = [theirs[position] for position in real.tolist()]
        scores = np.array([token["score"] for token in tokens])
        yield Pair(labels == [token["entity"] for token in tokens], np.abs(probabilities.max(axis=-1) - scores).max())


def relevance(case: Case) -> Iterator[Pair]:
    """Compare whether each pair is relevant, and its score."""
    pipeline = case.pipeline("text-classification", function_to_apply="none")
    pairs = zip(case.collected["scores"], case.rows["text"].to_pylist(), case.rows["pair"].to_pylist(), strict=True)
    for score, text, pair in pairs:
        theirs = pipeline({"text": text, "text_pair": pair})["score"]
        yield Pair((score > 0) == (theirs > 0), abs(score - theirs))


def masked_tokens(case: Case) -> Iterator[Pair]:
    """Compare the most likely token for each mask, and its probability.

    Texts that the pipeline splits into other tokens, or that are too long for it, are skipped.
    """
    pipeline = case.pipeline(top_k=1)
    tokenizer = load_tokenizer(case.folder)
    for row, example in enumerate(case.examples.inputs):
        ids = example["input_ids"]
        positions = np.flatnonzero(ids == tokenizer.mask_token_id)
        text = _with_masks(tokenizer, case.rows["text"][row].as_py(), positions)
        if not np.array_equal(tokenizer(text)["input_ids"], ids):
            continue
        answer = pipeline(text)
        theirs = [candidate[0] if isinstance(candidate, list) else candidate for candidate in answer]
        probabilities = softmax(case.outputs[row]["logits"][positions])
        first = case.collected["first"][row][: len(positions)]
        same = first.tolist() == [candidate["token"] for candidate in theirs]
        yield Pair(same, np.abs(probabilities.max(axis=-1) - [candidate["score"] for candidate in theirs]).max())


def _with_masks(tokenizer: Any, text: str, positions: np.ndarray) -> str:
    """Return ``text`` with the mask token in place of the tokens at ``positions``."""
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    for position in sorted(positions.tolist(), reverse=True):
        start, end = offsets[position]
        text = text[:start] + tokenizer.mask_token + text[end:]
    return text


def spans(case: Case) -> Iterator[Pair]:
    """Compare the answer to each question, and the sum of its logits.

    transformers 5 has no such pipeline, so its `document-question-answering` selects the span. An answer has up to 30
    tokens, as in SQuAD; the default there is 15.
    """
    from transformers.pipelines.document_question_answering import select_starts_ends

    tokenizer = load_tokenizer(case.folder)
    module = transformers.AutoModelForQuestionAnswering.from_pretrained(case.folder).float().eval()
    for row, (question, context) in enumerate(
        zip(case.rows["question"].to_pylist(), case.rows["context"].to_pylist(), strict=True)
    ):
        given = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
        offsets = given.pop("offset_mapping")[0].tolist()
        with torch.inference_mode():
            outputs = module(**given)
        outside = np.array([part != 1 for part in given.sequence_ids(0)])[None]
        start, end = (logits.numpy() for logits in (outputs.start_logits, outputs.end_logits))
        starts, ends, _, _ = select_starts_ends(
            start, end, outside, given["attention_mask"].numpy(), 1e6, 1, False, max_answer_len=30
        )
        text = context[offsets[starts[0]][0] : offsets[ends[0]][1]]
        score = start[0, starts[0]] + end[0, ends[0]]
        yield Pair(case.collected["answer"][row] == text, abs(case.collected["score"][row] - score))


def generated_texts(case: Case) -> Iterator[Pair]:
    """Compare the generated texts, by transformers' `generate`, since version 5 has no such pipeline."""
    tokenizer = load_tokenizer(case.folder)
    module = transformers.AutoModelForSeq2SeqLM.from_pretrained(case.folder, dtype=torch.float32).eval()
    rows = zip(case.collected["texts"], case.rows["text"].to_pylist(), case.examples.inputs, strict=True)
    for our_text, text, example in rows:
        # Truncate to the recipe's max_length.
        given = tokenizer(text, truncation=True, max_length=len(example["input_ids"]), return_tensors="pt")
        with torch.inference_mode():
            output_ids = module.generate(given["input_ids"], attention_mask=given["attention_mask"])
        yield Pair(str(our_text) == tokenizer.decode(output_ids[0], skip_special_tokens=True))


def continuations(case: Case) -> Iterator[Pair]:
    """Compare greedy continuations of paragraphs, decoded with a KV cache."""
    pipeline, tokenizer = case.pipeline(), load_tokenizer(case.folder)
    session = get_runtime(TARGET.runtime).open(case.graph, TARGET, 1)
    decoder = Decoder(session, str(case.graph))
    paragraphs = [part for text in case.rows["text"].to_pylist() for part in text.split("\n") if len(part) > _BEGINNING]
    for part in paragraphs[:: max(1, len(paragraphs) // _PARAGRAPHS)]:
        beginning = part[:_BEGINNING].rpartition(" ")[0]
        our_logits = [decoder.prefill(tokenizer(beginning)["input_ids"])]
        while len(our_logits) < _CONTINUED and our_logits[-1] != tokenizer.eos_token_id:
            our_logits.append(decoder.step(our_logits[-1]))
        (answer,) = pipeline(beginning, max_new_tokens=_CONTINUED, do_sample=False, return_full_text=False)
        yield Pair(tokenizer.decode(our_logits, skip_special_tokens=True) == answer["generated_text"])


def transcripts(case: Case) -> Iterator[Pair]:
    """Compare the transcripts of recordings of up to 30 seconds; transformers splits longer ones in another way.

    Decoding is greedy; the default of the pipeline is a beam search with five beams.
    """
    pipeline = case.pipeline(generate_kwargs={"num_beams": 1})
    for transcript, sound in zip(case.collected["transcripts"], case.sounds(), strict=True):
        if len(sound["raw"]) > 30 * sound["sampling_rate"]:
            continue
        yield Pair(str(transcript).strip() == pipeline(sound)["text"].strip())


def embeddings(case: Case) -> Iterator[Pair]:
    """Compare our embedding of each text with the mean of the pipeline's token embeddings."""
    pipeline = case.pipeline()
    # The embeddings of second texts follow after those of the texts.
    for embedding, text in zip(case.collected["embedding"], case.rows["text"].to_pylist(), strict=False):
        yield _compare_embeddings(embedding, np.array(pipeline(text)[0]).mean(axis=0))


def image_embeddings(case: Case) -> Iterator[Pair]:
    """Compare the pooled embedding of each image."""
    pipeline = case.image_pipeline()
    for embedding, image in zip(case.collected["embedding"], case.images(), strict=True):
        yield _compare_embeddings(embedding, np.array(pipeline(image, pool=True)).reshape(-1))


def _compare_embeddings(ours: np.ndarray, theirs: np.ndarray) -> Pair:
    ours, theirs = (vector / np.linalg.norm(vector) for vector in (ours, theirs))
    return Pair(bool(ours @ theirs > 1 - 1e-5), np.abs(ours - theirs).max())


def zero_shot_classes(case: Case) -> Iterator[Pair]:
    """Compare the class with the most similar prompt for each image, and the probability of every class."""
    pipeline = case.image_pipeline()
    names = list(dict.fromkeys(case.rows["label"].to_pylist()))
    count = len(case.rows)
    images, texts = (case.collected[name] for name in ("images", "texts"))
    scale = float(pipeline.model.logit_scale.detach().exp())
    probabilities = softmax(scale * images[:count] @ texts[count : count + len(names)].T)
    for ours, image in zip(probabilities, case.images(), strict=True):
        answer = pipeline(image, candidate_labels=names, hypothesis_template="This is a photo of {}.")
        yield Pair(names[ours.argmax()] == answer[0]["label"], np.abs(ours - _scores(answer, names)).max())


def boxes(case: Case) -> Iterator[Pair]:
    """Compare all boxes of each image that score above 1%: class, corners to a pixel, and score."""
    pipeline = case.image_pipeline()
    for detections, image in zip(case.collected["found"], case.images(), strict=True):
        confident = detections[detections[:, 0] > 0.01]
        theirs = pipeline(image, threshold=0.01)
        if len(confident) != len(theirs):
            yield Pair(False, 1.0)
            continue
        corners = np.concatenate([confident[:, 2:4], confident[:, 2:4] + confident[:, 4:]], axis=1)
        others = np.array(
            [[detection["box"][name] for name in ("xmin", "ymin", "xmax", "ymax")] for detection in theirs]
        )
        same = [case.labels[int(key)] for key in confident[:, 1]] == [detection["label"] for detection in theirs]
        is_near = not len(confident) or np.abs(corners - others.reshape(-1, 4)).max() < 1.01
        difference = np.abs(confident[:, 0] - [detection["score"] for detection in theirs]).max(initial=0)
        yield Pair(bool(same and is_near), difference)


def pixels(case: Case) -> Iterator[Pair]:
    """Compare the class of every pixel."""
    from compress.tasks.image_segmentation import masks

    pipeline = case.image_pipeline()
    for outputs, image in zip(case.outputs, case.images(), strict=True):
        (mask,) = masks(outputs["logits"][None], [image.size[::-1]], load_processor(case.folder))
        theirs = np.full_like(mask, -1)
        for part in pipeline(image, subtask="semantic"):
            theirs[np.asarray(part["mask"]) > 0] = case.labels.index(part["label"])
        yield Pair(bool((mask == theirs).all()))


COMPARED: Mapping[str, Callable[[Case], Iterator[Pair]]] = {
    "text-classification": text_classes,
    "token-classification": token_labels,
    "question-answering": spans,
    "fill-mask": masked_tokens,
    "text-ranking": relevance,
    "text2text-generation": generated_texts,
    "feature-extraction": embeddings,
    "image-classification": image_classes,
    "image-feature-extraction": image_embeddings,
    "zero-shot-image-classification": zero_shot_classes,
    "object-detection": boxes,
    "image-segmentation": pixels,
    "text-generation": continuations,
    "audio-classification": audio_classes,
    "automatic-speech-recognition": transcripts,
}
