"""Validation of a recipe's parts together: stages follow each other, labels exist, splits are named.

These checks concern several fields. Fields by themselves are validated by pydantic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic_core import to_jsonable_python

from compress.data.config import FILE_SUFFIXES, DataConfig, is_file_name
from compress.data.samples.sample import known_samples
from compress.data.source import draws
from compress.formats.target_profile import TargetProfile
from compress.models.checkpoint import Checkpoint
from compress.models.model import TorchModel
from compress.recipe.document import Document, FieldPath, describe
from compress.recipe.limit_checks import check_limits
from compress.recipe.recipe import CONFLICTING_STUDENT_HINT, START, Benchmark, find_conflicting_student, stage_labels
from compress.recipe.target_entries import ChosenTarget, profile_of
from compress.recipe.target_entries import writer as writer_of
from compress.stages.base import AnyStage
from compress.stages.protocols import ConflictsWithEarlier, PrefersInput, fields_without_effect, starts_from
from compress.stages.registry import STAGES
from compress.tasks.capability import DUAL_ENCODER, EMBEDS, GENERATES, GENERATES_IMAGES, READS_ROWS, TAKES_TEXT
from compress.tasks.evaluation import Evaluation
from compress.tasks.registry import TASKS
from compress.tasks.task import Task
from compress.utils.errors import nearest_name

T = TypeVar("T")

_SLICES = ("slices",)
_ROWS_ONLY = (_SLICES, ("data", "labels"), ("benchmark", "rate"), ("benchmark", "batch_size"))
_NOT_OF_TEXT = ("similarity", "index", "templates", "judge", "pictures")
_GENERATING_ONLY = (
    *(("evaluation", name) for name in Evaluation.model_fields if name not in _NOT_OF_TEXT),
    ("data", "also"),
    ("benchmark", "contexts"),
    ("benchmark", "tokens"),
)
_ONLY = {
    frozenset({READS_ROWS}): _ROWS_ONLY,
    frozenset({GENERATES}): _GENERATING_ONLY,
    frozenset({EMBEDS, TAKES_TEXT}): (("evaluation", "similarity"), ("evaluation", "index")),
    frozenset({DUAL_ENCODER}): (("evaluation", "templates"),),
    frozenset({GENERATES_IMAGES}): (("evaluation", "judge"), ("evaluation", "pictures")),
}
"""Fields that only tasks with certain capabilities have. The recipe in a run's folder has all at their defaults."""
_DEFAULTS = {
    section: {name: to_jsonable_python(getattr(model, name)) for name in type(model).model_fields}
    for section, model in (("data", DataConfig()), ("evaluation", Evaluation()), ("benchmark", Benchmark()))
}


@dataclass(frozen=True)
class ParsedStage:
    """One stage of a document.

    ``cls`` is None if its name is unknown. ``stage`` has the valid fields only; ``whole`` is True if all are valid.
    """

    index: int
    kind: str
    path: FieldPath
    cls: type[AnyStage] | None
    fields: dict[str, Any]
    stage: AnyStage | None
    whole: bool


