"""Tests of vision-language models exported as three graphs: generated tokens are compared with transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_images
import tiny_questions
import torch
from PIL import Image
from tiny_questions import table
from transformers import LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from compress.data.media import decode
from compress.formats.generation.image_text import read_rules
from compress.formats.onnx.decoder import GraphSettings, export_image_reader, verify_image_reader
from compress.formats.onnx.decoder.trace import check_writable
from compress.formats.onnx.model import OnnxModel, find_graphs
from compress.formats.runtime import get_runtime
from compress.formats.targets import TARGETS
from compress.inspection.activation_clipping import transcription_calls
from compress.models.checkpoint import Checkpoint
from compress.stages.onnx_int8.stage import OnnxInt8
from compress.tasks.evaluation import Evaluation
from compress.tasks.image_text_to_text import TASK, prompt_of, unfit_processor
from compress.utils.errors import ModelError


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """Return the checkpoint (SigLIP and Qwen2; recipes use CLIP and Llama), its graphs and the transformers model."""
    kinds = {"text": "qwen2", "tower": "siglip_vision_model", "tie_word_embeddings": True}
    folder = tiny_questions.write_model(tmp_path_factory.mktemp("model"), **kinds)
    model = TASK.load(folder, None, trust_remote_code=False)
    examples = TASK.encode(table(3), model.processor, None, 64)
    export = export_image_reader(Checkpoint(folder), examples, GraphSettings(), 1e-4)
    equality = verify_image_reader(export.model, Checkpoint(folder), examples, read_rules(folder).image, 1e-4, 0.2)
    assert export.difference < 1e-5 and equality.difference < 1e-4
    assert not export.unfused, export.unfused
    artifact = tmp_path_factory.mktemp("graphs")
    export.model.save(artifact)
    return folder, artifact, model


def test_files_have_transformers_js_names(written: tuple[Path, Path, Any]) -> None:
    _, artifact, _ = written
    names = ["vision_encoder.onnx", "embed_tokens.onnx", "decoder_model_merged.onnx"]
    assert [path.name for path in find_graphs(artifact)] == names
    kinds = {"GroupQueryAttention", "MultiHeadAttention", "Attention"}
    vision, embed, decoder = OnnxModel.load(artifact, None).graphs.values()
    for graph in (vision, decoder):
        assert kinds & {node.op_type for node in graph.graph.node}
    assert [node.op_type for node in embed.graph.node] == ["Gather"]
    assert [value.name for value in decoder.graph.input][:2] == ["inputs_embeds", "attention_mask"]


def test_generated_texts_match_transformers(written: tuple[Path, Path, Any]) -> None:
    _, artifact, model = written
    rows = table(6, seed=3)
    examples = TASK.eval_examples(rows, model.processor, None, 64, Evaluation())
    session = get_runtime("onnxruntime").open(artifact, TARGETS["cpu"], 1)
    answers = session.predict(examples.batch(range(6)))
    for row in range(6):
        tensors = {name: torch.from_numpy(array) for name, array in examples.batch([row]).items()}
        with torch.inference_mode():
            expected = model.module.generate(**tensors, do_sample=False)[0, tensors["input_ids"].shape[1] :]
        sequence = answers["sequences"][row]
        np.testing.assert_array_equal(sequence[sequence >= 0], expected.numpy())
        assert answers["texts"][row] == model.processor.decode(expected, skip_special_tokens=True).strip()
    assert len(set(answers["texts"])) > 1


def test_every_graph_is_quantized(written: tuple[Path, Path, Any]) -> None:
    _, artifact, _ = written
    done = OnnxInt8().run(OnnxModel.load(artifact, None), tiny_images.context())
    names = [f"{part}_quantized.onnx" for part in ("vision_encoder", "embed_tokens", "decoder_model_merged")]
    assert list(done.graphs) == names
    vision, embed, decoder = ([node.op_type for node in graph.graph.node] for graph in done.graphs.values())
    assert embed == ["GatherBlockQuantized"]
    for operators in (vision, decoder):
        assert "MatMulInteger" in operators and "MatMul" not in operators


def test_recorded_calls_per_graph_match_the_generated_length(written: tuple[Path, Path, Any]) -> None:
    _, artifact, model = written
    batch = TASK.eval_examples(table(1), model.processor, None, 64, Evaluation()).batch([0])
    length = get_runtime("onnxruntime").open(artifact, TARGETS["cpu"], 1).predict(batch)["sequences"].shape[1]
    calls = transcription_calls(artifact, [batch], 99)
    assert [len(graph_calls) for graph_calls in calls] == [1, length, length]
    seen, first = calls[0][0], calls[2][0]
    np.testing.assert_array_equal(seen["pixel_values"], batch["pixel_values"])
    assert first["inputs_embeds"].shape[:2] == batch["input_ids"].shape


def test_unsupported_generation_rules_and_processors_are_refused(tmp_path: Path) -> None:
    folder = tiny_questions.write_model(tmp_path)
    check_writable(folder)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"repetition_penalty": 1.1, "num_beams": 3}))
    with pytest.raises(ModelError, match="made with repetition_penalty, num_beams"):
        check_writable(folder)
    tiles = LlavaNextProcessor(LlavaNextImageProcessorPil(), tiny_questions.tokenizer(), patch_size=8)
    assert unfit_processor(tiles) == "beside tokens and the pixels of one image it is given image_sizes"


def test_smolvlm_without_tiling_matches_generate(tmp_path: Path) -> None:
    folder = tiny_questions.write_idefics3(tmp_path / "model")
    check_writable(folder)
    model, rows = TASK.load(folder, None, trust_remote_code=False), table(3)
    examples = TASK.encode(rows, model.processor, None, 64)
    image = _image(rows)
    prompt = prompt_of(model.processor, rows["text"][0].as_py(), 0)
    processed = model.processor(images=[[image]], text=[prompt], return_tensors="np", add_special_tokens=False)
    prompt_ids = processed["input_ids"][0]
    np.testing.assert_array_equal(examples.inputs[0]["input_ids"][: len(prompt_ids)], prompt_ids)
    np.testing.assert_array_equal(examples.inputs[0]["pixel_values"], processed["pixel_values"][0])
    export = export_image_reader(Checkpoint(folder), examples, GraphSettings(), 1e-4)
    verify_image_reader(export.model, Checkpoint(folder), examples, read_rules(folder).image, 1e-4, 0.2)
    (tmp_path / "graphs").mkdir()
    export.model.save(tmp_path / "graphs")
    batch = TASK.eval_examples(rows, model.processor, None, 64, Evaluation()).batch([0])
    written = get_runtime("onnxruntime").open(tmp_path / "graphs", TARGETS["cpu"], 1).predict(batch)["sequences"][0]
    tensors = {name: torch.from_numpy(array) for name, array in processed.items() if name not in ("rows", "cols")}
    with torch.inference_mode():
        expected = model.module.generate(**tensors, do_sample=False)[0, len(prompt_ids) :]
    np.testing.assert_array_equal(written, expected.numpy())
    with pytest.raises(ModelError, match="do_image_splitting: false"):
        TASK.load(tiny_questions.write_idefics3(tmp_path / "tiles", splitting=True), None, trust_remote_code=False)


def _image(rows: Any) -> Image.Image:
    return decode(rows["image"][0].as_py(), "RGB", {})
