"""The recipe as frozen, strict pydantic models, from which everything about a run follows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from compress.data.config import DataConfig, HoldOut
from compress.data.slices import Slice, check_names
from compress.formats.target_profile import TargetProfile, find_processor
from compress.formats.targets import PROFILES
from compress.recipe.policy import CannotTell, Policy
from compress.recipe.target_entries import ChosenTarget, ProcessorClass, from_entry, profile_of
from compress.results.formatting import parse_duration
from compress.stages.base import AnyStage, all_references
from compress.stages.protocols import ResolvesForTargets
from compress.stages.registry import RecipeStage
from compress.tasks.capability import DUAL_ENCODER, SINGLE_CALL, TAKES_IMAGES
from compress.tasks.evaluation import Evaluation
from compress.tasks.registry import TASK_NAMES, tasks_with
from compress.utils.pydantic_models import Frozen
from compress.utils.torch_device import PATTERN


class Search(Frozen):
    """Settings of a search. Limits are the recipe's own, and the unchanged recipe is the first trial."""

    minimize: tuple[str, ...] = Field(
        ("size_bytes",),
        min_length=1,
        max_length=2,
        description="a metric, or two for a Pareto front, to minimize within the limits",
    )
    budget: str = Field("60m", description="time for all trials and the final evaluation: 90s, 60m, 1h30m")
    trials: int | None = Field(None, ge=1, description="largest number of recipes to try")
    select: HoldOut = Field(
        HoldOut(rows=1500),
        description="rows held out of training that select the recipe: {from: train, rows: N}",
    )
    choices: dict[str, tuple[Any, ...]] = Field(
        {}, description="maps fields, named as in `--set`, to values to try beside the recipe's own"
    )
    optional: tuple[str, ...] = Field((), description="labels of stages that may be left out")
    target: str | None = Field(None, description="target that trials are measured on; default: the recipe's first")
    confidence: float = Field(
        0.95, gt=0.5, lt=1, description="probability with which a recipe must keep a limit on quality"
    )
    rungs: tuple[float, ...] = Field(
        (1 / 9, 1 / 3),
        description="shares of the training after which a trial may be stopped; (): no early stopping",
    )
    seeds: int = Field(2, ge=0, le=9, description="additional seeds that the best recipe is trained with at the end")
    refit: bool | None = Field(
        None,
        description="retrain the best recipe at the end with the selection rows as well; default: if they are at least "
        "5% of the training rows",
    )

    @field_validator("minimize", mode="before")
    @classmethod
    def _one_or_two(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value

    @field_validator("budget")
    @classmethod
    def _is_a_time(cls, value: str) -> str:
        parse_duration(value)
        return value

    @field_validator("rungs")
    @classmethod
    def _rising_shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < share < 1 for share in value) or list(value) != sorted(set(value)):
            raise ValueError("rising shares between 0 and 1")
        return value

    @property
    def seconds(self) -> float:
        """Return the budget in seconds."""
        return parse_duration(self.budget)


START = "start"
"""Label of the starting model, beside those of stages."""
CONFLICTING_STUDENT_HINT = (
    "a student with random weights that has another name than a model that the recipe loads; "
    "`student: {config: {}}` creates random weights from the config of the stage's input"
)


class Limit(Frozen):
    """Bound on a metric of the final model, absolute or relative to another model of the run."""

    metric: str = Field(description="a measured quantity, e.g. `accuracy`, `size_bytes` or `latency_ms`")
    target: str = Field("cpu", description="one of the recipe's targets, on which the metric is measured")
    at_least: float | None = Field(None, description="the smallest value that passes")
    at_most: float | None = Field(None, description="the largest value that passes")
    of: str | None = Field(None, description="bound the ratio to this model's value, e.g. `baseline`")
    processor: ProcessorClass | None = Field(
        None, description="processor class that the limit applies to; it is skipped on others. Default: all"
    )

    @model_validator(mode="after")
    def _one_bound(self) -> Limit:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("exactly one of at_least and at_most")
        return self

    @property
    def bound(self) -> float:
        """Return the bound that is set."""
        return (self.at_least if self.at_least is not None else self.at_most) or 0.0


class Verdicts(Frozen):
    """Effect of an inconclusive limit on the exit code: the limit is inside the interval of the value."""

    cannot_tell: CannotTell = Field(
        "warn",
        description="action for an inconclusive limit: `pass`, `warn` (exit code 0) or `fail` (exit code 1)",
    )
    within_chance: CannotTell | None = Field(
        None, description="the same for limits on quality only, if it differs from `cannot_tell`"
    )

    def action(self, is_quality: bool) -> CannotTell:
        """Return the action for an inconclusive limit on a quality, or on something else."""
        return (self.within_chance if is_quality else None) or self.cannot_tell


