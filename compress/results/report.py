"""`report.json`, schema 1: the record of a run, from which Markdown, HTML, JUnit and the terminal's tables are made.

Fields are only added to schema 1. Readers of old reports rely on it.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from compress.results.metrics import file_metrics
from compress.utils.errors import InputError, did_you_mean
from compress.utils.pydantic_models import Frozen
from compress.utils.read_limits import parse_printable_json

MACHINE = "machine"
"""Name in place of a model: reference work that was timed beside the models, to relate sessions."""


_LARGEST = 1e100
"""Finite measurements are smaller, so that their sums, squares and exponentials are finite too."""


class Measurement(Frozen):
    """One measured quantity of one model on one target.

    ``low`` and ``high`` bound the 95% confidence interval. Both are ``None`` for exact quantities such as bytes.
    ``raw`` holds the samples behind a statistic: latencies in ms, or outcomes of examples as 0 or 1.
    """

    model: str = Field(description="`baseline`, a stage's label, `final`, or `machine`")
    metric: str
    target: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    n: int = Field(1, ge=1, le=10**15, description="number of samples behind the value")
    raw: tuple[float, ...] | None = Field(None, repr=False, description="samples behind the value")

    @field_validator("value", "low", "high")
    @classmethod
    def _computable(cls, value: float | None) -> float | None:
        """Check that statistics of the value stay finite."""
        if value is not None and math.isfinite(value) and abs(value) > _LARGEST:
            raise ValueError(f"a number below {_LARGEST:g}")
        return value


SCHEMA = 1
BASELINE = "baseline"
FINAL = "final"


Cell = str | int | float
"""Text, count or measured number."""


class FrozenRecord(BaseModel):
    """Frozen record. It ignores unknown fields, so that reports of later versions of schema 1 can be read."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True, serialize_by_alias=True)


class StageTable(FrozenRecord):
    """Table of a stage, such as the error of each layer."""

    title: str
    columns: tuple[str, ...] = Field(min_length=1)
    rows: tuple[tuple[Cell, ...], ...] = ()

    @model_validator(mode="after")
    def _rectangular(self) -> StageTable:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"rows of {len(self.columns)} cells")
        return self


class StageRecord(FrozenRecord):
    """Stage of the run and its cost in this run, which is small if it was ``cached``.

    ``seconds`` is the time to load its input, run it and write its output. ``check_seconds`` is the additional time of
    the checks of that output. ``notes`` and ``tables`` describe its results, whenever they were computed.
    """

    name: str
    key: str
    cached: bool
    seconds: float = Field(ge=0)
    check_seconds: float = Field(0.0, ge=0)
    peak_rss_bytes: int | None = Field(None, ge=0)
    remarks: tuple[str, ...] = ()
    tables: tuple[StageTable, ...] = ()


Verdict = Literal["kept", "missed", "cannot tell", "skipped"]


class LimitResult(FrozenRecord):
    """Limit of the recipe and its judgement for the final model.

    ``value`` is the final model's value with its 95% interval ``low``..``high``. A relative limit bounds ``ratio``,
    that value over the value of the model ``of``. ``skipped`` means that the target was unavailable, or has another
    processor than the limit applies to, so that nothing was judged: ``passed`` is False then, and so is `missed`.
    Reports of older versions have no ``verdict`` and no ``fails``.
    """

    metric: str
    target: str
    limit: str = Field(description="limit as text: `>= 98.5% of baseline`")
    value: float | None = None
    passed: bool
    bound: float | None = None
    of: str | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    low: float | None = None
    high: float | None = None
    skipped: bool = False
    reason: str | None = Field(None, description="reason why nothing was compared or why the result is inconclusive")
    verdict: Verdict | None = Field(None, description="`cannot tell`: inconclusive, the limit is inside the interval")
    within_chance: bool | None = Field(
        None, description="limit on quality that is not kept: whether it is inside the interval for this number of rows"
    )
    rows: int | None = Field(None, ge=1, description="number of rows that the metric was measured on")
    rows_lost: int | None = Field(
        None, description="number of correct rows that are missing compared with the model `of`, or with the bound"
    )
    processor: str | None = Field(None, description="processor class that the limit is restricted to")
    fails: bool | None = Field(None, description="whether the run ends with exit code 1 because of it")

    @property
    def missed(self) -> bool:
        """Return whether the run should end with exit code 1 because of this limit."""
        return self.fails if self.fails is not None else not self.passed and not self.skipped

    @property
    def unknown(self) -> bool:
        """Return whether the limit is inconclusive, which `missed` may count as a failure or not."""
        return self.verdict == "cannot tell" or (not self.missed and not self.passed and not self.skipped)


class SkippedTarget(FrozenRecord):
    """Target that was unavailable."""

    target: str
    reason: str
    failed: bool = Field(False, description="whether a stage that writes a file for the target failed")