def check_consistency(
    document: Document,
    parts: list[ParsedStage | None],
    targets: Sequence[str | ChosenTarget],
    kinds: Sequence[Task],
    starts_as: type[Any] = TorchModel,
) -> None:
    """Record every problem between parts of a recipe whose own fields are valid.

    Args:
        document: Receives the problems.
        parts: The stages, None for one that could not be parsed.
        targets: The valid targets.
        kinds: Variants of the task that the model may be for; a recipe is valid if it is valid for one of them.
        starts_as: Class of the starting model.
    """
    profiles = [profile_of(entry) for entry in targets]
    parsed = [part for part in parts if part]
    # A misspelt stage gets the label of the nearest valid name, so that references to it are valid.
    kinds_of_labels = [
        "?" if part is None else part.kind if part.cls else nearest_name(part.kind, STAGES) or part.kind
        for part in parts
    ]
    labels = stage_labels(kinds_of_labels)
    # Record stages that cannot take the output of the stage before them.
    previous_type: type[Any] | None = starts_as
    previous_name = "the starting model"
    for part in parts:
        cls = part.cls if part else None
        takes_start = part is parts[0] and cls is not None and starts_from(cls, starts_as)
        if part and cls and previous_type and not takes_start and not can_follow(previous_type, cls, kinds):
            input_name = _a(input_types(cls, kinds)[0])
            description = f"{part.kind}, which takes {input_name}, after {previous_name}, which is {_a(previous_type)}"
            # Which stages could be at this place, or between the two stages.
            capability_sets = [kind.capabilities for kind in kinds]
            stages = {
                kind: cls_of_kind
                for kind, cls_of_kind in STAGES.items()
                if not capability_sets or any(map(cls_of_kind.supports, capability_sets))
            }
            following = [kind for kind, cls_of_kind in stages.items() if can_follow(previous_type, cls_of_kind, kinds)]
            connecting = [kind for kind in following if can_follow(stages[kind].output_type, cls, kinds)]
            suffix = f", or {' or '.join(connecting)} between the two" if connecting else ""
            document.problem(
                part.path, description, (f"a stage that takes {_a(previous_type)} ({', '.join(following)}){suffix}")
            )
        previous_type = cls.output_type if cls else None
        previous_name = f"the output of stage {part.index} ({part.kind})" if part else ""
    _check_formats(document, parsed, profiles)
    _check_references(document, parts, labels, starts_as)
    _check_one_of(document, ("baseline",), START, (START, *labels), "the label of a stage")
    targets_are_valid = not any(path[:1] == ("targets",) for path in document.broken)
    limits = document.values.get("limits")
    for index in range(len(limits) if isinstance(limits, list) else 0):
        _check_one_of(document, ("limits", index, "of"), None, (START, "baseline", *labels), "a model of the run")
        if targets_are_valid:
            names = [profile.name for profile in profiles]
            _check_one_of(document, ("limits", index, "target"), "cpu", names, "one of the recipe's targets")
    _check_splits(document, parsed)
    _check_needs(document, parsed)
    _check_models(document, parsed)
    _check_task(document, parsed, kinds)
    check_limits(document, kinds)


def _check_task(document: Document, parts: list[ParsedStage], kinds: Sequence[Task]) -> None:
    """Record stages and fields that have no effect for the recipe's task."""
    if not kinds:
        return
    task, capability_sets = kinds[0].name, [kind.capabilities for kind in kinds]
    for part in parts:
        if part.cls and not any(part.cls.supports(capabilities) for capabilities in capability_sets):
            other_tasks = [name for name, other in TASKS.items() if part.cls.supports(other.capabilities)]
            # `prune` and `distill` have variants for other tasks, whose names begin with theirs.
            variants = [
                name
                for name, stage in STAGES.items()
                if name.startswith(f"{part.kind}_") and any(map(stage.supports, capability_sets))
            ]
            expected = f"{' or '.join(variants)}, or a recipe for" if variants else "a recipe for"
            document.problem(part.path, f"{part.kind}, for {task}", f"{expected} {_and(other_tasks)}")
            continue
        for name in _in_all(
            [fields_without_effect(part.stage, capabilities) for capabilities in capability_sets] if part.stage else []
        ):
            document.problem(
                (*part.path, name), describe(getattr(part.stage, name)), f"nothing: it does not apply to {task}"
            )
    unused_fields = [
        [path for needed, paths in _ONLY.items() if not needed <= capability_set for path in paths]
        for capability_set in capability_sets
    ]
    for path in _in_all(unused_fields):
        value, default = _value(document, path, None), _DEFAULTS.get(path[0], {}).get(path[-1])
        if path == _SLICES and isinstance(value, list):
            # Running text may have slices by a column of its rows, but not by length.
            value = [part for part in value if isinstance(part, dict) and "length" in part]
        if value not in (None, [], default):
            document.problem(path, describe(value), f"nothing: it does not apply to {task}")


def _in_all(lists: Sequence[Sequence[T]]) -> list[T]:
    """Return the items that are in every list, in the order of the first."""
    return [item for item in lists[0] if all(item in other_list for other_list in lists[1:])] if lists else []


def _check_formats(document: Document, parts: list[ParsedStage], profiles: Sequence[TargetProfile]) -> None:
    """Record conflicts between a stage that writes a format, named or added by a target, and the stages before it."""
    writers = [(part.stage, parts[:index]) for index, part in enumerate(parts) if part.stage]
    for profile in profiles:
        writer = writer_of(profile.target.format, profile.options)
        if writer is not None and writer.kind not in [part.kind for part in parts]:
            writers.append((writer, parts))
    for writer, earlier in writers:
        for part in {part.kind: part for part in earlier}.values():
            conflict = (
                writer.conflicts_with(part.stage)
                if part.whole and part.stage and isinstance(writer, ConflictsWithEarlier)
                else None
            )
            if conflict is not None:
                field, expected = conflict
                if field is None:
                    document.problem(part.path, f"{part.kind}, before {writer.kind}", expected)
                else:
                    document.problem((*part.path, field), describe(getattr(part.stage, field)), expected)


