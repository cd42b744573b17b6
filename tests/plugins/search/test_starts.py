"""What a search of a model begins with: of every task something fits and is worth varying."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from compress.plugins.search.default_space import initial_stages
from compress.stages.cost_model import Shape
from compress.stages.protocols import search_values
from compress.stages.registry import STAGES
from compress.tasks.registry import TASKS
from compress.tasks.task import Task

TRANSFORMER = Shape(2e6, 4e6, 8e6, 1e5, layers=6, hidden=384, intermediate=1536, heads=12)
CONVOLUTIONS = Shape(0, 0, 0, 5e6, layers=0)
KINDS = [(name, kind) for name, task in TASKS.items() if task.starter for kind in task.variants()]


def anything(kind: str, fields: object) -> bool:
    return True


def written(stage: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    ((kind, fields),) = stage.items()
    return kind, fields


@pytest.mark.parametrize(("name", "kind"), KINDS, ids=[f"{name}-{type(kind).__name__}" for name, kind in KINDS])
def test_every_kind_of_task_has_stages_that_fit_it_and_recipes_to_choose_from(name: str, kind: Task) -> None:
    stages = initial_stages(kind, TASKS[name].starter["stages"], TRANSFORMER, anything)
    recipes = 1
    for initial_stage in stages:
        label, fields = written(initial_stage)
        stage = STAGES[label].model_validate({"kind": label, **fields})
        assert stage.supports(kind.capabilities), f"{label} is not for {name}"
        recipes *= math.prod(len(set(map(str, tried))) for tried in search_values(stage, TRANSFORMER).values())
    assert recipes >= 4, stages
    assert not any("model" in (fields.get("student") or {}) for _, fields in map(written, stages))


def test_what_was_trained_is_cut_and_learns_again_by_what_the_architecture_has() -> None:
    task = TASKS["image-classification"]
    stages = [written(stage) for stage in initial_stages(task, task.starter["stages"], TRANSFORMER, anything)]
    assert [kind for kind, _ in stages] == ["finetune", "prune", "distill", "onnx", "onnx_int8"]
    assert stages[1][1] == {"feed_forward": 0.25}
    assert stages[2][1]["teacher"] == "finetune"
    convolutions = [written(stage) for stage in initial_stages(task, task.starter["stages"], CONVOLUTIONS, anything)]
    assert convolutions[1][1] == {"flops": 0.3}
    prune = STAGES["prune"].model_validate({"kind": "prune", "flops": 0.3})
    assert set(search_values(prune, CONVOLUTIONS)) == {"flops"}
    assert set(search_values(STAGES["prune"].model_validate({"kind": "prune", "heads": 0.5}), TRANSFORMER)) == {
        "heads", "feed_forward",
    }  # fmt: skip


def test_what_an_architecture_has_not_is_not_cut() -> None:
    task = TASKS["audio-classification"]
    stages = task.starter["stages"]
    initial = initial_stages(task, stages, TRANSFORMER, lambda _, fields: "feed_forward" not in fields)
    assert written(initial[1]) == ("prune", {"heads": 0.25})
    assert initial_stages(task, stages, TRANSFORMER, lambda *_: False) == stages


def test_nothing_is_cut_of_a_model_that_nobody_has_seen_or_that_the_starter_cuts_already() -> None:
    images, texts = TASKS["image-classification"], TASKS["text-classification"]
    assert initial_stages(images, images.starter["stages"], None, anything) == images.starter["stages"]
    stages = initial_stages(texts, texts.starter["stages"], TRANSFORMER, anything)
    assert [written(stage)[0] for stage in stages] == [written(stage)[0] for stage in texts.starter["stages"]]


@pytest.mark.parametrize(("layers", "kept"), [(12, [1, 3, 5, 7, 9, 11]), (4, [1, 3]), (3, [2]), (1, None)])
def test_a_student_has_half_of_the_model_s_own_layers(layers: int, kept: list[int] | None) -> None:
    """The starter's layers are those of the model that it names."""
    task = TASKS["text-classification"]
    fields = dict(map(written, initial_stages(task, task.starter["stages"], replace(TRANSFORMER, layers=layers),
                                               anything)))  # fmt: skip
    assert fields["distill"].get("student") == (None if kept is None else {"layers": kept})
    whole = dict(map(written, initial_stages(task, task.starter["stages"], TRANSFORMER, lambda *_: False)))
    assert "student" not in whole["distill"] and whole["distill"]["teacher"] == "finetune"


def test_speech_that_names_frames_has_other_stages_than_speech_that_writes() -> None:
    task = TASKS["automatic-speech-recognition"]
    writes, names = (
        [kind for kind, _ in map(written, initial_stages(variant, task.starter["stages"], TRANSFORMER, anything))]
        for variant in task.variants()
    )
    assert writes == ["onnx", "onnx_int8", "onnx_weight_only"]
    assert names == ["finetune", "prune", "distill", "onnx", "onnx_int8"]


def test_tables_are_asked_about_where_they_weigh_something() -> None:
    quantize = STAGES["onnx_int8"].model_validate({"kind": "onnx_int8"})
    assert set(quantize.search_values(TRANSFORMER)) == {"embedding_bits", "embedding_block_size"}
    assert set(quantize.search_values(CONVOLUTIONS)) == set()


def test_how_ranges_are_found_is_asked_for_the_sake_of_time_alone_and_of_one_graph() -> None:
    quantize = STAGES["onnx_int8"].model_validate({"kind": "onnx_int8"})
    assert quantize.search_values(CONVOLUTIONS, timed=True) == {"method": ("dynamic", "static")}
    encoder = STAGES["onnx_int8"].model_validate({"kind": "onnx_int8", "part": "encoder"})
    assert "method" not in encoder.search_values(TRANSFORMER, timed=True)
