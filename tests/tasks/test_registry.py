"""Tests of the task registry: lookup by name, capability and model class, and tasks from plugins."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
from imported import packages_imported_by

from compress import plugins
from compress.plugins import plugin_problems
from compress.stages.registry import STAGES
from compress.tasks import capability, registry
from compress.tasks.capability import (
    DESCRIBES_IMAGES,
    DUAL_ENCODER,
    GENERATES,
    GENERATES_IMAGES,
    HAS_CLASSES,
    HAS_LABELS,
    LOCALIZES,
    READS_ROWS,
    REWRITES,
    SINGLE_CALL,
    TAKES_ARRAYS,
    TAKES_AUDIO,
    TAKES_IMAGES,
    TAKES_PAIRS,
    TRANSCRIBES,
)
from compress.tasks.registry import TASK_NAMES, TASKS, task_of, tasks_with

PLUGIN = """
from compress.tasks.capability import HAS_CLASSES, READS_ROWS, TAKES_TEXT
from compress.tasks.text_classification import TASK, TextClassification

class Sentiment(TextClassification):
    name = "sentiment"
    capabilities = frozenset({READS_ROWS, TAKES_TEXT, HAS_CLASSES, "has stars"})

class Half:
    name = "half"
    columns = ()
    def load(self, directory, labels, trust_remote_code): ...

SENTIMENT = Sentiment()
HALF = Half()
"""


OF_TEXT = ("token-classification", "text-ranking", "fill-mask", "question-answering")
CLASSES = ("image-classification", "audio-classification")
OF_IMAGES = ("image-feature-extraction", "zero-shot-image-classification")
LOCALIZATION = ("object-detection", "image-segmentation")
WRITING = ("text2text-generation", "image-text-to-text")


def test_every_capability_of_tasks_is_a_declared_constant() -> None:
    known = {value for name, value in vars(capability).items() if name.isupper()}
    kinds = [kind for task in TASKS.values() for kind in task.variants()]
    used = frozenset[str]().union(*(kind.capabilities for kind in kinds))
    assert all(kind.columns == TASKS[kind.name].columns for kind in kinds)
    # Only a plug-in has a task that generates images.
    assert used | {capability.GENERATES_IMAGES} == known


@pytest.mark.parametrize(
    ("requires", "excludes", "names"),
    [
        ({GENERATES}, set(), {"text-generation"}),
        ({HAS_CLASSES}, set(), {"text-classification", *CLASSES, *OF_TEXT, *LOCALIZATION}),
        ({TAKES_PAIRS}, set(), {"text-ranking", "question-answering"}),
        ({HAS_CLASSES, TAKES_IMAGES}, set(), {"image-classification", *LOCALIZATION}),
        ({HAS_CLASSES, TAKES_IMAGES}, {LOCALIZES}, {"image-classification"}),
        ({HAS_LABELS}, set(), {"text-classification", *CLASSES, *WRITING, *OF_TEXT, *OF_IMAGES, *LOCALIZATION}),
        ({DUAL_ENCODER}, set(), {"zero-shot-image-classification"}),
        (
            {SINGLE_CALL},
            {TAKES_ARRAYS},
            {"text-classification", *CLASSES, "feature-extraction", *OF_TEXT, *OF_IMAGES, *LOCALIZATION},
        ),
        (set(), {READS_ROWS}, {"text-generation"}),
        ({"no such capability"}, set(), set()),
        (set(), set(), set(TASK_NAMES)),
    ],
)
def test_tasks_are_selected_by_capability(requires: set[str], excludes: set[str], names: set[str]) -> None:
    matching = tasks_with(frozenset(requires), frozenset(excludes))
    assert set(matching) == names
    assert list(matching) == [name for name in TASK_NAMES if name in names]


ITERATIVE = {GENERATES, TRANSCRIBES, REWRITES, DESCRIBES_IMAGES, GENERATES_IMAGES}


def test_iterative_tasks_are_not_single_call() -> None:
    for task in TASKS.values():
        assert (SINGLE_CALL in task.capabilities) != bool(task.capabilities & ITERATIVE)


def test_every_stage_supports_some_task() -> None:
    for stage in STAGES.values():
        assert tasks_with(stage.requires, stage.excludes), stage
        assert stage.supports(stage.requires)
        assert stage.supports(stage.requires | stage.excludes) is not bool(stage.excludes)


def test_registry_import_does_not_import_torch_or_numpy() -> None:
    assert packages_imported_by("import compress.tasks.registry").isdisjoint({"torch", "numpy", "pyarrow"})


@pytest.fixture
def plugged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Return a mutable mapping name -> object reference of the entry points in the task group."""
    (tmp_path / "plugged_tasks.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugins, "_problems", {})
    values: dict[str, str] = {}
    monkeypatch.setattr(
        plugins,
        "entry_points",
        lambda group: EntryPoints(EntryPoint(*pair, group) for pair in values.items() if group == "compress.tasks"),
    )
    yield values
    sys.modules.pop("plugged_tasks", None)


def test_plugin_task_is_registered(plugged: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    plugged["mine"] = "plugged_tasks:SENTIMENT"
    registered = registry._registered()
    assert list(registered) == [*TASK_NAMES, "sentiment"] and not plugin_problems()
    monkeypatch.setattr(registry, "TASKS", registered)
    assert tasks_with(frozenset({"has stars"})) == ("sentiment",)
    assert tasks_with(STAGES["finetune"].requires)[-1] == "sentiment"
    assert "sentiment" not in tasks_with(STAGES["cast"].requires)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("plugged_tasks:HALF", "it has no capabilities, "),
        ("plugged_tasks:HALF", "encode, loss, measure"),
        ("plugged_tasks:Sentiment", "Sentiment is a class; expected an object, such as Sentiment()"),
        ("plugged_tasks:TASK", "compress has one of this name built in"),
        ("not_there_at_all:TASK", "ModuleNotFoundError"),
    ],
)
def test_invalid_plugin_task_is_reported(plugged: dict[str, str], value: str, reason: str) -> None:
    plugged |= {"fine": "plugged_tasks:SENTIMENT", "wrong": value}
    assert list(registry._registered()) == [*TASK_NAMES, "sentiment"]
    (error,) = plugin_problems()
    assert reason in str(error) and error.provider == f"the package {value.partition(':')[0]}"