class Licences(Frozen):
    """Licences that the recipe's sources do not state, and permissions of their owners."""

    stated: dict[str, str] = Field(
        {}, description="maps a model, adapter or data set, as the recipe names it, to its licence, e.g. `CC-BY-4.0`"
    )
    allowed: dict[str, str] = Field(
        {},
        description="maps the same names to the reason why you may do what the licence forbids, e.g. `agreement of "
        "2 May 2026`; without a reason the recipe is refused",
    )

    @field_validator("allowed")
    @classmethod
    def _reasons(cls, value: dict[str, str]) -> dict[str, str]:
        if any(not reason.strip() for reason in value.values()):
            raise ValueError("a reason for each")
        return value


class Benchmark(Frozen):
    """Settings of timing."""

    threads: int = Field(2, ge=1, description="intra-operator threads of the runtime")
    batched: bool = Field(True, description="also time batches: throughput, and memory with them")
    batch_size: int = Field(32, ge=1, description="batch of the throughput measurement")
    seconds: float = Field(3.0, gt=0, description="time budget for each model and scenario")
    launches: int = Field(
        6,
        ge=2,
        description="minimum number of rounds of new processes; up to twice as many until ratios are precise",
    )
    """With fewer than six sets the interval is too wide to be useful, and a median has none at 95%."""
    budget_seconds: float | None = Field(
        None, gt=0, description="time budget for the whole session with starts and warm-ups, instead of `seconds`"
    )
    rate: float | None = Field(
        None,
        gt=0,
        description="requests per second of the server scenario (Poisson arrivals); default: no such scenario",
    )
    contexts: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (128,), min_length=1, description="text generation: prompt lengths in tokens, each timed separately"
    )
    tokens: int = Field(32, ge=1, description="text generation: tokens that are timed after the first")
    picture_steps: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="image generation: numbers of sampling steps to time, beside each model's own"
    )
    picture_sizes: tuple[Annotated[int, Field(ge=8)], ...] = Field(
        (), description="image generation: image sizes in pixels to time, beside the model's own"
    )
    examples: int = Field(256, ge=8, description="test rows sampled for the latency scenarios")
    every_stage: bool = Field(True, description="measure the output of every stage, not just baseline and final")


def _with_kind(value: object) -> object:
    """Return `{distill: {...}}` or `distill` as the stage's fields with `kind`."""
    if isinstance(value, str):
        return {"kind": value}
    if isinstance(value, dict) and len(value) == 1 and "kind" not in value:
        ((kind, fields),) = value.items()
        if fields is None or isinstance(fields, dict):
            return {**(fields or {}), "kind": kind}
    return value


_MODULES = tasks_with(frozenset({TAKES_IMAGES, SINGLE_CALL}), frozenset({DUAL_ENCODER}))
"""Tasks whose model may be a custom torch module."""


