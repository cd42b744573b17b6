"""Tests of zero-shot image classification: scores and loss compared with transformers, metrics with values by hand."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pytest
import tiny_images
import tiny_towers
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import pipeline
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from compress.data.columns import choose
from compress.data.files import Rows
from compress.formats.onnx.embedding_graphs import split_towers
from compress.formats.onnx.export import export_onnx, verify_parity
from compress.formats.onnx.runtimes.onnxruntime import session_of
from compress.models.model import TorchModel
from compress.numerics.losses import paired_contrastive, sigmoid_contrastive
from compress.tasks.evaluation import Evaluation
from compress.tasks.task import Examples
from compress.tasks.zero_shot_image_classification import TASK
from compress.utils.errors import DataError, ModelError, StageError

COUNT = 200
CLASSES = ["bright above", "bright below", "dark"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_folder = tmp_path_factory.mktemp("clip")
    tiny_towers.write_model(model_folder)
    return model_folder


@dataclass(frozen=True)
class ExportedTowers:
    """A model, its examples, and its exported graph."""

    folder: Path
    model: TorchModel
    rows: pa.Table
    examples: Examples
    graph: onnx.ModelProto


@pytest.fixture(scope="module", params=["clip", "siglip"])
def exported(request: pytest.FixtureRequest, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportedTowers:
    folder = clip
    if request.param == "siglip":
        folder = tmp_path_factory.mktemp("siglip")
        tiny_towers.write_model(folder, "siglip")
    model, rows = TASK.load(folder, None, trust_remote_code=False), tiny_towers.table(COUNT)
    examples = TASK.encode(rows, model.processor, None, 16)
    graph = export_onnx(model, examples.subset(range(6)), None, fusions=True).graph
    return ExportedTowers(folder, model, rows, examples, graph)


def test_graph_scores_equal_transformers_pipeline(exported: ExportedTowers) -> None:
    model, rows, examples, graph = exported.model, exported.rows, exported.examples, exported.graph
    few = examples.subset(range(6))
    assert verify_parity(graph, model, few, 1e-3) < 1e-4
    names = [output.name for output in graph.graph.output]
    assert names == ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"]
    onnx.shape_inference.infer_shapes(graph)
    asked = pa.table({"image": rows["image"].slice(0, 3), "text": [f"This is a photo of {name}." for name in CLASSES]})
    prompts = TASK.encode(asked, model.processor, None, 16).batch(range(3))
    pixels = examples.batch(range(COUNT))["pixel_values"]
    # The numbers of texts and images may differ: here 3 and 200, in transformers.js e.g. ten and one.
    logits = session_of(graph).predict({**prompts, "pixel_values": pixels})["logits_per_image"]
    assert logits.shape == (COUNT, 3)
    likely = torch.from_numpy(logits)
    chances = likely.sigmoid() if model.module.config.model_type == "siglip" else likely.softmax(dim=-1)
    known = pipeline("zero-shot-image-classification", str(exported.folder))
    images = [Image.open(io.BytesIO(value["bytes"])) for value in rows["image"].to_pylist()]
    for row, answer in zip(chances, known(images, candidate_labels=CLASSES), strict=True):
        scores = {label_score["label"]: label_score["score"] for label_score in answer}
        np.testing.assert_allclose(row.numpy(), [scores[name] for name in CLASSES], atol=1e-5)


def outputs_at_angles(images: Any, texts: Any, kinds: Any, captions: Any, image_ids: Any) -> dict[str, np.ndarray]:
    angles = (np.radians(np.array(degrees, float)) for degrees in (images, texts))
    unit = [np.stack([np.cos(degrees), np.sin(degrees)], axis=1) for degrees in angles]
    return dict(
        zip(
            ("images", "texts", "kind", "caption", "picture"),
            [*unit, *map(np.array, (kinds, captions, image_ids))],
            strict=True,
        )
    )


def test_recall_and_accuracy_match_values_by_hand() -> None:
    # Three rows, the last two with one caption, and two prompts each of two classes, at 0 and 40, and at 80 and 100.
    collected = outputs_at_angles([10, 60, 88], [0, 70, 70], [0, 1, 1], [0, 1, 1], [0, 1, 2])
    asked = outputs_at_angles([0, 0, 0, 0], [0, 40, 80, 100], [0, 0, 1, 1], [-1] * 4, [-1] * 4)
    both = {name: np.concatenate([collected[name], asked[name]]) for name in collected}
    rows = {row.metric: row for row in TASK.measure(both, None, "m", "cpu")}
    assert rows["recall_at_1_image_to_text"].raw == (1, 1, 1)
    # The nearest image to the caption at 0 is at 10, and to the caption at 70 it is at 60.
    assert rows["recall_at_1_text_to_image"].raw == (1, 1, 1)
    # Class embeddings are at 20 and 90 degrees, so the image at 60 is nearer to the second.
    assert rows["zero_shot_accuracy"].raw == (1, 1, 1)
    swapped = {**both, "kind": np.array([1, 0, 0, 0, 0, 1, 1])}
    rows = {row.metric: row for row in TASK.measure(swapped, None, "m", "cpu")}
    assert rows["recall_at_1_image_to_text"].raw == (1, 1, 1)
    assert rows["zero_shot_accuracy"].value == 0
    plain = {row.metric: row for row in TASK.measure(collected, None, "m", "cpu")}
    assert "zero_shot_accuracy" not in plain


def test_shared_caption_is_a_single_candidate() -> None:
    # The last image is nearer to the caption shared by the six others, which counts once, than to its own.
    collected = outputs_at_angles([0] * 6 + [50], [50] * 6 + [0], [0] * 6 + [1], [0] * 6 + [1], range(7))
    rows = {row.metric: row for row in TASK.measure(collected, None, "m", "cpu")}
    assert rows["recall_at_1_image_to_text"].value == 0
    assert rows["recall_at_5_image_to_text"].value == 1


def test_rows_of_same_image_or_caption_match(clip: Path) -> None:
    processor = TASK.load(clip, None, trust_remote_code=False).processor
    values = tiny_images.table(3)["image"].to_pylist()
    images = [values[position] for position in (0, 0, 1, 2)]
    texts = ["bright above", "a film", "A  film", "dark"]
    rows = pa.table({"image": pa.array(images, tiny_images.media_type()), "text": texts})
    examples = TASK.encode(rows, processor, None, 16)
    assert examples.labels is not None
    kinds, captions, image_ids = examples.labels.T.tolist()
    assert kinds[0] == kinds[1] == kinds[2] != kinds[3]
    assert (captions, image_ids) == ([0, 1, 1, 2], [0, 0, 1, 2])


def test_prompts_follow_the_rows_and_have_class_labels(clip: Path) -> None:
    model = TASK.load(clip, None, trust_remote_code=False)
    evaluation = Evaluation(templates=("a photo of {}", "{}"))
    examples = TASK.eval_examples(tiny_towers.table(6), model.processor, None, 16, evaluation)
    assert examples.labels is not None and len(examples) == len(examples.lengths()) == 10
    asked = [model.tokenizer.decode(prompt["input_ids"], skip_special_tokens=True) for prompt in examples.inputs[6:]]
    assert asked == ["a photo of bright above", "bright above", "a photo of bright below", "bright below"]
    assert examples.labels[6:].tolist() == [[0, -1, -1], [0, -1, -1], [1, -1, -1], [1, -1, -1]]
    assert examples.labels[:6, 0].tolist() == [0, 1] * 3
    assert examples.batch([5, 9])["pixel_values"].shape == (2, 3, 16, 16)


def test_losses_equal_transformers_and_account_for_shared_pairs() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 4)
    alone = torch.arange(4)[:, None].expand(4, 3)
    clip, siglip = (type(f"{name}Output", (), {"logits_per_image": logits}) for name in ("CLIP", "Siglip"))
    torch.testing.assert_close(TASK.loss(clip(), alone), image_text_contrastive_loss(logits))
    signs = 2 * torch.eye(4) - 1
    expected = -torch.nn.functional.logsigmoid(signs * logits).sum(dim=-1).mean()
    torch.testing.assert_close(TASK.loss(siglip(), alone), expected)
    labels = torch.tensor([[0, 0, 0], [1, 1, 1], [0, 2, 2], [-100, -100, -100]])
    belongs = torch.eye(4, dtype=torch.bool)
    belongs[0, 2] = belongs[2, 0] = True
    share = belongs / belongs.sum(dim=1, keepdim=True)
    both = (cross_entropy(logits, share) + cross_entropy(logits.T, share)) / 2
    torch.testing.assert_close(TASK.loss(clip(), labels), both)
    torch.testing.assert_close(paired_contrastive(logits, belongs), both)
    torch.testing.assert_close(TASK.loss(siglip(), labels), sigmoid_contrastive(logits, belongs))


def test_distance_compares_similarities_across_dimensions() -> None:
    torch.manual_seed(0)
    mine, taught = ([torch.nn.functional.normalize(torch.randn(3, size)) for _ in range(2)] for size in (2, 5))
    total = 0.0
    for way in (0, 1):
        p, q = (
            (embeddings[way] @ embeddings[1 - way].T / 0.02).double().softmax(dim=-1) for embeddings in (taught, mine)
        )
        total += float((p * (p / q).log()).sum() / 3)
    distance = TASK.distance(torch.cat(mine, dim=-1), torch.cat(taught, dim=-1), 2.0)
    assert float(distance) == pytest.approx(total / 2, rel=1e-4)


def source(some: dict[str, list[Any]]) -> pa.Table:
    return choose(Rows("here", tuple(some), some), TASK.columns, {})


def test_captions_without_images_are_rejected(clip: Path) -> None:
    image = tiny_images.png(tiny_images.pixels(0, np.random.default_rng(0)))
    assert source({"image": [image], "text": ["dark"]}).column_names == ["image", "text"]
    with pytest.raises(DataError, match="'image' has 1 of 2 values missing"):
        source({"image": [image, None], "text": ["dark", "bright"]})
    with pytest.raises(DataError, match="no column 'image'"):
        source({"text": ["dark"]})
    with pytest.raises(DataError, match=r"gone\.png cannot be read"):
        source({"image": ["gone.png"], "text": ["dark"]})
    rows = tiny_towers.table(2).select(["image"]).append_column("text", pa.array(["dark", "Dark"]))
    processor = TASK.load(clip, None, trust_remote_code=False).processor
    with pytest.raises(DataError, match="Retrieval needs candidates"):
        TASK.eval_examples(rows, processor, None, 16, Evaluation())


def test_single_tower_model_is_rejected(tmp_path: Path) -> None:
    tiny_images.vit().save(tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded for zero-shot"):
        TASK.load(tmp_path, None, trust_remote_code=False)


def test_graph_of_each_tower_has_outputs_of_joint_graph(exported: ExportedTowers) -> None:
    batch = exported.examples.batch(range(6))
    whole, towers = session_of(exported.graph).predict(batch), split_towers(exported.graph)
    assert list(towers) == ["text_model", "vision_model"]
    for tower, output in zip(towers.values(), ("text_embeds", "image_embeds"), strict=True):
        session = session_of(tower)
        assert ("pixel_values" in session.inputs) != ("input_ids" in session.inputs)
        np.testing.assert_allclose(session.predict(batch)[output], whole[output], atol=1e-6)
    with pytest.raises(StageError, match="pixel_values"):
        split_towers(towers["text_model"])
