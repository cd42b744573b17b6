"""A search that cannot begin says so before any work, and what a model cannot have is left out by name."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_generation
import tiny_places
import tiny_run
import tiny_sounds
from mergeable import save_mergeable_llama

from compress.plugins.search.cli_options import SearchOptions, build_document
from compress.plugins.search.dry_run import SpaceSummary, prepare_dry_run
from compress.recipe.document import read_document
from compress.utils.errors import CompressError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torch", "ignore::DeprecationWarning")

PRUNE = {"prune": {"feed_forward": 0.5, "importance_examples": 8}}


def of_recipe(folder: Path, stages: list[Any], choices: dict[str, list[Any]], **block: Any) -> SpaceSummary:
    """The opening of a recipe that trains for long, over a model of two layers with two heads each."""
    every = [{"finetune": {"epochs": 20}}, *stages, {"onnx": {}}, {"onnx_int8": {}}]
    choices = {**choices, f"stages.{len(every) - 1}.onnx_int8.embedding_bits": [8, 4]}
    search = {"choices": choices, "select": {"rows": 20}, **block}
    path = tiny_run.write_all(folder, stages=every, search=search)
    with prepare_dry_run(read_document(path), folder, folder / "artifacts") as prepared:
        return prepared.summary("here")


def of_limits(folder: Path, task: str, *sets: str) -> SpaceSummary:
    """The opening of a search from a model and data alone."""
    asked = SearchOptions(model=str(folder / "model"), data=str(folder), task=task, keep=0.3)
    document, home, origin = build_document(None, asked, sets)
    with prepare_dry_run(document, home, folder / "artifacts") as prepared:
        return prepared.summary(origin)


def test_values_that_the_model_cannot_have_are_left_out_each_with_its_reason(tmp_path: Path) -> None:
    choices = {"stages.1.prune.heads": [0.25, 0.5, 0.75], "stages.2.distill.student.layers": [[0], [0, 1, 2]]}
    opening = of_recipe(tmp_path, [PRUNE, {"distill": {"student": {"layers": [0, 1]}}}], choices)
    others = {choice.name: choice.others for choice in opening.choices}
    assert others["stages.1.prune.heads"] == ("0.25", "0.5")
    assert others["stages.2.distill.student.layers"] == ("[0]",)
    assert set(opening.refused) == {"stages.1.prune.heads=0.75", "stages.2.distill.student.layers=[0, 1, 2]"}
    assert "leaves none" in opening.refused["stages.1.prune.heads=0.75"]
    assert sum("left out" in line for line in opening.lines()) == 2
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ([{"distill": {"student": {"layers": [0, 2, 4]}}}], r"Layers \[0, 2, 4\] cannot be kept in a model with 2"),
        ([{"prune": {"heads": 0.2}}], "heads 0.2 would remove nothing"),
        ([{"prune": {"layers": 1}}, {"distill": {"student": {"layers": [0, 1]}}}], r"Layers \[0, 1\] cannot be kept"),
    ],
)
def test_a_recipe_that_cannot_run_is_refused_before_any_work(tmp_path: Path, stages: list[Any], says: str) -> None:
    """The last for what its stages come to together: each by itself fits."""
    with pytest.raises(CompressError, match=says):
        of_recipe(tmp_path, stages, {})
    assert not (tmp_path / "artifacts").exists()


def test_a_budget_shorter_than_the_first_trial_is_said_before_it(tmp_path: Path) -> None:
    choices = {"stages.1.prune.feed_forward": [0.25]}
    short, long = (of_recipe(tmp_path / budget, [PRUNE], choices, budget=budget) for budget in ("1s", "10h"))
    assert short.first_seconds > 1
    assert any("longer than the budget of 1s" in line for line in short.lines())
    assert not any("longer than the budget" in line for line in long.lines())


def test_a_model_of_one_layer_begins_without_a_student_of_fewer(tmp_path: Path) -> None:
    import transformers

    tiny_run.write_all(tmp_path)
    config = transformers.BertConfig(vocab_size=len(tiny_run.tokenizer()), hidden_size=32, num_hidden_layers=1,
                                   num_attention_heads=2, intermediate_size=32, max_position_embeddings=32)  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path / "model")
    opening = of_limits(tmp_path, "text-classification")
    assert "distill" in opening.stages
    assert not any("student" in choice.name for choice in opening.choices)


def test_labels_beside_a_model_that_tells_no_classes_are_pointed_out(tmp_path: Path) -> None:
    """An encoder tells `feature-extraction`, and whoever has labels wants a classifier."""
    import transformers

    tiny_run.write_all(tmp_path)
    config = transformers.BertConfig(vocab_size=len(tiny_run.tokenizer()), hidden_size=8, num_hidden_layers=1,
                                   num_attention_heads=1, intermediate_size=8)  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path / "model")
    _, _, origin = build_document(None, SearchOptions(model=str(tmp_path / "model"), data=str(tmp_path), keep=0.9))
    assert "feature-extraction" in origin
    assert "column 'label', which --task text-classification would learn" in origin
    _, _, chosen = build_document(
        None, SearchOptions(model=str(tmp_path / "model"), data=str(tmp_path), keep=0.9, task="feature-extraction")
    )
    assert "would learn" not in chosen, "it was chosen"


def test_speech_of_few_heads_is_cut_by_what_comes_to_one(tmp_path: Path) -> None:
    tiny_sounds.write_splits(tmp_path, {"train": 24, "test": 8})
    tiny_sounds.write_model(
        tmp_path / "model", lambda: tiny_sounds.waves("Wav2Vec2", masked=False, ending="CTC"), letters=True
    )
    opening = of_limits(tmp_path, "automatic-speech-recognition")
    assert "prune" in opening.stages, "by a half of two heads, since a quarter is none"
    assert "would remove nothing" in opening.refused["stages.1.prune.heads=0.25"]


def test_masks_without_names_are_told_how_to_name_their_classes(tmp_path: Path) -> None:
    tiny_places.write_all(tmp_path, "segformer", [])
    with pytest.raises(CompressError, match="the label '0', which the model lacks") as caught:
        of_limits(tmp_path, "image-segmentation")
    assert f"data.labels: [{', '.join(tiny_places.LABELS)}]" in str(caught.value)
    opening = of_limits(tmp_path, "image-segmentation", f"data.labels=[{', '.join(tiny_places.LABELS)}]")
    assert "prune" in opening.stages


def test_text_too_short_to_calibrate_with_is_told_before_the_search(tmp_path: Path) -> None:
    tiny_generation.write_all(tmp_path)
    with pytest.raises(CompressError, match="windows of 512 tokens") as caught:
        of_limits(tmp_path, "text-generation")
    assert "stages.1.gptq" in str(caught.value) and "lower samples" in str(caught.value)


def test_a_language_model_for_llama_cpp_is_searched_among_its_file_types(tmp_path: Path) -> None:
    words = ("the", "river", "runs", "over", "under", "hill", "red", "stone")
    rows = [json.dumps({"text": " ".join(random.Random(seed).choices(words, k=60))}) for seed in range(800)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    save_mergeable_llama(tmp_path / "model", max_position_embeddings=1024)
    asked = SearchOptions(
        model=str(tmp_path / "model"), data=str(tmp_path / "rows.jsonl"), keep=0.9, target="llama-cpp"
    )
    document, home, origin = build_document(None, asked)
    assert document.values["stages"] == [{"imatrix": {}}, {"gguf": {"type": "Q4_K_M"}}]
    assert document.values["data"]["max_length"] == 512, "as the task's starter has it"
    with prepare_dry_run(document, home, tmp_path / "artifacts") as prepared:
        (choice,) = prepared.summary(origin).choices
    assert (choice.name, len(choice.others)) == ("stages.1.gguf.type", 23)
    document, _, _ = build_document(None, replace(asked, target="cpu"))
    assert [next(iter(stage)) for stage in document.values["stages"]] == ["equalize", "gptq", "onnx"]
