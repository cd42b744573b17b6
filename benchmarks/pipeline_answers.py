"""What transformers' own pipelines answer to the rows of a task, beside what an evaluation keeps of ours."""

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
"""That a language model goes on with, the letters that it is given of each, and the tokens that it adds."""


class Pair(NamedTuple):
    """Whether both answers to an example are the same, and how far apart their scores are, where there are any."""

    same: bool
    apart: float | None = None


@dataclass(frozen=True)
class Case:
    """The rows of a task, the ``graph`` that gives our answers to them, and the ``folder`` that transformers opens."""

    task: Task
    folder: Path
    graph: Path
    rows: pa.Table
    examples: Examples

    @property
    def kept(self) -> CollectedOutputs:
        """What the task keeps of our answers, by example."""
        return self._answers[0]

    @property
    def outputs(self) -> Sequence[Mapping[str, np.ndarray]]:
        """What the graph gives for each example."""
        return self._answers[1]

    @cached_property
    def _answers(self) -> tuple[CollectedOutputs, Sequence[Mapping[str, np.ndarray]]]:
        session = get_runtime(TARGET.runtime).open(self.graph, TARGET, 1)
        outputs: list[Mapping[str, np.ndarray]] = [{}] * len(self.examples)

        def answered(places: list[int]) -> dict[str, np.ndarray]:
            batch_outputs = session.predict(self.examples.batch(places))
            for at, row in enumerate(places):
                outputs[row] = {key: array[at] for key, array in batch_outputs.items() if len(array) == len(places)}
            return batch_outputs

        batches = by_length(self.examples, self.task.batch_size)
        return keep_all(self.task, self.examples, batches, answered), outputs

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The model's classes."""
        labels = artifact_labels(self.folder)
        assert labels is not None, "asked for by tasks with classes"
        return labels

    def pipeline(self, kind: str | None = None, **options: Any) -> Any:
        """transformers' for that ``kind`` of task, of the folder as it lies there, in fp32."""
        named = kind or self.task.name
        return transformers.pipeline(named, model=str(self.folder), dtype=torch.float32, device="cpu", **options)

    def pictures(self) -> Iterator[Image.Image]:
        """Of each row."""
        return (Image.open(io.BytesIO(value["bytes"])).convert("RGB") for value in self.rows["image"].to_pylist())

    def of_images(self) -> Any:
        """The pipeline, whose pictures are RGB whatever the model sees: one channel is what it was before."""
        pipeline = self.pipeline(image_processor=load_processor(self.folder))
        image_processor = getattr(pipeline.image_processor, "image_processor", pipeline.image_processor)
        pipeline.image_processor = _AsSeen(image_processor) if len(image_processor.image_mean) == 1 else image_processor
        return pipeline

    def sounds(self) -> Iterator[dict[str, Any]]:
        """Of each row."""
        for value in self.rows["audio"].to_pylist():
            samples, rate = soundfile.read(io.BytesIO(value["bytes"]), dtype="float32")
            yield {"raw": samples, "sampling_rate": rate}


@dataclass(frozen=True)
class _AsSeen:
    """An image processor of one channel, given pictures of three alike."""

    processor: Any

    def __call__(self, images: Any, **options: Any) -> Any:
        pictures = images if isinstance(images, list) else [images]
        return self.processor([picture.convert("L") for picture in pictures], **options)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: np.ndarray = shares / shares.sum(axis=-1, keepdims=True)
    return probabilities


