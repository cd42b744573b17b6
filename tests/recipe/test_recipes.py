"""Tests of every recipe in the repository: its header, its validity, and a whole run at tiny scale."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_images
import tiny_places
import tiny_questions
import tiny_sounds
import tiny_speech
import tiny_tasks
import tiny_text_to_text
import tiny_towers
import torch
from mergeable import save_mergeable_llama
from quantized import save_tiny_llama, tiny_llama_config, tiny_tokenizer
from rotation import todays
from tiny_generation import write_texts
from tiny_pairs import write_pairs
from tiny_run import LABELS, tokenizer, write_rows
from transformers import BertConfig, BertModel, MixtralConfig, MixtralForCausalLM

from compress.data.config import DataConfig
from compress.pipeline.run import run
from compress.recipe.loading import dump_recipe, read_recipe
from compress.recipe.recipe import Benchmark, Recipe
from compress.tasks.capability import DESCRIBES_IMAGES, DUAL_ENCODER, EMBEDS, GENERATES, TAKES_IMAGES
from compress.tasks.evaluation import Evaluation
from compress.tasks.registry import TASKS
from compress.utils.progress import SilentProgress

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))
ALWAYS = [path for path in RECIPES if path.stem in ("quickstart", "smollm2-int4")]
TODAY = [*ALWAYS, *todays([path for path in RECIPES if path not in ALWAYS], 6, lambda path: path.stem)]
"""Those that are run at tiny scale today: whole runs of each task and format are tests of their own."""
QUICK = Benchmark(budget_seconds=0.1, examples=8, batch_size=4, launches=2, every_stage=False)
"""One launch of each model: that it is timed, and not how well, matters here."""
LAYERS = 6
"""Of the sample that the recipes' layers are those of; the toy models have two."""
HEADER = ("command:", "hardware:", "time:", "expect:")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_header_has_command_hardware_time_and_results(path: Path) -> None:
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(comments)
    assert all(word in text for word in HEADER)
    assert f"compress run recipes/{path.name}" in text
    assert re.search(r"expect:.*\d", text), "figures to expect"


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cache the artifacts of all recipes: shared first stages are trained and exported once."""
    return tmp_path_factory.mktemp("artifacts")


@pytest.mark.parametrize("path", TODAY, ids=lambda path: path.stem)
def test_runs_at_tiny_scale(path: Path, tmp_path: Path, artifacts: Path) -> None:
    recipe = shrunk(read_recipe(path), tmp_path)
    done = run(recipe, tmp_path, artifacts, SilentProgress())
    assert [stage.name for stage in done.report.stages] == list(recipe.labels())
    rows = {(row.model, row.metric): row.value for row in done.report.measurements}
    assert rows["final", "size_bytes"] < rows["baseline", "size_bytes"]
    generates = GENERATES in TASKS[recipe.task].capabilities
    assert rows["final", "time_per_output_token_ms_context_128" if generates else "latency_ms"] > 0
    assert len(done.report.limits) == len(recipe.limits)


def shrunk(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe on a toy model and toy rows with few training steps, with limits that so few rows can test."""
    limits = [
        limit.model_copy(update={"at_least": min(limit.at_least, 0.5)}) if limit.at_least is not None else limit
        for limit in recipe.limits
    ]
    recipe = recipe.model_copy(update={"limits": tuple(limits)})
    if GENERATES in TASKS[recipe.task].capabilities:
        return _shrunk_generation(recipe, folder)
    if DUAL_ENCODER in TASKS[recipe.task].capabilities:
        return _shrunk_towers(recipe, folder)
    if recipe.task in (tiny_places.DETECTION, tiny_places.SEGMENTATION):
        return _shrunk_places(recipe, folder)
    if DESCRIBES_IMAGES in TASKS[recipe.task].capabilities:
        return _shrunk_questions(recipe, folder)
    if TAKES_IMAGES in TASKS[recipe.task].capabilities:
        return _shrunk_images(recipe, folder)
    if recipe.task == tiny_speech.TASK:
        return _shrunk_speech(recipe, folder)
    if recipe.task == "audio-classification":
        return _shrunk_sounds(recipe, folder)
    if recipe.task == "text2text-generation":
        return _shrunk_text_to_text(recipe, folder)
    if recipe.task == "text-to-image":
        return _shrunk_pictures(recipe, folder)
    if recipe.task in tiny_tasks.MAKERS:
        tiny = read_recipe(tiny_tasks.write_all(folder, recipe.task, ["finetune", "onnx"]))
        return _shrunk(recipe, data=tiny.data)
    write_model(folder / "model")
    (write_pairs if EMBEDS in TASKS[recipe.task].capabilities else write_rows)(folder)
    with (folder / "unlabeled.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], ["the film was quite moving"], ["the film was quite boring"]])
    splits = {split: f"{split}.csv" for split in ("train", "validation", "test")}
    unlabeled = ("unlabeled.csv",) if recipe.data.unlabeled else ()
    data = _local_data(recipe, splits, unlabeled=unlabeled, labels=None, max_length=16)
    evaluation = Evaluation(similarity="rated.csv") if recipe.evaluation.similarity else recipe.evaluation
    return _shrunk(recipe, data=data, evaluation=evaluation)


def _shrunk(recipe: Recipe, **changes: Any) -> Recipe:
    """Return the recipe with these fields, shrunk stages, and this machine's processor as its target."""
    changed = recipe.model_copy(update={"model": "model", "benchmark": QUICK, **changes}).model_dump()
    stages = [_shrunk_stage(stage.model_dump()) for stage in recipe.stages]
    limits = [{**limit.model_dump(), "target": "cpu"} for limit in recipe.limits]
    return Recipe.model_validate({**changed, "stages": stages, "targets": ("cpu",), "limits": limits})


def _local_data(recipe: Recipe, splits: dict[str, str], **changes: Any) -> DataConfig:
    return recipe.data.model_copy(update={"source": None, "splits": splits, **changes})


def _shrunk_generation(recipe: Recipe, folder: Path) -> Recipe:
    """Use two layers of Llama or Mixtral; prompts keep the length that the recipe's limits refer to."""
    if any(stage.kind == "gguf" for stage in recipe.stages):
        save_mergeable_llama(folder / "model")  # llama.cpp requires merges
    else:
        save = save_tiny_mixture if "mixture" in recipe.description.lower() else save_tiny_llama
        save(folder / "model")
    write_texts(folder)
    splits = {split: f"{split}.jsonl" for split in ("train", "test")}
    brief = {"budget_seconds": 0.1, "tokens": 4, "launches": 2, "threads": 1}
    evaluation = Evaluation(windows=4, prompts=2, prompt_tokens=8, tokens=8)
    changes = {"model": "model", "data": _local_data(recipe, splits, max_length=32), "evaluation": evaluation}
    changes["benchmark"] = recipe.benchmark.model_copy(update=brief)
    stages = [_shrunk_generation_stage(stage.model_dump(exclude_unset=True)) for stage in recipe.stages]
    return Recipe.model_validate({**recipe.model_copy(update=changes).model_dump(), "stages": stages})


def _shrunk_images(recipe: Recipe, folder: Path) -> Recipe:
    """Use a tiny ViT or ResNet, by its config alone where the recipe starts so, on squares in class folders."""
    model = tiny_images.vit() if "vit" in recipe.description.lower() else tiny_images.res_net()
    (folder / "model").mkdir()
    model.save(folder / "model")
    if recipe.random_weights:
        (folder / "model/model.safetensors").unlink()
    (folder / "student").mkdir()
    tiny_images.vit(hidden_size=24).save(folder / "student")
    (folder / "student/model.safetensors").unlink()
    tiny_images.write_class_folders(folder / "images")
    splits = {split: f"images/{split}" for split in ("train", "validation", "test")}
    return _shrunk(recipe, module=None, module_arguments={}, data=_local_data(recipe, splits, without_labels=()))


def _shrunk_places(recipe: Recipe, folder: Path) -> Recipe:
    """Use a tiny detector or segmenter on toy images."""
    name = "yolos" if recipe.task == tiny_places.DETECTION else "segformer"
    tiny = read_recipe(tiny_places.write_all(folder, name, ["finetune", "onnx"]))
    return _shrunk(recipe, random_weights=False, data=tiny.data, slices=None)


def _shrunk_towers(recipe: Recipe, folder: Path) -> Recipe:
    """Use a tiny CLIP and a student of half its layers, by their configs alone."""
    for name, changes in {"model": {}, "student": {"num_hidden_layers": 1}}.items():
        tiny_towers.write_model(folder / name, **changes)
        (folder / name / "model.safetensors").unlink()
    return _shrunk(recipe, data=_local_data(recipe, tiny_towers.write_splits(folder)))


def _shrunk_questions(recipe: Recipe, folder: Path) -> Recipe:
    """Use a tiny LLaVA by its config alone, and half-bright squares."""
    tiny_questions.write_model(folder / "model")
    (folder / "model" / "model.safetensors").unlink()
    return _shrunk(recipe, data=_local_data(recipe, tiny_questions.write_splits(folder)))


def _shrunk_speech(recipe: Recipe, folder: Path) -> Recipe:
    """Use a tiny Whisper on a few recordings."""
    splits = tiny_speech.write_speech(folder)
    changes = {
        "model": "model",
        "data": _local_data(recipe, splits),
        "benchmark": QUICK.model_copy(update={"batched": False, "threads": 1}),
    }
    return Recipe.model_validate(recipe.model_copy(update=changes).model_dump())


def _shrunk_pictures(recipe: Recipe, folder: Path) -> Recipe:
    """Use a tiny pipeline, images of random levels, and an image evaluator of random weights."""
    tiny_pictures = pytest.importorskip("tiny_pictures", reason="the plug-in for diffusion is deleted")
    from tiny_pipelines import pipeline_folder

    splits = tiny_pictures.write_rows(folder)
    pipeline_folder(folder / "model")
    (folder / "model" / "sampling_config.json").write_text('{"num_inference_steps": 4, "guidance_scale": 2.0}')
    tiny_pictures.write_judge(folder / "judge")
    evaluation = recipe.evaluation.model_copy(update={"judge": "judge"})
    return _shrunk(recipe, data=_local_data(recipe, splits, hold_out=None), evaluation=evaluation)


def _shrunk_sounds(recipe: Recipe, folder: Path) -> Recipe:
    """Use a tiny transformer over spectrograms of tones, by its config alone."""
    splits = {"train": 16, "validation": 6, "test": 8}
    tiny_sounds.write_splits(folder, splits)
    model = tiny_sounds.write_model(folder / "model", lambda: tiny_sounds.spectrograms(head=False))
    (model / "model.safetensors").unlink()
    return _shrunk(recipe, data=_local_data(recipe, {split: f"{split}.jsonl" for split in splits}))


def _shrunk_text_to_text(recipe: Recipe, folder: Path) -> Recipe:
    """Use a tiny BART that reverses words."""
    tiny_text_to_text.save_tiny_bart(folder / "model")
    pairs = tiny_text_to_text.write_pairs(folder)
    return _shrunk(recipe, data=_local_data(recipe, pairs, columns={}, drop_overlap=True, max_length=32))


def save_tiny_mixture(folder: Path) -> None:
    """Save a Mixtral of the same sizes, with four experts per block."""
    torch.manual_seed(0)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: getattr(tiny_llama_config(), name) for name in (*names, "num_key_value_heads")}
    MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, sliding_window=None)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def _shrunk_generation_stage(fields: dict[str, Any]) -> dict[str, Any]:
    small = {"samples": 4, "sequence_length": 16, "steps": 2, "epochs": 0.2, "embedding_group_size": 32, "layers": 1}
    fields |= {name: value for name, value in small.items() if name in fields}
    if fields["kind"] == "block_qat":
        fields["held_out"] = 1
    if fields["kind"] == "distill_language_model":
        fields |= {"budget": None, "tokens": 512}
    # Random weights have no structure that few bits could keep.
    return fields | ({"rounding_limit": 10.0} if fields["kind"] == "onnx" else {})


