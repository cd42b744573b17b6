"""Tests of predictions on raw inputs, against transformers' pipelines of the same weights."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_images
import tiny_places
import tiny_run
import tiny_sounds
import tiny_tasks
import tiny_text_to_text
import tiny_towers
import torch
import transformers
from PIL import Image
from quantized import save_tiny_llama
from tiny import label_maps
from tiny_whisper import write_tiny_whisper

from compress.evaluation.loaded_model import LoadedModel
from compress.formats.targets import REFERENCE
from compress.models.json_file import read_json
from compress.tasks.registry import TASKS
from compress.utils.errors import CompressError, DataError

TAGS = ["O", "B-GOOD", "I-GOOD", "B-BAD", "I-BAD"]
TEXTS = ["the film was great", "dreadful plot felt quite boring", "the cast"]
NEAR = 1e-4


def opened(folder: Path, task: str, max_length: int = 32) -> LoadedModel:
    """Return the model in ``folder`` on the target that runs its weights with transformers."""
    specialized = TASKS[task].specialize(read_json(folder / "config.json"))
    return LoadedModel(folder, specialized, max_length, REFERENCE.target, threads=1)


def pipeline(folder: Path, task: str, **options: Any) -> Any:
    return transformers.pipeline(task, model=str(folder), **options)


def pictures(count: int = 3) -> list[Image.Image]:
    return [Image.open(io.BytesIO(row["image"])) for row in tiny_places.scenes(count)]


def png(folder: Path, picture: Image.Image) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / "picture.png")
    return folder / "picture.png"


def test_text_classes_and_probabilities_are_those_of_the_pipeline(tmp_path: Path) -> None:
    tiny_run.write_model(tmp_path, tiny_run.LABELS)
    expected = pipeline(tmp_path, "text-classification", top_k=None)(TEXTS)
    for prediction, scores in zip(opened(tmp_path, "text-classification").predict(TEXTS), expected, strict=True):
        assert prediction["label"] == scores[0]["label"]
        assert prediction["score"] == pytest.approx(scores[0]["score"], abs=NEAR)
        assert prediction["scores"] == pytest.approx({each["label"]: each["score"] for each in scores}, abs=NEAR)


def test_image_classes_are_those_of_the_pipeline_for_files_bytes_and_pil_images(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_images.vit(**tiny_images.names()).save(folder)
    image = pictures(1)[0]
    file = png(tmp_path, image)
    (best, *_) = pipeline(folder, "image-classification")(image)
    model = opened(folder, "image-classification")
    for given in (image, file, str(file), file.read_bytes()):
        (prediction,) = model.predict(given)
        assert prediction["label"] == best["label"]
        assert prediction["score"] == pytest.approx(best["score"], abs=1e-3)


def test_words_are_labeled_as_in_the_pipeline(tmp_path: Path) -> None:
    tiny_tasks.write_model(tmp_path, "token-classification", **label_maps(TAGS))
    expected = pipeline(tmp_path, "token-classification", ignore_labels=[])(TEXTS)
    predictions = opened(tmp_path, "token-classification").predict(TEXTS)
    for text, words, tokens in zip(TEXTS, predictions, expected, strict=True):
        assert [word["word"] for word in words] == text.split()
        # Each word of the vocabulary is one token.
        assert [word["label"] for word in words] == [token["entity"] for token in tokens]
        assert [word["score"] for word in words] == pytest.approx([float(t["score"]) for t in tokens], abs=NEAR)


def test_words_after_the_maximum_length_have_no_label(tmp_path: Path) -> None:
    tiny_tasks.write_model(tmp_path, "token-classification", **label_maps(TAGS))
    (words,) = opened(tmp_path, "token-classification", max_length=4).predict("the film was great")
    assert [word["score"] > 0 for word in words] == [True, True, False, False], "[CLS] the film [SEP]"
    assert [word["label"] for word in words[2:]] == ["O", "O"]


def test_relevance_is_the_sigmoid_of_the_logit(tmp_path: Path) -> None:
    module = tiny_tasks.write_model(tmp_path, "text-ranking", num_labels=1)
    pairs = [("the great film", "lovely cast"), ("film", "the plot was boring")]
    encoded = tiny_run.tokenizer()([a for a, _ in pairs], [b for _, b in pairs], padding=True, return_tensors="pt")
    expected = 1 / (1 + np.exp(-module(**encoded).logits.detach().numpy()[:, 0]))
    model = opened(tmp_path, "text-ranking")
    as_mappings = [dict(zip(model.input_names, pair, strict=True)) for pair in pairs]
    for given in (pairs, as_mappings):
        assert [each["score"] for each in model.predict(given)] == pytest.approx(expected.tolist(), abs=NEAR)
    assert len(model.predict(pairs[0])) == 1, "a tuple is one pair"


def test_answer_is_the_likeliest_of_all_spans_of_the_context(tmp_path: Path) -> None:
    module = tiny_tasks.write_model(tmp_path, "question-answering", **label_maps(["a", "b"]))
    question, context = "the great film", "the film was great and the cast felt lovely"
    encoded = tiny_run.tokenizer()(question, context, return_tensors="pt", return_offsets_mapping=True)
    offsets, inside = encoded.pop("offset_mapping")[0].tolist(), np.array(encoded.sequence_ids(0), dtype=object) == 1
    with torch.inference_mode():
        outputs = module(**encoded)
    first, last = (scores[0].double() for scores in (outputs.start_logits, outputs.end_logits))
    first, last = (scores[torch.tensor(inside)].softmax(0) for scores in (first, last))
    places = np.flatnonzero(inside)
    spans = [(float(first[i] * last[j]), i, j) for i in range(len(places)) for j in range(i, len(places))]
    score, start, end = max(spans)
    (prediction,) = opened(tmp_path, "question-answering").predict((question, context))
    assert prediction["score"] == pytest.approx(score, rel=1e-3)
    assert (prediction["start"], prediction["end"]) == (offsets[places[start]][0], offsets[places[end]][1])
    assert prediction["answer"] == context[prediction["start"] : prediction["end"]]


def test_each_question_gets_one_answer_from_a_context_of_several_windows(tmp_path: Path) -> None:
    tiny_tasks.write_model(tmp_path, "question-answering", **label_maps(["a", "b"]))
    contexts = [" ".join(TEXTS * 6), "the film", " ".join(TEXTS * 9)]
    given = [{"question": "the great film", "context": context} for context in contexts]
    predictions = opened(tmp_path, "question-answering").predict(given)
    for context, prediction in zip(contexts, predictions, strict=True):
        assert prediction["answer"] == context[prediction["start"] : prediction["end"]] != ""


def test_masked_tokens_are_those_of_the_pipeline(tmp_path: Path) -> None:
    tiny_tasks.write_model(tmp_path, "fill-mask", architecture="Bert", tie_word_embeddings=False)
    model = opened(tmp_path, "fill-mask")
    (prediction,) = model.predict("the [MASK] was great")
    expected = pipeline(tmp_path, "fill-mask")("the [MASK] was great")
    assert [each["token_str"] for each in prediction] == [each["token_str"].strip() for each in expected]
    assert [each["score"] for each in prediction] == pytest.approx([each["score"] for each in expected], abs=NEAR)
    (several,) = model.predict(["[MASK] film was [MASK]"])
    assert [len(places) for places in several] == [5, 5]
    with pytest.raises(DataError, match=r"has no \[MASK\]"):
        model.predict("the film")


def test_objects_are_those_of_the_pipeline(tmp_path: Path) -> None:
    tiny_places.write_model(tmp_path, "yolos")
    images = pictures()
    expected = pipeline(tmp_path, "object-detection", threshold=0.5)(images)
    assert sum(map(len, expected)) > 0
    for found, objects in zip(opened(tmp_path, "object-detection").predict(images), expected, strict=True):
        assert [each["label"] for each in found] == [each["label"] for each in objects]
        assert [each["score"] for each in found] == pytest.approx([each["score"] for each in objects], abs=1e-3)
        for each, other in zip(found, objects, strict=True):
            assert each["box"] == pytest.approx(other["box"], abs=1.01), "the pipeline rounds down to pixels"


def test_class_of_each_pixel_has_the_size_of_the_image(tmp_path: Path) -> None:
    tiny_places.write_model(tmp_path, "segformer")
    images = pictures()
    expected = pipeline(tmp_path, "image-segmentation")(images[0])
    model = opened(tmp_path, "image-segmentation")
    masks = model.predict(images)
    assert [mask.shape for mask in masks] == [image.size[::-1] for image in images]
    assert model.labels == tiny_places.LABELS
    for each in expected:
        class_id = tiny_places.LABELS.index(each["label"])
        same = (np.asarray(each["mask"]) > 0) == (masks[0] == class_id)
        assert same.mean() > 0.99


def test_language_model_continues_a_prompt_as_generate_does(tmp_path: Path) -> None:
    checkpoint = save_tiny_llama(tmp_path)
    model = opened(tmp_path, "text-generation")
    prompt = "the film was"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    module = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    encoded = tokenizer(prompt, return_tensors="pt")
    ids = module.generate(**encoded, max_new_tokens=8, do_sample=False)[0, encoded["input_ids"].shape[1] :]
    assert model.predict(prompt, max_new_tokens=8) == [tokenizer.decode(ids, skip_special_tokens=True)]
    with pytest.raises(DataError, match="no room"):
        model.predict(prompt, max_new_tokens=0)
    assert checkpoint is not None


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`")
def test_texts_of_an_encoder_decoder_are_those_of_generate(tmp_path: Path) -> None:
    tiny_text_to_text.save_tiny_t5(tmp_path)
    texts, plain = tiny_text_to_text.pairs(4)["text"].to_pylist(), {"skip_special_tokens": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    module = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    expected = [
        tokenizer.decode(module.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=20)[0], **plain).strip()
        for text in texts
    ]
    assert opened(tmp_path, "text2text-generation", max_length=128).predict(texts) == expected


def test_recordings_are_transcribed(tmp_path: Path) -> None:
    write_tiny_whisper(tmp_path)
    recording = tiny_sounds.wav(tiny_sounds.tone(tiny_sounds.LABELS[0], 0.5, np.random.default_rng(0)))["bytes"]
    (tmp_path / "sound.wav").write_bytes(recording)
    model = opened(tmp_path, "automatic-speech-recognition")
    (text,) = model.predict(recording)
    assert isinstance(text, str)
    assert model.predict([tmp_path / "sound.wav"]) == [text]


def test_cosine_of_image_and_text_is_that_of_the_model(tmp_path: Path) -> None:
    tiny_towers.write_model(tmp_path)
    rows = tiny_towers.table(3)
    texts, images = rows["text"].to_pylist(), [row["bytes"] for row in rows["image"].to_pylist()]
    model = opened(tmp_path, "zero-shot-image-classification")
    predictions = model.predict(list(zip(images, texts, strict=True)))
    assert all(-1 <= prediction["score"] <= 1 for prediction in predictions)
    module = transformers.CLIPModel.from_pretrained(tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    inputs = processor(
        text=texts[:1], images=[Image.open(io.BytesIO(images[0])).convert("RGB")], return_tensors="pt", padding=True
    )
    with torch.inference_mode():
        expected = float(module(**inputs).logits_per_image[0, 0] / module.logit_scale.exp())
    assert predictions[0]["score"] == pytest.approx(expected, abs=1e-3)


def test_embeddings_are_arrays_whose_batch_does_not_matter(tmp_path: Path) -> None:
    tiny_tasks.write_model(tmp_path / "plain", "fill-mask")
    task = TASKS["feature-extraction"]
    with pytest.raises(CompressError, match="how the vectors of tokens become an embedding"):
        opened(tmp_path / "plain", task.name).predict(TEXTS)
    task.load(tmp_path / "plain", None, False).save(tmp_path / "pooled")
    model = opened(tmp_path / "pooled", task.name)
    together = model.predict(TEXTS)
    assert [embedding.shape for embedding in together] == [(64,)] * 3
    for text, embedding in zip(TEXTS, together, strict=True):
        assert np.allclose(model.predict(text)[0], embedding, atol=NEAR)


def test_no_inputs_give_no_predictions(tmp_path: Path) -> None:
    tiny_run.write_model(tmp_path, tiny_run.LABELS)
    assert opened(tmp_path, "text-classification").predict([]) == []


def test_unsuitable_inputs_are_refused_with_their_number(tmp_path: Path) -> None:
    tiny_tasks.write_model(tmp_path / "ranker", "text-ranking", num_labels=1)
    tiny_run.write_model(tmp_path / "classifier", tiny_run.LABELS)
    ranker, classifier = (
        opened(tmp_path / "ranker", "text-ranking"),
        opened(tmp_path / "classifier", "text-classification"),
    )
    for given in (["only one text"], [{"text": "a", "pear": "b"}], [("a", "b", "c")], ["a", "b"], 5):
        with pytest.raises(CompressError, match="Input 1 of text-ranking is ") as error:
            ranker.predict(given)
        assert "a mapping with text, pair, or a tuple of 2 in this order" in str(error.value)
    for given in (["the film", 3], ["the film", None], ["the film", " "], ["the film", "\ud800"]):
        with pytest.raises(DataError, match="row 2"):
            classifier.predict(given)