def _scores(found: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> np.ndarray:
    """What a pipeline gives for each label, in the order of the ids."""
    by_label = {score["label"]: score["score"] for score in found}
    return np.array([by_label[label] for label in labels])


def _classes(case: Case, answered: Iterator[Sequence[Mapping[str, Any]]]) -> Iterator[Pair]:
    for logits, answer in zip(case.kept["logits"], answered, strict=True):
        probabilities = softmax(logits)
        yield Pair(
            case.labels[probabilities.argmax()] == answer[0]["label"],
            np.abs(probabilities - _scores(answer, case.labels)).max(),
        )


def texts_with_a_class(case: Case) -> Iterator[Pair]:
    """Of each text the likeliest class, and the probability of every class."""
    ask = case.pipeline()
    yield from _classes(case, (ask(text, top_k=None) for text in case.rows["text"].to_pylist()))


def images_with_a_class(case: Case) -> Iterator[Pair]:
    """The same, of pictures."""
    ask = case.of_images()
    yield from _classes(case, (ask(picture, top_k=len(case.labels)) for picture in case.pictures()))


def sounds_with_a_class(case: Case) -> Iterator[Pair]:
    """The same, of recordings."""
    ask = case.pipeline()
    yield from _classes(case, (ask(sound, top_k=len(case.labels)) for sound in case.sounds()))


def words(case: Case) -> Iterator[Pair]:
    """Of each word the label of its first token, and that token's probability."""
    ask = case.pipeline(ignore_labels=[])
    assert case.examples.labels is not None
    for row, text in enumerate(case.rows["tokens"].to_pylist()):
        theirs = {token["index"]: token for token in ask(text)}
        real = np.flatnonzero(case.examples.labels[row] >= 0)
        probabilities = softmax(case.outputs[row]["logits"][real])
        labels = case.kept["found"][row].split(" ")
        tokens = [theirs[position] for position in real.tolist()]
        scores = np.array([token["score"] for token in tokens])
        yield Pair(labels == [token["entity"] for token in tokens], np.abs(probabilities.max(axis=-1) - scores).max())


def relevance(case: Case) -> Iterator[Pair]:
    """Of each pair whether it is relevant, and the score."""
    ask = case.pipeline("text-classification", function_to_apply="none")
    pairs = zip(case.kept["scores"], case.rows["text"].to_pylist(), case.rows["pair"].to_pylist(), strict=True)
    for score, text, pair in pairs:
        theirs = ask({"text": text, "text_pair": pair})["score"]
        yield Pair((score > 0) == (theirs > 0), abs(score - theirs))


def masked(case: Case) -> Iterator[Pair]:
    """Of each masked token the likeliest one, and its probability; of texts that still have the same tokens."""
    ask = case.pipeline(top_k=1)
    tokenizer = load_tokenizer(case.folder)
    for row, example in enumerate(case.examples.inputs):
        ids = example["input_ids"]
        places = np.flatnonzero(ids == tokenizer.mask_token_id)
        text = _with_masks(tokenizer, case.rows["text"][row].as_py(), places)
        if not np.array_equal(tokenizer(text)["input_ids"], ids):
            continue  # other tokens there, or a text that is too long and that the pipeline does not cut
        answer = ask(text)
        theirs = [candidate[0] if isinstance(candidate, list) else candidate for candidate in answer]
        probabilities = softmax(case.outputs[row]["logits"][places])
        first = case.kept["first"][row][: len(places)]
        same = first.tolist() == [candidate["token"] for candidate in theirs]
        yield Pair(same, np.abs(probabilities.max(axis=-1) - [candidate["score"] for candidate in theirs]).max())


def _with_masks(tokenizer: Any, text: str, places: np.ndarray) -> str:
    """``text`` with the mask where those of its tokens stand."""
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    for position in sorted(places.tolist(), reverse=True):
        start, end = offsets[position]
        text = text[:start] + tokenizer.mask_token + text[end:]
    return text


def spans(case: Case) -> Iterator[Pair]:
    """Of each question the answer, and the sum of its logits: by what is left of the pipeline in transformers 5.

    That is in `document-question-answering`. An answer has up to 30 tokens, as SQuAD's have; there it is 15.
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
        yield Pair(case.kept["answer"][row] == text, abs(case.kept["score"][row] - score))


def written(case: Case) -> Iterator[Pair]:
    """The text to each text, by transformers' `generate` alone: version 5 has no such pipeline."""
    tokenizer = load_tokenizer(case.folder)
    module = transformers.AutoModelForSeq2SeqLM.from_pretrained(case.folder, dtype=torch.float32).eval()
    rows = zip(case.kept["texts"], case.rows["text"].to_pylist(), case.examples.inputs, strict=True)
    for our_text, text, example in rows:
        # Cut where the recipe's max_length does.
        given = tokenizer(text, truncation=True, max_length=len(example["input_ids"]), return_tensors="pt")
        with torch.inference_mode():
            output_ids = module.generate(given["input_ids"], attention_mask=given["attention_mask"])
        yield Pair(str(our_text) == tokenizer.decode(output_ids[0], skip_special_tokens=True))


def continued(case: Case) -> Iterator[Pair]:
    """The likeliest tokens after the beginning of paragraphs, one by one, through the cache of keys and values."""
    ask, tokenizer = case.pipeline(), load_tokenizer(case.folder)
    session = get_runtime(TARGET.runtime).open(case.graph, TARGET, 1)
    decoder = Decoder(session, str(case.graph))
    paragraphs = [part for text in case.rows["text"].to_pylist() for part in text.split("\n") if len(part) > _BEGINNING]
    for part in paragraphs[:: max(1, len(paragraphs) // _PARAGRAPHS)]:
        beginning = part[:_BEGINNING].rpartition(" ")[0]
        our_logits = [decoder.prefill(tokenizer(beginning)["input_ids"])]
        while len(our_logits) < _CONTINUED and our_logits[-1] != tokenizer.eos_token_id:
            our_logits.append(decoder.step(our_logits[-1]))
        (answer,) = ask(beginning, max_new_tokens=_CONTINUED, do_sample=False, return_full_text=False)
        yield Pair(tokenizer.decode(our_logits, skip_special_tokens=True) == answer["generated_text"])


def heard(case: Case) -> Iterator[Pair]:
    """What each recording of up to 30 seconds says; longer ones transformers hears in another way.

    The pipeline would follow five beams; here, as in an app, the likeliest token is said.
    """
    ask = case.pipeline(generate_kwargs={"num_beams": 1})
    for transcript, sound in zip(case.kept["transcripts"], case.sounds(), strict=True):
        if len(sound["raw"]) > 30 * sound["sampling_rate"]:
            continue
        yield Pair(str(transcript).strip() == ask(sound)["text"].strip())


def embeddings(case: Case) -> Iterator[Pair]:
    """The mean of each text's tokens as the pipeline has them, which is our embedding."""
    ask = case.pipeline()
    for embedding, text in zip(
        case.kept["embedding"], case.rows["text"].to_pylist(), strict=False
    ):  # pairs come behind
        yield _alike(embedding, np.array(ask(text)[0]).mean(axis=0))


def image_embeddings(case: Case) -> Iterator[Pair]:
    """Of each picture what the model pools."""
    ask = case.of_images()
    for embedding, picture in zip(case.kept["embedding"], case.pictures(), strict=True):
        yield _alike(embedding, np.array(ask(picture, pool=True)).reshape(-1))


def _alike(own: np.ndarray, theirs: np.ndarray) -> Pair:
    """Embeddings, each of length 1."""
    some, others = (vectors / np.linalg.norm(vectors) for vectors in (own, theirs))
    return Pair(bool(some @ others > 1 - 1e-5), np.abs(some - others).max())


def pictures_by_prompt(case: Case) -> Iterator[Pair]:
    """Of each picture the class whose prompt is nearest, and the probability of each."""
    ask = case.of_images()
    names = list(dict.fromkeys(case.rows["label"].to_pylist()))
    count = len(case.rows)
    images, texts = (case.kept[name] for name in ("images", "texts"))
    scale = float(ask.model.logit_scale.detach().exp())
    probabilities = softmax(scale * images[:count] @ texts[count : count + len(names)].T)
    for mine, picture in zip(probabilities, case.pictures(), strict=True):
        answer = ask(picture, candidate_labels=names, hypothesis_template="This is a photo of {}.")
        yield Pair(names[mine.argmax()] == answer[0]["label"], np.abs(mine - _scores(answer, names)).max())


def boxes(case: Case) -> Iterator[Pair]:
    """Of each picture every box that scores above 1%, its class, its corners to a pixel and its score."""
    ask = case.of_images()
    for detections, picture in zip(case.kept["found"], case.pictures(), strict=True):
        confident = detections[detections[:, 0] > 0.01]
        theirs = ask(picture, threshold=0.01)
        if len(confident) != len(theirs):
            yield Pair(False, 1.0)
            continue
        corners = np.concatenate([confident[:, 2:4], confident[:, 2:4] + confident[:, 4:]], axis=1)
        others = np.array(
            [[detection["box"][name] for name in ("xmin", "ymin", "xmax", "ymax")] for detection in theirs]
        )
        same = [case.labels[int(key)] for key in confident[:, 1]] == [detection["label"] for detection in theirs]
        near = not len(confident) or np.abs(corners - others.reshape(-1, 4)).max() < 1.01
        apart = np.abs(confident[:, 0] - [detection["score"] for detection in theirs]).max(initial=0)
        yield Pair(bool(same and near), apart)


def pixels(case: Case) -> Iterator[Pair]:
    """Of each picture the class of every pixel."""
    from compress.tasks.image_segmentation import masks

    ask = case.of_images()
    for outputs, picture in zip(case.outputs, case.pictures(), strict=True):
        (mask,) = masks(outputs["logits"][None], [picture.size[::-1]], load_processor(case.folder))
        theirs = np.full_like(mask, -1)
        for part in ask(picture, subtask="semantic"):
            theirs[np.asarray(part["mask"]) > 0] = case.labels.index(part["label"])
        yield Pair(bool((mask == theirs).all()))


COMPARED: Mapping[str, Callable[[Case], Iterator[Pair]]] = {
    "text-classification": texts_with_a_class,
    "token-classification": words,
    "question-answering": spans,
    "fill-mask": masked,
    "text-ranking": relevance,
    "text2text-generation": written,
    "feature-extraction": embeddings,
    "image-classification": images_with_a_class,
    "image-feature-extraction": image_embeddings,
    "zero-shot-image-classification": pictures_by_prompt,
    "object-detection": boxes,
    "image-segmentation": pixels,
    "text-generation": continued,
    "audio-classification": sounds_with_a_class,
    "automatic-speech-recognition": heard,
}
