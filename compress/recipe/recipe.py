"""The recipe as frozen, strict pydantic models, from which everything about a run follows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from compress.data.config import DataConfig
from compress.data.slices import Slice, check_names
from compress.formats.target_profile import Profile, sum_in_32_bits
from compress.formats.targets import PROFILES
from compress.recipe.chosen_target import ChosenTarget, ProcessorClass, from_entry, profile_of
from compress.recipe.policy import CannotTell, Policy
from compress.recipe.search import Search
from compress.stages.base import Stage, all_references
from compress.stages.registry import AnyStage
from compress.tasks.capability import ANSWERS_AT_ONCE, HAS_TWO_TOWERS, TAKES_IMAGES
from compress.tasks.evaluation import Evaluation
from compress.tasks.registry import TASK_NAMES, tasks_with
from compress.utils.pydantic_models import Frozen
from compress.utils.torch_device import PATTERN

START = "start"
"""The label of the starting model, beside those of stages."""
ANOTHER_STUDENT = (
    "another student of random weights than a model that is read elsewhere in the recipe; "
    "`student: {config: {}}` draws weights by the config of the stage's input"
)


class Limit(Frozen):
    """A bound on a metric of the final model, absolute or relative to another model of the run."""

    metric: str = Field(description="a measured quantity, e.g. `accuracy`, `size_bytes` or `latency_ms`")
    target: str = Field("cpu", description="where it is measured: one of the recipe's targets")
    at_least: float | None = Field(None, description="the smallest value that passes")
    at_most: float | None = Field(None, description="the largest value that passes")
    of: str | None = Field(None, description="bound the ratio to this model's value, e.g. `baseline`")
    processor: ProcessorClass | None = Field(
        None, description="the kind of processor that it holds on; on others it is skipped. Left out: on all"
    )

    @model_validator(mode="after")
    def _one_bound(self) -> Limit:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("exactly one of at_least and at_most")
        return self

    @property
    def bound(self) -> float:
        """The one that is given."""
        return (self.at_least if self.at_least is not None else self.at_most) or 0.0


class Verdicts(Frozen):
    """What a limit does to the exit code where it is not kept and may not be missed either."""

    cannot_tell: CannotTell = Field(
        "warn",
        description="a limit on a time whose interval reaches it, or that was measured on a machine unfit for it",
    )
    within_chance: CannotTell = Field(
        "fail", description="a limit on quality that so many rows may have missed by chance; it is missed all the same"
    )


class Licences(Frozen):
    """What the licences of the recipe's sources are where they don't say so, and what their owners have allowed."""

    stated: dict[str, str] = Field(
        {}, description="a model, adapter or data as the recipe names it -> its licence, e.g. `CC-BY-4.0`"
    )
    allowed: dict[str, str] = Field(
        {},
        description="the same names -> why you may do what the licence forbids, e.g. `agreement of 2 May 2026`; "
        "left out, the recipe is refused",
    )

    @field_validator("allowed")
    @classmethod
    def _reasons(cls, value: dict[str, str]) -> dict[str, str]:
        if any(not reason.strip() for reason in value.values()):
            raise ValueError("a reason for each")
        return value


class Benchmark(Frozen):
    """How the measured models are timed."""

    threads: int = Field(2, ge=1, description="intra-operator threads of the runtime")
    batched: bool = Field(True, description="also time batches: throughput, and memory with them")
    batch_size: int = Field(32, ge=1, description="batch of the throughput measurement")
    seconds: float = Field(3.0, gt=0, description="time budget for each model and scenario")
    launches: int = Field(
        6,
        ge=2,
        description="sets of fresh processes, at least; up to twice as many where the ratios are not yet known well",
    )
    """With fewer than six the interval over them is too wide to be of use, and a median has none at 95%."""
    budget_seconds: float | None = Field(
        None, gt=0, description="time budget for the whole session with its starts and warm-ups, in place of `seconds`"
    )
    rate: float | None = Field(
        None, gt=0, description="requests per second of the server scenario (Poisson arrivals); left out without one"
    )
    contexts: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (128,), min_length=1, description="text generation: tokens of the prompts, each timed on its own"
    )
    tokens: int = Field(32, ge=1, description="text generation: tokens that are timed after the first")
    picture_steps: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="pictures: numbers of steps that are timed beside each model's own"
    )
    picture_sizes: tuple[Annotated[int, Field(ge=8)], ...] = Field(
        (), description="pictures: pixels of a side that are timed beside the model's own size"
    )
    examples: int = Field(256, ge=8, description="test rows drawn for the latency scenarios")
    every_stage: bool = Field(True, description="measure the output of every stage, not just baseline and final")


def _single_key(value: Any) -> Any:
    """`{distill: {...}}` or `distill` -> the stage's fields with its `kind` added."""
    if isinstance(value, str):
        return {"kind": value}
    if isinstance(value, dict) and len(value) == 1 and "kind" not in value:
        ((kind, fields),) = value.items()
        if fields is None or isinstance(fields, dict):
            return {**(fields or {}), "kind": kind}
    return value


_MODULES = tasks_with(frozenset({TAKES_IMAGES, ANSWERS_AT_ONCE}), frozenset({HAS_TWO_TOWERS}))
"""Tasks whose model may be a plain torch module."""