def input_types(cls: type[AnyStage], kinds: Sequence[Task]) -> list[type[Any]]:
    """Return the classes that a stage takes, one for each variant of the task that the stage supports."""
    supported = [kind.capabilities for kind in kinds if cls.supports(kind.capabilities)]
    if not issubclass(cls, PrefersInput) or not supported:
        return [cls.input_type]
    stage = cls.model_construct(kind=cls.model_fields["kind"].default)
    assert isinstance(stage, PrefersInput)
    return [stage.preferred_input(capabilities) for capabilities in supported]


def can_follow(gives: type[Any], cls: type[AnyStage], kinds: Sequence[Task]) -> bool:
    """Return True if a stage can read an output of class ``gives`` for one of the task's variants."""
    # A Hugging Face folder can be read whole or tensor by tensor.
    return any(
        issubclass(gives, takes) or {gives, takes} == {TorchModel, Checkpoint} for takes in input_types(cls, kinds)
    )


def _a(model: type[Any]) -> str:
    """Return a class name with its article."""
    return f"{'an' if model.__name__[0] in 'AEIOU' else 'a'} {model.__name__}"


def _check_references(
    document: Document, parts: list[ParsedStage | None], labels: tuple[str, ...], starts_as: type[Any]
) -> None:
    """Record references to stages that do not exist, come later or give no torch model."""
    for part in parts:
        for label in part.stage.earlier_outputs() if part and part.stage else ():
            assert part
            earlier = labels[: part.index]
            expected = f"an earlier stage: {', '.join((START, *earlier))}"
            # The path of the stage's field that holds ``value``, so that the problem gets its line.
            path = next(
                ((*part.path, name) for name, field_value in part.fields.items() if field_value == label), part.path
            )
            if label in labels and label not in earlier:
                order = "its own output" if label == labels[part.index] else "a later stage"
                document.problem(path, f"{label!r}, {order}", expected)
            elif label != START and label not in earlier:
                document.problem(path, describe(label), expected, nearest_name(label, [START, *earlier]))
            else:
                referenced = parts[labels.index(label)] if label != START else None
                output_class = (
                    starts_as
                    if label == START
                    else referenced.cls.output_type
                    if referenced and referenced.cls
                    else TorchModel
                )
                if not issubclass(output_class, TorchModel):
                    description = f"{label!r}, which gives {_a(output_class)}"
                    document.problem(path, description, f"a stage that gives {_a(TorchModel)}")


def _check_one_of(document: Document, path: FieldPath, default: object, known: Sequence[str], what: str) -> None:
    """Record a value that is not among the known ones.

    Args:
        document: Receives the problem.
        path: Path of the field.
        default: Value if the field is missing.
        known: Valid values.
        what: Description of the field.
    """
    value = _value(document, path, default)
    if value is not None and value not in known:
        document.problem(path, describe(value), f"{what}: {', '.join(known)}", nearest_name(value, known))


def _check_splits(document: Document, parts: list[ParsedStage]) -> None:
    """Record missing splits, and splits with the rows of the test split."""
    data = document.values.get("data")
    splits = _value(document, ("data", "splits"), DataConfig().splits) if isinstance(data, dict) else None
    if splits is None:
        return
    hold_out = _value(document, ("data", "hold_out"), [], broken=[])
    held_out = [
        entry.get("split", "select")
        for entry in (hold_out if isinstance(hold_out, list) else [hold_out])
        if isinstance(entry, dict)
    ]
    split_names = [*splits, *held_out]
    listed = ", ".join(split_names) or "none"
    path = ("data", "splits") if "splits" in data else ("data",)
    if "test" not in split_names:
        document.problem(path, f"the splits {listed}", "a split `test`, on which the result is measured")
    needs = [(part.kind, part.stage.needs().splits) for part in parts if part.whole and part.stage]
    for split in dict.fromkeys(split for _, needed in needs for split in needed if split not in split_names):
        users = [kind for kind, needed in needs if split in needed]
        document.problem(path, f"the splits {listed}", f"a split {split!r}, which {_and(users)} reads")
    for split, source in splits.items():
        if split != "test" and source == splits.get("test") and draws(source, split) is None:
            expected = "other rows: the test split must not be used by anything else"
            document.problem((*path, split), f"{source!r}, the same as test", expected)
    if _value(document, ("data", "source"), None, broken="?") is None:
        # True if a split's name is the name of a split within a source.
        unlocated = [
            source
            for source in splits.values()
            if (not is_file_name(source) and "/" not in source and draws(source, "") is None)
        ]
        if unlocated:
            expected = f"a source, since not every split names a file ({', '.join(FILE_SUFFIXES)})"
            document.problem(("data", "source"), f"no source for {', '.join(map(repr, unlocated))}", expected)