def _shrunk_stage(fields: dict[str, Any]) -> dict[str, Any]:
    if fields["kind"] == "prune_denoiser":
        return {**fields, "importance_examples": 4, "timesteps": 4}
    small = {"epochs": 0.2, "batch_size": 8, "importance_examples": 16, "min_count": 1, "learning_rate": 1e-3}
    small |= {"calibration_examples": 16, "dimensions": 8, "keep": ()}
    if fields.get("method") == "dynamic":
        del small["calibration_examples"]  # only static quantization is calibrated
    fields |= {name: value for name, value in small.items() if name in fields}
    if fields.get("budget"):
        fields |= {"epochs": 1.0, "budget": None}
    if "teacher_steps" in fields:
        fields["teacher_steps"] = 2 * fields["steps"]
    if fields["kind"] == "prune" and fields["layers"]:
        assert fields["layers"] < LAYERS
        fields["layers"] = 1
    if (student := fields.get("student")) and student.get("layers"):
        assert max(student["layers"]) < LAYERS
        fields["student"] = {"layers": [0]}
    elif student and student.get("config"):
        fields["student"] = {"config": {"hidden_size": 48, "num_hidden_layers": 1, "intermediate_size": 64}}
    elif student and student.get("model"):
        fields["student"] = {"model": "student", "random_weights": True}
    return fields


def write_model(folder: Path) -> None:
    """Save two layers with twelve heads each, as in the sample's six, and a width divisible by the block size."""
    torch.manual_seed(0)
    words = tokenizer()
    config = BertConfig(vocab_size=len(words), hidden_size=48, num_hidden_layers=2, num_attention_heads=12,
        intermediate_size=64, max_position_embeddings=32, id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)})  # fmt: skip
    BertModel(config).save_pretrained(folder)
    words.save_pretrained(folder)


def test_dumped_recipe_equals_the_recipe(tmp_path: Path) -> None:
    for path in RECIPES:
        recipe = read_recipe(path)
        copy = tmp_path / path.name
        copy.write_text(dump_recipe(recipe))
        assert read_recipe(copy) == recipe