class Recipe(Frozen):
    """A compression run from a starting model to a measured artifact."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the folder of the run")
    description: str = Field("", description="one line on what the recipe is for")
    task: Annotated[
        str,
        Field(
            description="Hugging Face name of the task; may be left out if the model is here and its config tells it",
            json_schema_extra={"enum": list(TASK_NAMES)},
        ),
    ]
    model: str = Field(description="Hugging Face id, local folder, GGUF or ONNX file, or `sample:NAME`")
    module: str | None = Field(
        None,
        pattern=r"^([A-Za-z_][\w.]*|[\w-]+\.py):[A-Za-z_][\w.]*$",
        description="for a plain torch module: `package.module:function`, or `file.py:function` beside the recipe, "
        "that makes it. The recipe runs that code; `model` then holds the weights",
    )
    module_arguments: dict[str, Any] = Field({}, description="what `module` is called with")
    random_weights: bool = Field(
        False,
        description="start from weights drawn from the seed: of `model` only config.json and the processor are read",
    )
    trust_remote_code: bool = Field(False, description="run Python that a model repository ships")
    safety_checker: Literal["keep", "leave_out"] | None = Field(
        None, description="text to image: what becomes of a pipeline's safety checker; one that has none needs no word"
    )
    data: DataConfig = Field(description="the examples to learn from and to be judged by")
    seed: int = Field(0, ge=0, description="of every random choice; the same seed gives the same model")
    device: str = Field(
        "auto",
        pattern=PATTERN,
        description="where stages compute that can: `cpu`, `cuda`, `cuda:1`, `mps`; `auto` is CUDA where torch has it. "
        "Files are judged and timed by their targets all the same",
    )
    stages: tuple[AnyStage, ...] = Field(min_length=1, description="what happens to the model, in this order")
    baseline: str = Field("start", description="label of the stage whose output is compared against, or `start`")
    targets: tuple[str | ChosenTarget, ...] = Field(
        ("cpu",),
        description="where the result runs and is measured: names, `{NAME: {...}}` with fields of the target or of the "
        "stage that writes its format, or files that describe a target of your own",
    )
    evaluation: Evaluation = Field(Evaluation(), description="what of the test text a language model is judged by")
    benchmark: Benchmark = Field(Benchmark(), description="how the measured models are timed")
    slices: tuple[Slice, ...] | None = Field(
        None, description="parts of the test data that are looked at on their own; left out: those of the task"
    )
    limits: tuple[Limit, ...] = Field((), description="bounds that the final model must keep")
    verdicts: Verdicts = Field(Verdicts(), description="what limits do that are nearly kept")
    licences: Licences = Field(Licences(), description="what is known of licences beside what the sources say")
    search: Search | None = Field(None, description="what `compress search` varies; a run takes no notice of it")
    gate: Policy | None = Field(
        None, description="what counts as a regression against a baseline; left out: the defaults of `compress gate`"
    )

    @field_validator("stages", mode="before")
    @classmethod
    def _stages(cls, value: Any) -> Any:
        return tuple(_single_key(item) for item in value) if isinstance(value, list | tuple) else value

    @field_validator("task")
    @classmethod
    def _known_task(cls, value: str) -> str:
        if value not in TASK_NAMES:
            raise ValueError(f"one of {', '.join(TASK_NAMES)}")
        return value

    @field_validator("targets", mode="before")
    @classmethod
    def _entries(cls, value: Any) -> Any:
        return tuple(from_entry(item) for item in value) if isinstance(value, list | tuple) else value

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

    @model_validator(mode="after")
    def _module_fits(self) -> Recipe:
        if self.module is None and self.module_arguments:
            raise ValueError("a `module` that `module_arguments` are for")
        if self.module is not None and self.task not in _MODULES:
            raise ValueError(f"no `module`: plain torch modules are for {', '.join(_MODULES)}")
        return self

    @model_validator(mode="after")
    def _drawn_or_read(self) -> Recipe:
        if (name := read_and_drawn(self.model, self.stages)) is not None:
            raise ValueError(f"for {name!r}, {ANOTHER_STUDENT}")
        return self

    @property
    def task_is_told(self) -> bool:
        """Whether the model's config told the task, since the recipe's file has none."""
        return "task" not in self.model_fields_set

    def profiles(self) -> tuple[Profile, ...]:
        """The rows that its targets stand for."""
        return tuple(profile_of(entry) for entry in self.targets)

    def resolved(self) -> Recipe:
        """With what stages leave to the processors of this machine and of the targets decided."""
        sums = sum_in_32_bits(self.profiles())
        return self.model_copy(update={"stages": tuple(stage.resolved(sums) for stage in self.stages)})

    def labels(self) -> tuple[str, ...]:
        """A unique label for each stage: its kind, numbered from the second on (`distill`, `distill-2`)."""
        return stage_labels([stage.kind for stage in self.stages])


def stage_labels(kinds: list[str]) -> tuple[str, ...]:
    """`[distill, prune, distill]` -> `(distill, prune, distill-2)`."""
    seen: dict[str, int] = {}
    labels = []
    for kind in kinds:
        seen[kind] = seen.get(kind, 0) + 1
        labels.append(kind if seen[kind] == 1 else f"{kind}-{seen[kind]}")
    return tuple(labels)


def read_and_drawn(model: str, stages: Iterable[Stage[Any, Any]]) -> str | None:
    """A name that stands for weights that are read and, as a student, for drawn ones; models are known by their names.

    ``model`` is the starting model.
    """
    named = [one for one in all_references(stages) if one.kind == "model"]
    drawn = {one.name for one in named if one.random_weights}
    return min(drawn & {model, *(one.name for one in named if not one.random_weights)}, default=None)
