"""Tests of `static_embeddings`: vectors against transformers, scikit-learn and closed forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import sentences
import tiny
import torch
from sklearn.decomposition import PCA

from compress.models.model import TorchModel
from compress.models.sentence_modules import Normalize, SentenceModules
from compress.stages.static_embeddings.stage import StaticEmbeddings
from compress.stages.static_embeddings.vectors import principal_components, token_vectors, token_weights
from compress.tasks.inference import predict
from compress.tasks.registry import TASKS
from compress.utils.errors import StageError
from compress.utils.progress import SilentProgress


def embedded(model: TorchModel, texts: list[str]) -> np.ndarray:
    rows = pa.table({"text": texts, "pair": texts})
    return predict(model.module, sentences.context().task.encode(rows, model.processor, None, 24))[: len(texts)]


def test_vector_of_a_token_is_the_embedding_of_a_text_of_that_token() -> None:
    model = sentences.encoder(SentenceModules(sentences.WIDTH, steps=(Normalize(),)))
    vectors = token_vectors(model, SilentProgress())
    assert len(vectors) == len(model.tokenizer)
    words = ["great", "boring", "film"]
    ids = [model.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    assert all(len(word_ids) == 1 for word_ids in ids)
    mine = np.stack([vectors[word_ids[0]] for word_ids in ids])
    mine /= np.linalg.norm(mine, axis=1, keepdims=True)
    np.testing.assert_allclose(mine, embedded(model, words), atol=1e-5)


def test_vectors_of_a_classifier_are_means_of_its_last_hidden_states() -> None:
    model = tiny.encoder()
    vectors = token_vectors(model, SilentProgress())
    encoded = model.tokenizer("great", return_tensors="pt")
    with torch.no_grad():
        hidden = model.module(**encoded, output_hidden_states=True).hidden_states[-1]
    assert hidden.shape[1] == 3
    np.testing.assert_allclose(vectors[int(encoded["input_ids"][0, 1])], hidden[0].mean(dim=0), atol=1e-5)


@pytest.mark.parametrize("whiten", [False, True])
def test_principal_components_are_those_of_scikit_learn(whiten: bool) -> None:
    vectors = np.random.default_rng(0).normal(2.0, 1.0, (200, 12)) * np.linspace(3, 0.1, 12)
    components, share = principal_components(vectors, 5, whiten)
    reference = PCA(5, whiten=whiten, svd_solver="full").fit(vectors)
    expected = reference.transform(vectors)
    if whiten:
        expected *= np.sqrt(200 / 199)  # scikit-learn divides by n - 1
    np.testing.assert_allclose(np.abs(components), np.abs(expected), rtol=1e-3, atol=1e-4)
    assert share == pytest.approx(reference.explained_variance_ratio_.sum())


def test_all_dimensions_keep_their_axes() -> None:
    vectors = np.random.default_rng(0).normal(size=(30, 4)) + 5
    np.testing.assert_allclose(principal_components(vectors, 4, whiten=False)[0], vectors - vectors.mean(0), atol=1e-5)


def test_frequent_tokens_weigh_less() -> None:
    examples = sentences.context().encode("train", sentences.encoder())
    counts: dict[int, int] = {}
    for row in examples.inputs:
        for token in row["input_ids"]:
            counts[int(token)] = counts.get(int(token), 0) + 1
    total = sum(counts.values())
    expected = [0.01 / (0.01 + counts.get(token, 0) / total) for token in range(200)]
    np.testing.assert_allclose(token_weights(examples, 200, 0.01), expected, rtol=1e-5)
    assert (token_weights(examples, 200, 0.0) == 1).all()


def test_embedding_is_the_normalized_mean_of_the_vectors() -> None:
    model = StaticEmbeddings(dimensions=8).run(sentences.encoder(), sentences.context())
    table, text = model.module.embeddings.weight.detach().numpy(), "great great plot"
    ids = model.tokenizer(text)["input_ids"]
    assert model.tokenizer.convert_ids_to_tokens(ids) == text.split()
    mean = table[ids].mean(axis=0)
    np.testing.assert_allclose(embedded(model, [text])[0], mean / np.linalg.norm(mean), atol=1e-6)


def test_text_of_unknown_tokens_has_the_embedding_zero() -> None:
    model = StaticEmbeddings(dimensions=8).run(sentences.encoder(), sentences.context())
    assert set(model.tokenizer("字 字")["input_ids"]) == {model.tokenizer.unk_token_id}
    assert (embedded(model, ["字 字", "great"])[0] == 0).all()


def test_byte_pairs_get_vectors_too() -> None:
    model = tiny.encoder("roberta", processor=tiny.byte_level())
    static = StaticEmbeddings(dimensions=8).run(model, tiny.context())
    assert static.module.embeddings.weight.shape == (len(model.tokenizer), 8)
    texts = ["great film", "字"]
    for text in texts:
        assert static.tokenizer(text)["input_ids"] == model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tiny.logits(static, texts).isfinite().all()


def test_more_dimensions_than_the_encoder_are_refused() -> None:
    with pytest.raises(StageError, match=f"has {sentences.WIDTH} dimensions, fewer than 999"):
        StaticEmbeddings(dimensions=999).run(sentences.encoder(), sentences.context())


def classifier(filters: int, window: int = 3) -> TorchModel:
    """Return a static classifier with weights of about one, so that its logits depend on the text visibly."""
    model = StaticEmbeddings(dimensions=8, filters=filters, window=window).run(tiny.encoder(), tiny.context())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.normal_()
    return model


@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_filters_are_a_convolution_over_the_tokens(window: int) -> None:
    model = classifier(5, window)
    module, text = model.module, "great plot boring film great"
    ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
    convolution = torch.nn.Conv1d(8, 5, window)
    with torch.no_grad():
        # A row of the matrix holds the weights of the first token, then those of the second, and so on.
        convolution.weight.copy_(module.convolution.weight.view(5, window, 8).transpose(1, 2))
        convolution.bias.copy_(module.convolution.bias)
        vectors = torch.nn.functional.pad(module.embeddings(ids).mT, ((window - 1) // 2, window // 2))
        active = convolution(vectors).relu()
        assert active.shape == (1, 5, ids.shape[1])
        expected = module.classifier(torch.cat([active.mean(dim=2), active.amax(dim=2)], dim=1))
    torch.testing.assert_close(tiny.logits(model, [text]), expected)


def test_padding_does_not_change_the_logits_of_a_convolution() -> None:
    model = classifier(5)
    texts = ["great", "great film", "boring plot great film boring plot"]
    alone = torch.cat([tiny.logits(model, [text]) for text in texts])
    torch.testing.assert_close(tiny.logits(model, texts), alone)
    assert alone.std(dim=0).min() > 0.1


def test_only_filters_read_the_order_of_words() -> None:
    for filters in (0, 5):
        first, second = tiny.logits(classifier(filters), ["great boring film plot", "film plot boring great"])
        assert torch.allclose(first, second, atol=1e-5) == (filters == 0)


def test_filters_survive_saving(tmp_path: Path) -> None:
    model = classifier(5, window=2)
    model.save(tmp_path)
    loaded = TorchModel.load(tmp_path, TASKS[tiny.TASK])
    texts = tiny.texts(8)
    torch.testing.assert_close(tiny.logits(loaded, texts), tiny.logits(model, texts), rtol=0, atol=0)