def _check_needs(document: Document, parts: list[ParsedStage]) -> None:
    """Record splits without the labels that a stage trains on, and missing unlabeled text."""
    if not isinstance(document.values.get("data"), dict):
        return
    unlabeled_splits = _value(document, ("data", "without_labels"), [], broken=[])
    has_text = _value(document, ("data", "unlabeled"), [], broken=["?"])
    for part in parts:
        if part.stage is None:
            continue
        needs = part.stage.needs()
        missing_labels = [split for split in needs.splits if split in unlabeled_splits and needs.labels]
        if missing_labels:
            expected = f"labels in {missing_labels[0]}, which {part.kind} trains on"
            document.problem(("data", "without_labels"), describe(unlabeled_splits), expected)
        if part.whole and needs.unlabeled and not has_text:
            expected = f"at least one source of unlabeled text, which {part.kind} reads"
            document.problem(("data", "unlabeled"), "no unlabeled text", expected)
            has_text = True


def _check_models(document: Document, parts: list[ParsedStage]) -> None:
    """Record samples that do not exist or are of the wrong kind, and names of both trained and random weights."""
    expected_kinds: list[tuple[FieldPath, str]] = [(("model",), "model"), (("data", "source"), "data")]
    expected_kinds += [(("evaluation", name), "data") for name in ("similarity", "questions")]
    expected_kinds.append((("evaluation", "judge"), "model"))
    data = document.values.get("data")
    unlabeled = data.get("unlabeled") if isinstance(data, dict) else None
    count = len(unlabeled) if isinstance(unlabeled, list) else 0
    expected_kinds += [(("data", "unlabeled", index), "data") for index in range(count)]
    stage_references = [
        ((*part.path, *field.split(".")), reference)
        for part in parts
        if part.stage
        for field, reference in part.stage.references().items()
    ]
    expected_kinds += [(path, "model") for path, reference in stage_references if reference.kind == "model"]
    for path, kind in expected_kinds:
        reference = _value(document, path, None)
        if isinstance(reference, str) and reference.startswith("sample:"):
            names = [f"sample:{name}" for name, sample in known_samples().items() if sample.kind == kind]
            if reference not in names:
                suggestion = nearest_name(reference, names)
                listed = ", ".join(names) or "of an installed package, of which there is none"
                expected = (
                    f"a known {kind} sample (`compress samples`)"
                    if suggestion
                    else f"one of the {kind} samples {listed}"
                )
                document.problem(path, describe(reference), expected, suggestion)
    # A student with random weights needs another name than a model with trained weights.
    model = _value(document, ("model",), None)
    stages = [part.stage for part in parts if part.stage]
    conflicting = find_conflicting_student(model, stages) if isinstance(model, str) else None
    for path, reference in stage_references if conflicting is not None else ():
        if reference.name == conflicting:
            document.problem(path, describe(conflicting), CONFLICTING_STUDENT_HINT)


def _and(names: Iterable[str]) -> str:
    """Return names joined with `and`, each once."""
    return " and ".join(dict.fromkeys(names))


def _value(document: Document, path: FieldPath, default: object, broken: object = None) -> Any:
    """Return the value at a path, ``default`` if the recipe has none, ``broken`` if it is invalid."""
    if any(broken_path[: len(path)] == path for broken_path in document.broken):
        return broken
    value = document.values
    for step in path:
        if isinstance(value, dict):
            if step not in value:
                return default
            value = value[step]
        elif isinstance(value, list) and step in range(len(value)):
            value = value[int(step)]
        else:
            return broken
    return value
