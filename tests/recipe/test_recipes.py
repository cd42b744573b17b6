"""Every recipe in the tree: its header, its validity, and a whole run at tiny scale."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
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
from compress.tasks.capability import EMBEDS, GENERATES
from compress.tasks.evaluation import Evaluation
from compress.tasks.registry import get_task
from compress.utils.progress import SilentProgress

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))
ALWAYS = [path for path in RECIPES if path.stem in ("quickstart", "smollm2-int4")]
TEXT = ("text-classification", "text-generation", "feature-extraction")
"""Tasks whose recipes are run at tiny scale: whole runs of the other tasks are tests of their own."""
OTHERS = [path for path in RECIPES if path not in ALWAYS and read_recipe(path).task in TEXT]
TODAY = [*ALWAYS, *todays(OTHERS, 4, lambda path: path.stem)]
QUICK = Benchmark(budget_seconds=0.1, examples=8, batch_size=4, launches=2, every_stage=False)
"""One launch of each model: that it is timed, and not how well, matters here."""
LAYERS = 6
"""Of the sample that the recipes' layers are those of; the toy models have two."""
HEADER = ("command:", "hardware:", "time:", "expect:")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_header_says_command_hardware_time_and_figures(path: Path) -> None:
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(comments)
    assert all(word in text for word in HEADER)
    assert f"compress run recipes/{path.name}" in text
    assert re.search(r"expect:.*\d", text), "figures to expect"


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all recipes: what several begin with is trained and exported for the first of them."""
    return tmp_path_factory.mktemp("artifacts")


@pytest.mark.parametrize("path", TODAY, ids=lambda path: path.stem)
def test_runs_at_tiny_scale(path: Path, tmp_path: Path, artifacts: Path) -> None:
    recipe = shrunk(read_recipe(path), tmp_path)
    done = run(recipe, tmp_path, artifacts, SilentProgress())
    assert [stage.name for stage in done.report.stages] == list(recipe.labels())
    rows = {(row.model, row.metric): row.value for row in done.report.measurements}
    assert rows["final", "size_bytes"] < rows["baseline", "size_bytes"]
    generates = GENERATES in get_task(recipe.task).capabilities
    assert rows["final", "time_per_output_token_ms_context_128" if generates else "latency_ms"] > 0
    assert len(done.report.limits) == len(recipe.limits)


def shrunk(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe on a toy model and toy rows, trained for a few steps, its limits kept for judging."""
    if GENERATES in get_task(recipe.task).capabilities:
        return _shrunk_generation(recipe, folder)
    write_model(folder / "model")
    (write_pairs if EMBEDS in get_task(recipe.task).capabilities else write_rows)(folder)
    with (folder / "unlabeled.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], ["the film was quite moving"], ["the film was quite boring"]])
    splits = {split: f"{split}.csv" for split in ("train", "validation", "test")}
    unlabeled = ("unlabeled.csv",) if recipe.data.unlabeled else ()
    data = _local_data(recipe, splits, unlabeled=unlabeled, labels=None, max_length=16)
    evaluation = Evaluation(similarity="rated.csv") if recipe.evaluation.similarity else recipe.evaluation
    return _shrunk(recipe, data=data, evaluation=evaluation)


def _shrunk(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with these fields, its stages shrunk, and this machine's processor in place of its targets."""
    changed = recipe.model_copy(update={"model": "model", "benchmark": QUICK, **changes}).model_dump()
    stages = [_shrunk_stage(stage.model_dump()) for stage in recipe.stages]
    limits = [{**limit.model_dump(), "target": "cpu"} for limit in recipe.limits]
    return Recipe.model_validate({**changed, "stages": stages, "targets": ("cpu",), "limits": limits})


def _local_data(recipe: Recipe, splits: dict[str, str], **changes: Any) -> DataConfig:
    return recipe.data.model_copy(update={"source": None, "splits": splits, **changes})


def _shrunk_generation(recipe: Recipe, folder: Path) -> Recipe:
    """Two layers of Llama or Mixtral; the prompts stay as long as the recipe's limits speak of."""
    if any(stage.kind == "gguf" for stage in recipe.stages):
        save_mergeable_llama(folder / "model")  # llama.cpp wants merges
    else:
        save = save_tiny_mixture if "mixture" in recipe.description.lower() else save_tiny_llama
        save(folder / "model")
    write_texts(folder)
    splits = {split: f"{split}.jsonl" for split in ("train", "test")}
    changes = {
        "model": "model",
        "data": _local_data(recipe, splits, max_length=32),
        "evaluation": Evaluation(windows=4, prompts=2, prompt_tokens=8, tokens=8),
        "benchmark": recipe.benchmark.model_copy(
            update={"budget_seconds": 0.1, "tokens": 4, "launches": 2, "threads": 1}
        ),
    }
    stages = [_shrunk_generation_stage(stage.model_dump(exclude_unset=True)) for stage in recipe.stages]
    return Recipe.model_validate({**recipe.model_copy(update=changes).model_dump(), "stages": stages})


def save_tiny_mixture(folder: Path) -> None:
    """A Mixtral of the same sizes, with four experts a block."""
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
    small = {"epochs": 0.2, "batch_size": 8, "importance_examples": 16, "min_count": 1, "learning_rate": 1e-3}
    small |= {"calibration_examples": 16, "dimensions": 8, "keep": ()}
    if fields.get("method") == "dynamic":
        del small["calibration_examples"]  # only static quantization is calibrated
    fields |= {name: value for name, value in small.items() if name in fields}
    if fields.get("budget"):
        fields |= {"epochs": 1.0, "budget": None}
    if fields["kind"] == "prune" and fields["layers"]:
        assert fields["layers"] < LAYERS
        fields["layers"] = 1
    if (student := fields.get("student")) and student.get("layers"):
        assert max(student["layers"]) < LAYERS
        fields["student"] = {"layers": [0]}
    elif student and student.get("config"):
        fields["student"] = {"config": {"hidden_size": 48, "num_hidden_layers": 1, "intermediate_size": 64}}
    return fields


def write_model(folder: Path) -> None:
    """Two layers of twelve heads, as many as the sample's six have, with a width that has a block size."""
    torch.manual_seed(0)
    words = tokenizer()
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=12,
        intermediate_size=64,
        max_position_embeddings=32,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    BertModel(config).save_pretrained(folder)
    words.save_pretrained(folder)


def test_dumped_recipe_is_the_recipe(tmp_path: Path) -> None:
    for path in RECIPES:
        recipe = read_recipe(path)
        copy = tmp_path / path.name
        copy.write_text(dump_recipe(recipe))
        assert read_recipe(copy) == recipe
