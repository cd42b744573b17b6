"""Tests of text embeddings: retrieval metrics with values by hand, pooling, and encoders with and without modules."""

import numpy as np
import pyarrow as pa
import pytest
import sentences
from transformers import BertConfig, BertModel

from compress.models.sentence_modules import Normalize, SentenceModules
from compress.tasks.evaluation import Evaluation
from compress.tasks.registry import TASKS
from compress.utils.errors import DataError, ModelError

TASK = TASKS[sentences.TASK]
ROWS = pa.table({"text": ["a film", "the plot", "A  cast"], "pair": ["great", "Great ", "dreadful"]})


def rows_of(embeddings: np.ndarray, labels: list[int]) -> dict[str, float]:
    measured = TASK.measure({"embedding": embeddings}, np.array(labels), "m", "cpu")
    return {row.metric: row.value for row in measured}


def test_texts_precede_pairs_and_equal_pairs_share_a_label() -> None:
    model = sentences.encoder()
    examples = TASK.encode(ROWS, model.processor, None, 24)
    texts = [model.tokenizer.decode(example["input_ids"], skip_special_tokens=True) for example in examples.inputs]
    assert texts == ["a film", "the plot", "a cast", "great", "great", "dreadful"]
    assert examples.labels is not None
    assert examples.labels.tolist() == [0, 0, 1, 0, 0, 1]
    assert TASK.encode(ROWS.select(["text"]), model.processor, None, 24).labels is None


def test_retrieval_metrics_match_cosine_ranking() -> None:
    queries = np.array([[1, 0], [0, 2], [1, 1]], np.float32)
    corpus = np.array([[9, 1], [1, 1], [2, 2]], np.float32)
    # Cosines order the corpus 0 1=2 / 1=2 0 / 1=2 0; equal ones count against the model.
    measured = rows_of(np.concatenate([queries, corpus]), [0, 1, 2, 0, 1, 2])
    assert measured["recall_at_1"] == pytest.approx(1 / 3)
    assert measured["mean_reciprocal_rank"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    assert measured["recall_at_10"] == 1
    assert [measured[f"embedding_bytes{kind}"] for kind in ("", "_int8", "_binary")] == [8, 2, 1]
    # Any of several pairs with the same label is correct.
    assert rows_of(np.concatenate([queries, corpus]), [0, 1, 1, 0, 1, 1])["recall_at_1"] == 1


def test_every_query_has_a_raw_value() -> None:
    generator = np.random.default_rng(0)
    embeddings = generator.normal(size=(100, 8)).astype(np.float32)
    for row in TASK.measure({"embedding": embeddings}, np.tile(np.arange(50), 2), "m", "cpu"):
        if row.unit == "ratio":
            assert row.raw is not None and len(row.raw) == row.n == 50
            assert row.low is not None and row.high is not None and row.low <= row.value <= row.high
            assert row.value == pytest.approx(np.mean(row.raw))


def test_similarity_to_baseline_is_neighbor_agreement_and_cosine() -> None:
    generator = np.random.default_rng(0)
    embeddings = generator.normal(size=(60, 4)).astype(np.float32)
    turned = embeddings[:, ::-1] * [1, -1, 1, -1]  # a rotation keeps every neighbour, and no embedding
    likeness = {
        row.metric: row.value for row in TASK.compare({"embedding": turned}, {"embedding": embeddings}, "m", "cpu")
    }
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    assert likeness["agreement"] == 1
    expected = (unit * (unit[:, ::-1] * [1, -1, 1, -1])).sum(axis=1).mean()
    assert likeness["embedding_cosine"] == pytest.approx(expected, abs=1e-6)
    shorter = TASK.compare({"embedding": embeddings[:, :2]}, {"embedding": embeddings}, "m", "cpu")
    assert [row.metric for row in shorter] == ["agreement"]
    assert 0 < shorter[0].value < 1


def test_split_without_candidates_is_rejected() -> None:
    model = sentences.encoder()
    for rows in (ROWS.slice(0, 2), ROWS.select(["text"])):
        with pytest.raises(DataError, match="Retrieval needs candidates"):
            TASK.eval_examples(rows, model.processor, None, 24, Evaluation())


def test_nonfinite_embeddings_are_rejected() -> None:
    examples = TASK.encode(ROWS, sentences.encoder().processor, None, 24)
    with pytest.raises(ModelError, match="not finite"):
        TASK.collect({"sentence_embedding": np.full((2, 4), np.nan)}, examples, [0, 1])


def test_token_embeddings_are_pooled_with_attention_mask() -> None:
    model = sentences.encoder(SentenceModules(4, ("mean",), (Normalize(),)))
    examples = TASK.encode(ROWS, model.processor, None, 24)
    batch = examples.batch([0, 3])  # 4 and 3 tokens
    hidden = np.random.default_rng(0).normal(size=(2, 4, 4)).astype(np.float32)
    embeddings = TASK.collect({"last_hidden_state": hidden}, examples, [0, 3])["embedding"]
    means = np.stack([hidden[0].mean(axis=0), hidden[1, :3].mean(axis=0)])
    np.testing.assert_allclose(embeddings, means / np.linalg.norm(means, axis=1, keepdims=True), rtol=1e-5)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_plain_encoder_uses_mean_pooling_and_drops_pooler(tmp_path) -> None:
    model = sentences.encoder()
    BertModel(model.module.config).save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    loaded = TASK.load(tmp_path, None, False)
    assert loaded.module.pooler is None
    assert loaded.processor.modules.modes == ("mean",) and loaded.processor.modules.steps == ()
    (tmp_path / "saved").mkdir()
    loaded.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "1_Pooling" / "config.json").is_file()
    again = TASK.load(tmp_path / "saved", None, False)
    assert again.parameters() == loaded.parameters()


def test_pooling_of_another_width_is_rejected(tmp_path) -> None:
    model = sentences.encoder()
    model.save(tmp_path)
    text = (tmp_path / "1_Pooling" / "config.json").read_text()
    (tmp_path / "1_Pooling" / "config.json").write_text(text.replace(str(sentences.WIDTH), "48"))
    with pytest.raises(ModelError, match="for 48 dimensions"):
        TASK.load(tmp_path, None, False)


def test_folder_without_text_encoder_is_rejected(tmp_path) -> None:
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded for feature-extraction"):
        TASK.load(tmp_path, None, False)