class LayerBytes(FrozenRecord):
    """Bytes of one stored tensor, by its name in the file."""

    name: str
    bytes: int = Field(ge=0)
    dtype: str


class IntegrityRecord(FrozenRecord):
    """Check of a stage's output with its result."""

    stage: str
    check: str
    found: str
    passed: bool = True


class DataRecord(FrozenRecord):
    """Rows that accuracy was measured on."""

    split: str = "test"
    digest: str = Field(description="SHA-256 of the rows and class names, without columns that only slices use")
    rows: int = Field(ge=1)
    labels: tuple[str, ...] = Field((), description="class names in the order of their ids")
    also: dict[str, str] = Field({}, description="digest of each additional test split")


def pack_bits(flags: Iterable[object]) -> str:
    """Return a bit for each flag in Base64, from the first byte's highest bit on. The last byte is filled with 0."""
    bits = "".join("1" if flag else "0" for flag in flags)
    size = -(-len(bits) // 8)
    return base64.b64encode(int(bits.ljust(size * 8, "0"), 2).to_bytes(size, "big")).decode()


def unpack_bits(packed: str) -> str:
    """Return the bits of `pack_bits` as a string of `0` and `1`, eight for each byte. Raises `ValueError`."""
    try:
        return "".join(f"{byte:08b}" for byte in base64.b64decode(packed, validate=True))
    except ValueError:
        raise ValueError("bytes in Base64") from None


class SliceRecord(FrozenRecord):
    """Slice of those rows. Row i belongs to it if bit i of ``bits`` is 1, as `pack_bits` orders them."""

    about: str = Field("", description="description of the slice")
    rows: int = Field(ge=1)
    bits: str = Field(description="one bit per row of the data, as Base64")

    @classmethod
    def of(cls, members: Sequence[bool], about: str = "") -> SliceRecord:
        """Return the record of the rows for which ``members`` is true."""
        return cls(about=about, rows=sum(map(bool, members)), bits=pack_bits(members))

    @model_validator(mode="after")
    def _counted(self) -> SliceRecord:
        if len(self.indices()) != self.rows:
            raise ValueError(f"bits for {self.rows} rows, found {len(self.indices())}")
        return self

    def indices(self) -> tuple[int, ...]:
        """Return the rows that belong to it, ascending."""
        return tuple(index for index, bit in enumerate(unpack_bits(self.bits)) if bit == "1")


class CalibrationBin(FrozenRecord):
    """Predictions of similar confidence: how many, their mean confidence, and the share of correct ones."""

    rows: int = Field(ge=1)
    confidence: float
    accuracy: float


class CalibrationCurve(FrozenRecord):
    """Reliability diagram of one model on one target."""

    model: str
    target: str
    bins: tuple[CalibrationBin, ...]


class GeneratedToken(NamedTuple):
    """Token that a model generated, the likeliest other token, and the probabilities of both."""

    token: str
    probability: float
    other: str
    other_probability: float


class ContinuationRecord(FrozenRecord):
    """Continuation of a test text by one model. ``repeated`` is the share of its 4-grams that are repeated."""

    model: str
    target: str
    prompt: str
    text: str
    repeated: float = Field(ge=0, le=1)
    steps: tuple[GeneratedToken, ...] = Field((), description="tokens of the text")


class AnswerRecord(FrozenRecord):
    """Answer of one model to an instruction, and the checks that failed."""

    model: str
    target: str
    prompt: str
    text: str
    missed: tuple[str, ...] = Field(description="descriptions of the failed checks")


class LostToken(FrozenRecord):
    """Token whose probability fell from the baseline to the final model."""

    target: str
    before: str
    token: str
    baseline: float = Field(ge=0, le=1)
    final: float = Field(ge=0, le=1)


class PictureRecord(FrozenRecord):
    """Image that one model generated for a prompt of the test rows and a seed, as a PNG file in Base64.

    ``difference`` shows the image less the baseline's, red where it is lighter and blue where it is darker. ``levels``
    is the mean absolute difference of the 8-bit levels. The baseline has neither.
    """

    model: str
    target: str
    prompt: str
    seed: int
    png: str
    difference: str | None = None
    levels: float | None = Field(None, ge=0)


PARTED = 0.1
"""Distance of latents, relative to the baseline's own size, from which a sampling path counts as different."""


class DriftRecord(FrozenRecord):
    """Distance of a model's denoiser inputs to the baseline's at each timestep, from the same noise.

    ``typical``, ``low`` and ``high`` are the median and the quartiles over images, of the root mean square relative to
    the baseline's own. ``parted`` is the timestep from which the median stays above a tenth; -1 stands for the finished
    latents.
    """

    model: str
    target: str
    steps: int = Field(ge=1)
    times: tuple[float, ...]
    typical: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    parted: float | None = None


class LicenceRecord(FrozenRecord):
    """Licence of a source of the run or of a runtime, as its files state it."""

    of: str = Field(description="`model`, or `student`, `adapter`, `data`, `test data` or `runtime` followed by a name")
    name: str = Field(description="name in the recipe (of a path, the last part), or name of the distribution")
    licence: str = Field(description="SPDX expression, or `not stated`")
    stated_in: str = Field("", description="file or other source that states the licence")
    binds: bool = Field(False, description="whether the shipped weights derive from it")
    duties: tuple[str, ...] = Field((), description="obligations for redistribution, e.g. `share-alike`")
    allowed: str | None = Field(None, description="reason of the recipe's user for an exception")


class Report(FrozenRecord):
    """Record of all measurements and decisions of a run."""

    schema_version: int = Field(SCHEMA, alias="schema")
    recipe: str
    task: str = ""
    environment: dict[str, Any] = {}
    stages: tuple[StageRecord, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    limits: tuple[LimitResult, ...] = ()
    skipped: tuple[SkippedTarget, ...] = ()
    stand_in: str | None = Field(
        None, description="target that measured the model if none of the recipe's targets could run it"
    )
    description: str = ""
    started: str | None = Field(None, description="ISO 8601, with the offset from UTC")
    seconds: float | None = Field(None, ge=0, description="wall time of the whole run")
    baseline: str = Field(BASELINE, description="model of the rows named `baseline`: a stage's label or `start`")
    notes: tuple[str, ...] = Field((), description="warnings for the reader, e.g. that a timing was noisy")
    bytes_by_layer: dict[str, tuple[LayerBytes, ...]] = Field({}, description="stored tensors by model label")
    integrity: tuple[IntegrityRecord, ...] = ()
    data: DataRecord | None = None
    slices: dict[str, SliceRecord] = Field({}, description="slices by name; their metrics are named `accuracy[NAME]`")
    calibration: tuple[CalibrationCurve, ...] = ()
    continuations: tuple[ContinuationRecord, ...] = ()
    answers: tuple[AnswerRecord, ...] = Field((), description="answers of baseline and final model to the instructions")
    lost_tokens: tuple[LostToken, ...] = Field((), description="language models: tokens whose probability fell most")
    pictures: tuple[PictureRecord, ...] = Field((), description="outputs of every model for the same prompts and seeds")
    drift: tuple[DriftRecord, ...] = Field(
        (), description="image generators: comparisons of every model with the baseline"
    )
    licences: tuple[LicenceRecord, ...] = Field((), description="licences of model, data and runtimes as stated")

    @field_validator("schema_version")
    @classmethod
    def _readable(cls, value: int) -> int:
        if value != SCHEMA:
            raise ValueError(f"schema {SCHEMA}")
        return value

    @field_validator("environment")
    @classmethod
    def _comparable(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Check the fields that comparisons compute with, since a report may come from a stranger."""
        for name in (key for key in value if key.endswith("_bytes")):
            if not isinstance(value[name], int | float | None):
                raise ValueError(f"a number for {name}")
        features = value.get("features", ())
        if not isinstance(features, list | tuple) or not all(isinstance(feature, str) for feature in features):
            raise ValueError("a list of names for features")
        return value

    @property
    def models(self) -> tuple[str, ...]:
        """Return the measured models: `baseline` first, then stages in the order in which they ran, `final` last."""
        ranks = {BASELINE: -1, FINAL: len(self.stages) + 1}
        ranks.update({stage.name: index for index, stage in enumerate(self.stages)})
        labels = dict.fromkeys(row.model for row in self.measurements if row.model != MACHINE)
        return tuple(sorted(labels, key=lambda model: ranks.get(model, len(self.stages))))

    @property
    def targets(self) -> tuple[str, ...]:
        """Return the targets with measurements, in the order of the rows."""
        return tuple(dict.fromkeys(row.target for row in self.measurements))

    @property
    def ran_on(self) -> tuple[str, ...]:
        """Return the targets for which more is known than the size of files, so that something ran on them."""
        return tuple(target for target in self.targets if not file_metrics().issuperset(self.metrics(target)))

    @property
    def headed(self) -> tuple[str, ...]:
        """Return the targets that have headlines: those that were not skipped, or all if all were skipped."""
        skipped = {skip.target for skip in self.skipped}
        return tuple(target for target in self.targets if target not in skipped) or self.targets

    @property
    def missed(self) -> tuple[LimitResult, ...]:
        """Return the limits that make the exit code 1."""
        return tuple(limit for limit in self.limits if limit.missed)

    @property
    def judged(self) -> tuple[LimitResult, ...]:
        """Return the limits that were not skipped."""
        return tuple(limit for limit in self.limits if not limit.skipped)

    @property
    def unmeasured(self) -> bool:
        """Return whether no target of the recipe was available. Then only `stand_in` and the files were measured."""
        return bool(self.skipped) and not set(self.ran_on) - {self.stand_in}

    @property
    def unfit(self) -> bool:
        """Return whether a file could not be written, or no target was available and no limit was judged."""
        return any(skip.failed for skip in self.skipped) or (self.unmeasured and not self.judged)

    def find(self, model: str, metric: str, target: str) -> Measurement | None:
        """Return the measurement of that model, metric and target, or None."""
        key = (model, metric, target)
        return next((row for row in self.measurements if (row.model, row.metric, row.target) == key), None)

    def measurement(self, metric: str, model: str = FINAL, target: str | None = None) -> Measurement:
        """Return the measurement of a metric.

        Args:
            metric: Name of the metric.
            model: `final`, `baseline`, or a stage's label.
            target: Target. Default: the first one on which the model has the metric.

        Raises:
            InputError: There is no such measurement. The message names similar ones.
        """
        for row in self.measurements:
            if (row.model, row.metric) == (model, metric) and target in (None, row.target):
                return row
        rows = [row for row in self.measurements if target in (None, row.target)]
        models = list(dict.fromkeys(row.model for row in rows if row.model != MACHINE))
        metrics = list(dict.fromkeys(row.metric for row in rows if row.model == model))
        name, names = (metric, metrics) if metrics else (model, models)
        raise InputError(
            f"The report has no measurement of {metric!r} of the model {model!r}"
            f"{f' on {target!r}' if target else ''}." + did_you_mean(name, names),
            where=self.recipe,
            expected=f"one of {', '.join(names)}" if names else f"a target among {', '.join(self.targets)}",
        )

    def metrics(self, target: str) -> dict[str, str]:
        """Return metric -> unit of everything measured on ``target``, in the order of the rows."""
        return {row.metric: row.unit for row in self.measurements if row.target == target}

    def __repr__(self) -> str:
        return f"Report(recipe={self.recipe!r}, started={self.started!r}, models={self.models}, targets={self.targets})"

    def _repr_html_(self) -> str:
        """Return a table of the main metrics for notebooks."""
        # By name, since views lie in a higher layer than the record that they show.
        table: str = import_module("compress.report.notebook").report_table(self)
        return table

    def to_json(self) -> str:
        """Return `report.json`: indented, with one line for each row, whatever its number of samples."""
        fields = _encodable(self.model_dump(mode="json"))
        lines = [f"  {json.dumps(name)}: {_compact(value)}" for name, value in fields.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"


def _encodable(value: object) -> Any:
    """Return a value for JSON. Infinity and NaN become strings, which pydantic reads back."""
    if isinstance(value, dict):
        return {key: _encodable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_encodable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _compact(value: object) -> str:
    if not isinstance(value, list) or not value:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    rows = ",\n".join("    " + json.dumps(row, ensure_ascii=False, allow_nan=False) for row in value)
    return f"[\n{rows}\n  ]"


def load_report(path: Path) -> Report:
    """Read a `report.json`. Raises `InputError` if it is missing, no report, or of a newer schema."""
    return parse_report(read_text(path), str(path))


def read_text(path: Path) -> str:
    """Return the file's text. Raises `InputError` if it is missing or unreadable."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            "There is no report here.",
            where=str(path),
            expected="a report.json that `compress run` wrote",
            hint="finish the run first: `compress run RECIPE` resumes where it stopped",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("The report cannot be read.", where=str(path), expected=f"a readable file ({error})") from None


def parse_report(text: str, where: str) -> Report:
    """Return the report in ``text``. Raises `InputError`, which names its source ``where``."""
    expected = f"a report.json of schema {SCHEMA}, as `compress run` writes it"
    try:
        content = parse_printable_json(text)
    except ValueError as error:
        raise InputError(f"The report is not JSON: {error}", where=where, expected=expected) from None
    if not isinstance(content, dict) or "schema" not in content:
        raise InputError("This JSON is not a report: it names no schema.", where=where, expected=expected)
    schema = content["schema"]
    if isinstance(schema, int) and not isinstance(schema, bool) and schema > SCHEMA:
        raise InputError(
            f"The report has schema {schema}, which is newer than this compress reads.",
            where=where,
            expected=expected,
            hint="pip install --upgrade compress",
        )
    try:
        return Report.model_validate(content)
    except ValidationError as error:
        lines = "\n  ".join(invalid_fields(error))
        raise InputError(f"The report is not valid:\n  {lines}", where=where, expected=expected) from None


def invalid_fields(error: ValidationError) -> list[str]:
    """Return at most ten invalid fields with their problems: `slices.head.rows: Input should be ...`."""
    return [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:10]]
