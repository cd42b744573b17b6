"""Tests of a complete run of a sentence encoder: measurements, files of the final model, and recipe errors."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tiny_pairs import ROWS, write_recipe
from tiny_run import compress, latest, load, read_report

from compress.pipeline.run import run
from compress.tasks.inference import predict
from compress.tasks.registry import TASKS
from compress.utils.errors import DataError, RecipeError
from compress.utils.progress import SilentProgress

pytestmark = pytest.mark.slow

MODELS = ("baseline", "trim_vocabulary", "distill", "reduce_dimensions", "onnx", "onnx_int8", "final")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("embeddings")
    run(load(write_recipe(folder)), folder, folder / "artifacts", SilentProgress())
    return folder


def test_every_model_has_retrieval_and_similarity_metrics(finished: Path) -> None:
    rows = {(row["model"], row["metric"]): row for row in read_report(finished / "artifacts")["measurements"]}
    for model in MODELS:
        for metric in ("recall_at_1", "recall_at_10", "mean_reciprocal_rank", "recall_at_10_binary"):
            assert rows[model, metric]["n"] == ROWS["test"]
            assert len(rows[model, metric]["raw"]) == ROWS["test"]
        assert -1 <= rows[model, "spearman_rated"]["low"] <= rows[model, "spearman_rated"]["value"] <= 1
        assert rows[model, "pearson_rated"]["n"] == 12
    # Trimming the vocabulary does not change embeddings of texts whose tokens are all kept.
    assert rows["trim_vocabulary", "embedding_cosine"]["value"] == pytest.approx(1, abs=1e-5)
    assert rows["trim_vocabulary", "agreement"]["value"] == 1
    assert [rows[model, "embedding_bytes"]["value"] for model in MODELS] == [128, 128, 128, 64, 64, 64, 64]
    assert ("reduce_dimensions", "embedding_cosine") not in rows
    # The stage before the export is measured on an ONNX export as well, so both rows come from equal files.
    assert rows["onnx", "mean_reciprocal_rank"]["value"] == rows["reduce_dimensions", "mean_reciprocal_rank"]["value"]


def test_queries_of_models_of_the_same_width_are_evaluated_on_the_index(finished: Path) -> None:
    rows = {(row["model"], row["metric"]): row for row in read_report(finished / "artifacts")["measurements"]}
    # The baseline's own queries find what they find without the index.
    for metric in ("recall_at_1", "recall_at_10", "recall_at_10_int8", "recall_at_10_binary"):
        assert rows["baseline", f"index_{metric}"]["raw"] == rows["baseline", metric]["raw"]
        assert rows["trim_vocabulary", f"index_{metric}"]["raw"] == rows["baseline", metric]["raw"]
        assert rows["distill", f"index_{metric}"]["n"] == ROWS["test"]
        assert ("reduce_dimensions", f"index_{metric}") not in rows
    assert rows["distill", "index_ndcg_at_10"]["value"] != rows["baseline", "index_ndcg_at_10"]["value"]


def write_index(folder: Path, scale: float) -> None:
    """Embed the test pairs and further texts with the starting model, and store them as an index of a database does."""
    texts = []
    for split in ("test", "train"):
        with (folder / f"{split}.csv").open() as file:
            texts += [row["pair"] for row in csv.DictReader(file)]
    task = TASKS["feature-extraction"]
    model = task.load(folder / "model", None, False)
    embeddings = predict(model.module, task.encode(pa.table({"text": texts}), model.processor, None, 16))
    noise = scale * np.random.default_rng(0).standard_normal(embeddings.shape)
    rows = [
        {"text": text, "embedding": vector.tolist()} for text, vector in zip(texts, embeddings + noise, strict=True)
    ]
    (folder / "index.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_queries_are_searched_in_the_vectors_of_a_file(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, stages=[{"onnx": {}}], evaluation={"index": "index.jsonl"}, limits=[])
    write_index(tmp_path, scale=0)
    run(load(recipe), tmp_path, tmp_path / "artifacts", SilentProgress())
    rows = {(row["model"], row["metric"]): row for row in read_report(tmp_path / "artifacts")["measurements"]}
    for model in ("baseline", "final"):
        found, without = (np.array(rows[model, name]["raw"]) for name in ("index_recall_at_10", "recall_at_10"))
        assert (found <= without).all(), "further documents only displace relevant ones"
        assert found.sum() < without.sum()
    assert ("final", "index_recall_at_10_int8") not in rows
    done = compress("evaluate", latest(tmp_path / "artifacts"), "--json", folder=tmp_path)
    evaluated = {row["metric"]: row["value"] for row in json.loads(done.stdout)}
    assert evaluated["index_recall_at_10"] == rows["final", "index_recall_at_10"]["value"]


def test_index_of_another_model_ends_the_run_before_the_first_stage(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, stages=[{"onnx": {}}], evaluation={"index": "index.jsonl"}, limits=[])
    write_index(tmp_path, scale=1)
    with pytest.raises(DataError, match="does not hold the baseline's vectors"):
        run(load(recipe), tmp_path, tmp_path / "artifacts", SilentProgress())
    assert not list((tmp_path / "artifacts").rglob("*.onnx"))


def test_slices_are_computed_over_queries(finished: Path) -> None:
    report = read_report(finished / "artifacts")
    counts = [row["n"] for row in report["measurements"] if row["metric"].startswith("recall_at_10[characters=Q")]
    assert counts and sum(counts) == len(MODELS) * ROWS["test"]


def test_final_model_has_sentence_transformers_modules(finished: Path) -> None:
    model = latest(finished / "artifacts") / "model"
    modules = json.loads((model / "modules.json").read_text())
    assert [entry["path"] for entry in modules] == ["", "1_Pooling", "2_Dense", "3_Normalize"]
    assert json.loads((model / "2_Dense" / "config.json").read_text())["out_features"] == 16
    assert json.loads((model / "sentence_bert_config.json").read_text())["max_seq_length"] == 16
    assert (model / "onnx" / "model_quantized.onnx").is_file()


def test_evaluate_command_repeats_metrics_of_run(finished: Path) -> None:
    measured = {
        row["metric"]: row["value"]
        for row in read_report(finished / "artifacts")["measurements"]
        if row["model"] == "final"
    }
    done = compress("evaluate", latest(finished / "artifacts"), "--json", "--by-slice", folder=finished)
    assert done.returncode == 0, done.stderr
    rows = {row["metric"]: row["value"] for row in json.loads(done.stdout)}
    for metric in ("recall_at_10", "mean_reciprocal_rank", "spearman_rated", "embedding_bytes"):
        assert rows[metric] == measured[metric]
    assert any(metric.startswith("recall_at_10[") for metric in rows)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stages": [{"finetune": {}}, {"onnx": {}}]}, "finetune, for feature-extraction"),
        ({"stages": [{"distill": {"student": {"layers": [0]}, "labels_weight": 0.5}}]}, "labels_weight"),
        ({"evaluation": {"windows": 3}}, "it does not apply to feature-extraction"),
        ({"task": "text-classification", "stages": [{"onnx": {}}]}, "evaluation.similarity"),
        (
            {"task": "text-classification", "stages": [{"onnx": {"sentence_embedding": True}}], "evaluation": {}},
            "sentence_embedding",
        ),
        ({"evaluation": {"similarity": "sample:verse"}}, "sample:verses"),
        ({"task": "text-classification", "stages": [{"onnx": {}}], "evaluation": {"index": "baseline"}}, "index"),
    ],
)
def test_recipe_settings_invalid_for_embeddings_are_rejected(tmp_path: Path, changes: dict, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load(write_recipe(tmp_path, **changes))