class Recipe(Frozen):
    """Compression run from a starting model to a measured artifact."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the recipe and of its runs' folder")
    description: str = Field("", description="purpose of the recipe in one line")
    task: Annotated[
        str,
        Field(
            description="Hugging Face name of the task; default: inferred from the config of a local model",
            json_schema_extra={"enum": list(TASK_NAMES)},
        ),
    ]
    model: str = Field(description="Hugging Face id, local folder, GGUF or ONNX file, or `sample:NAME`")
    module: str | None = Field(
        None,
        pattern=r"^([A-Za-z_][\w.]*|[\w-]+\.py):[A-Za-z_][\w.]*$",
        description="for a custom torch module: the function that builds it, as `package.module:function`, or "
        "`file.py:function` beside the recipe. The recipe runs that code; `model` then names the weights",
    )
    module_arguments: dict[str, Any] = Field({}, description="keyword arguments of `module`")
    random_weights: bool = Field(
        False,
        description="start from random weights: only config.json and the processor of `model` are used",
    )
    trust_remote_code: bool = Field(False, description="run Python code from the model's repository")
    safety_checker: Literal["keep", "leave_out"] | None = Field(
        None, description="text to image: keep or remove the pipeline's safety checker; required if it has one"
    )
    data: DataConfig = Field(description="data for training, calibration and evaluation")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of all random numbers; the same seed gives the same model")
    device: str = Field(
        "auto",
        pattern=PATTERN,
        description="torch device of the stages: `cpu`, `cuda`, `cuda:1`, `mps`; `auto` is CUDA if torch supports it. "
        "Files are still evaluated and timed on their targets",
    )
    stages: tuple[Annotated[RecipeStage, BeforeValidator(_with_kind)], ...] = Field(
        min_length=1, description="stages in the order in which they run"
    )
    baseline: str = Field(
        "start", description="label of the stage whose output is the baseline of comparisons, or `start`"
    )
    targets: tuple[Annotated[str | ChosenTarget, BeforeValidator(from_entry)], ...] = Field(
        ("cpu",),
        description="targets that the result is written for and measured on: names, `{NAME: {...}}` with fields of "
        "the target or of the stage that writes its format, or files that describe a custom target",
    )
    evaluation: Evaluation = Field(
        Evaluation(), description="evaluation of language models and image generators, beside the test rows"
    )
    benchmark: Benchmark = Field(Benchmark(), description="settings of timing")
    slices: tuple[Slice, ...] | None = Field(
        None, description="parts of the test data that are also evaluated separately; default: those of the task"
    )
    limits: tuple[Limit, ...] = Field((), description="bounds on metrics of the final model")
    verdicts: Verdicts = Field(Verdicts(), description="exit code for limits that are inside the interval of the value")
    licences: Licences = Field(Licences(), description="licences that the sources do not state, and permissions")
    search: Search | None = Field(None, description="fields that `compress search` varies; ignored by a run")
    gate: Policy | None = Field(
        None, description="regressions against a baseline that matter; default: those of `compress gate`"
    )

    @field_validator("task")
    @classmethod
    def _known_task(cls, value: str) -> str:
        if value not in TASK_NAMES:
            raise ValueError(f"one of {', '.join(TASK_NAMES)}")
        return value

    @field_validator("targets")
    @classmethod
    def _known_targets(cls, value: tuple[str | ChosenTarget, ...]) -> tuple[str | ChosenTarget, ...]:
        names = [entry if isinstance(entry, str) else entry.name for entry in value]
        if any(isinstance(entry, str) and entry not in PROFILES for entry in value):
            raise ValueError(f"one of {', '.join(PROFILES)}")
        if len(set(names)) < len(names):
            raise ValueError("each target once")
        return value

    @field_validator("slices")
    @classmethod
    def _distinct_slices(cls, value: tuple[Slice, ...] | None) -> tuple[Slice, ...] | None:
        check_names(value or ())
        return value

    @field_validator("module")
    @classmethod
    def _task_of_module(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("task") not in (None, *_MODULES):
            raise ValueError(f"no `module`: plain torch modules are for {', '.join(_MODULES)}")
        return value

    @field_validator("module_arguments")
    @classmethod
    def _module_of_arguments(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if value and info.data.get("module", "") is None:
            raise ValueError("a `module` that `module_arguments` are for")
        return value

    @field_validator("stages")
    @classmethod
    def _students_differ(cls, value: tuple[AnyStage, ...], info: ValidationInfo) -> tuple[AnyStage, ...]:
        if (name := find_conflicting_student(info.data.get("model", ""), value)) is not None:
            raise ValueError(f"for {name!r}, {CONFLICTING_STUDENT_HINT}")
        return value

    @property
    def task_is_inferred(self) -> bool:
        """Return True if the task was inferred from the model's config."""
        return "task" not in self.model_fields_set

    def profiles(self) -> tuple[TargetProfile, ...]:
        """Return the profiles of the recipe's targets."""
        return tuple(profile_of(entry) for entry in self.targets)

    def resolved(self) -> Recipe:
        """Return the recipe with fields that depend on the processors of this machine and of the targets decided."""
        # Products of bytes must saturate neither on this machine nor on a target's processor.
        processors = {"cpu", *(profile.processor for profile in self.profiles() if profile.processor is not None)}
        sums = all(find_processor(name).sums_in_32_bits for name in processors)
        stages = [stage.resolved(sums) if isinstance(stage, ResolvesForTargets) else stage for stage in self.stages]
        return self.model_copy(update={"stages": tuple(stages)})

    def labels(self) -> tuple[str, ...]:
        """Return a unique label for each stage: its kind, numbered from the second on (`distill`, `distill-2`)."""
        return stage_labels([stage.kind for stage in self.stages])


def stage_labels(kinds: list[str]) -> tuple[str, ...]:
    """Return labels of stages: `[distill, prune, distill]` -> `(distill, prune, distill-2)`."""
    counts: dict[str, int] = {}
    labels = []
    for kind in kinds:
        counts[kind] = counts.get(kind, 0) + 1
        labels.append(kind if counts[kind] == 1 else f"{kind}-{counts[kind]}")
    return tuple(labels)


def find_conflicting_student(model: str, stages: Iterable[AnyStage]) -> str | None:
    """Return a model name that is used for trained weights and for a student with random weights, or None.

    Models are identified by their names. ``model`` is the starting model.
    """
    model_references = [reference for reference in all_references(stages) if reference.kind == "model"]
    random_names = {reference.name for reference in model_references if reference.random_weights}
    return min(
        random_names & {model, *(reference.name for reference in model_references if not reference.random_weights)},
        default=None,
    )