def test_task_of_model_class_agrees_with_optimum() -> None:
    """Compares every class that optimum lists for these tasks; a class may be unknown here, but must not differ."""
    from optimum.exporters.tasks import TasksManager

    classes = {
        name: (task, classes_of_task)
        for task in TASK_NAMES
        if task in TasksManager._TRANSFORMERS_TASKS_TO_MODEL_MAPPINGS
        for classes_of_task in TasksManager._TRANSFORMERS_TASKS_TO_MODEL_MAPPINGS[task].values()
        for name in ([classes_of_task] if isinstance(classes_of_task, str) else classes_of_task)
    }
    prepared = {TAKES_IMAGES, TAKES_AUDIO}
    task_by_class = {
        name: task_of(name, bool(prepared & TASKS[task].capabilities)) for name, (task, _) in classes.items()
    }
    wrong = {name for name, (task, _) in classes.items() if task_by_class[name] not in (task, None)}
    assert wrong == set()
    known = [name for name, (task, _) in classes.items() if task_by_class[name] == task]
    assert len(known) > 0.9 * len(classes)


@pytest.mark.parametrize(
    ("architecture", "has_preprocessor", "task"),
    [
        ("BertModel", False, "feature-extraction"),
        ("GPT2LMHeadModel", False, "text-generation"),
        ("WhisperForConditionalGeneration", True, "automatic-speech-recognition"),
        ("LlavaForConditionalGeneration", True, "image-text-to-text"),
        ("WavLMForSequenceClassification", True, "audio-classification"),
        ("LayoutLMv3ForSequenceClassification", True, None),
        ("ViTModel", True, None),
        ("MT5ForConditionalGeneration", False, "text2text-generation"),
        ("Gemma3ForConditionalGeneration", False, None),
        ("Dinov2Model", True, "image-feature-extraction"),
        ("CLIPModel", True, "zero-shot-image-classification"),
        ("CLIPModel", False, "feature-extraction"),
        ("BertForNextSentencePrediction", False, None),
    ],
)
def test_task_is_inferred_from_longest_class_suffix(
    architecture: str, has_preprocessor: bool, task: str | None
) -> None:
    assert task_of(architecture, has_preprocessor) == task
