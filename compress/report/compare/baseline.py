"""Baselines as small files for version control: what a gate needs of a report, with author, date and reason."""

from __future__ import annotations

import getpass
import json
import math
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from compress import DISTRIBUTION
from compress.recipe.policy import Policy
from compress.report.compare.change import Comparison, MetricChange
from compress.report.compare.machine_match import fingerprint
from compress.report.run_folder import REPORT, write_atomically
from compress.results.metrics import describe_metric
from compress.results.report import (
    MACHINE,
    FrozenRecord,
    Measurement,
    Report,
    invalid_fields,
    pack_bits,
    parse_report,
    read_text,
    unpack_bits,
)
from compress.utils.errors import InputError
from compress.utils.pydantic_models import Frozen
from compress.utils.read_limits import parse_printable_json

SCHEMA = 1
KIND = "compress baseline"
_DIGITS = 7
_GIT_SECONDS = 20.0


class BaselineOrigin(FrozenRecord):
    """Author, date and reason of a baseline."""

    who: str
    when: str = Field(description="ISO 8601, with the offset from UTC")
    why: str


class Outcomes(Frozen):
    """Outcomes of a measurement by example. Bit i of ``bits``, in the order of `pack_bits`, is that of example i."""

    metric: str
    model: str
    target: str
    count: int = Field(ge=1)
    bits: str = Field(description="bits as Base64")

    @classmethod
    def of(cls, row: Measurement) -> Outcomes:
        """Pack the outcomes of a measurement, which are 0 or 1."""
        assert row.raw is not None
        packed = pack_bits(row.raw)
        return cls(metric=row.metric, model=row.model, target=row.target, count=len(row.raw), bits=packed)

    def raw(self) -> tuple[float, ...]:
        """Return the outcomes as a measurement keeps them. Raises `ValueError` if there are not ``count`` bits."""
        bits = unpack_bits(self.bits)
        if len(bits) != -(-self.count // 8) * 8:
            raise ValueError(f"{self.count} outcomes of {self.metric} take {-(-self.count // 8)} bytes")
        return tuple(float(bit) for bit in bits[: self.count])


class BaselineFile(FrozenRecord):
    """Content of the file: a report of schema 1 without long samples, and the packed ``outcomes`` of its rows."""

    kind: str = KIND
    schema_version: int = Field(SCHEMA, alias="schema")
    origin: BaselineOrigin
    outcomes: tuple[Outcomes, ...] = ()
    report: dict[str, Any]


def load_baseline(path: Path) -> Report:
    """Return the report of a baseline file, a run's folder or a `report.json`. Raises `InputError`."""
    source = path / REPORT if path.is_dir() else path
    text = read_text(source)
    try:
        content = parse_printable_json(text)
    except ValueError:
        content = None
    if not isinstance(content, dict) or not {"kind", "report"} <= content.keys():
        return parse_report(text, str(source))
    file = parse_baseline(content, source)
    report = parse_report(json.dumps(file.report), str(source))
    try:
        outcomes = {(packed.model, packed.metric, packed.target): packed.raw() for packed in file.outcomes}
    except ValueError as error:
        raise _broken(source, str(error)) from None
    rows = [
        row.model_copy(update={"raw": outcomes.get((row.model, row.metric, row.target), row.raw)})
        for row in report.measurements
    ]
    return report.model_copy(update={"measurements": tuple(rows)})


def parse_baseline(content: dict[str, Any], path: Path) -> BaselineFile:
    """Return the content of a file. Raises `InputError` for another kind or schema, or missing fields."""
    schema = content.get("schema")
    if content.get("kind") != KIND:
        raise _broken(path, f"it names no kind {KIND!r}")
    if schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        update_hint = "write it anew: compress gate RUN --baseline FILE --update"
        raise InputError(
            f"The baseline has schema {schema!r}; this compress reads {SCHEMA}.",
            where=str(path),
            expected=f"a baseline of schema {SCHEMA}",
            hint=f"pip install --upgrade {DISTRIBUTION}" if newer else update_hint,
        )
    try:
        return BaselineFile.model_validate(content)
    except ValidationError as error:
        raise _broken(path, "; ".join(invalid_fields(error))) from None


def write_baseline(report: Report, path: Path, origin: BaselineOrigin, model: str = "final") -> None:
    """Write the baseline of one model atomically: a few kilobytes, in lines that a reviewer can read.

    Args:
        report: Report of the run.
        path: File that is written.
        origin: Author, date and reason.
        model: Model that becomes the baseline.

    Raises:
        InputError: The report lacks the model, or ``path`` is a folder.
        StorageError: The file cannot be written.
    """
    if model not in report.models:
        raise InputError(f"There is no model {model!r} in the report.", expected=f"one of {', '.join(report.models)}")
    if path.is_dir():
        raise InputError("The baseline is a folder.", where=str(path), expected="a file such as baselines/my.json")
    rows = [row for row in report.measurements if row.model in (model, MACHINE)]
    packed = [Outcomes.of(row) for row in rows if _is_outcomes(row)]
    noise = report.environment.get("noise")
    noise_record = {}
    if isinstance(noise, dict):
        noise_record = {"noise": {name: noise[name] for name in ("verdict", "reasons") if name in noise}}
    reduced = report.model_copy(
        update={
            "measurements": tuple(_cut(row) for row in rows),
            "environment": {**fingerprint(report.environment), **noise_record},
            "bytes_by_layer": {},
            **dict.fromkeys(("stages", "integrity", "limits", "calibration", "notes"), ()),
        }
    )
    file = BaselineFile(origin=origin, outcomes=tuple(packed), report=json.loads(reduced.to_json()))
    # One line for each row, so that a changed value is a changed line.
    dumped = file.model_dump(mode="json")
    fields = {name: value for name, value in dumped.pop("report").items() if value or value == 0}
    parts = [f"  {json.dumps(name)}: {_block(value, '    ')}" for name, value in dumped.items()]
    report_lines = [f"    {json.dumps(name)}: {_block(value, '      ')}" for name, value in fields.items()]
    report_text = '  "report": {\n' + ",\n".join(report_lines) + "\n  }"
    write_atomically(path, "{\n" + ",\n".join([*parts, report_text]) + "\n}\n")


def _block(value: object, indent: str) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        items = ({name: field_value for name, field_value in item.items() if field_value is not None} for item in value)
        lines = (json.dumps(item, ensure_ascii=False) for item in items)
        return "[\n" + ",\n".join(indent + item for item in lines) + "\n" + indent[2:] + "]"
    return json.dumps(value, ensure_ascii=False)


def _is_outcomes(row: Measurement) -> bool:
    return bool(row.raw) and len(row.raw or ()) == row.n and not set(row.raw or ()) - {0.0, 1.0}


def _cut(row: Measurement) -> Measurement:
    """Return the measurement without samples, except values by example, which are rounded."""
    # Other values for each example of a quality, such as losses, are kept because they pair too.
    is_by_example = bool(row.raw) and len(row.raw or ()) == row.n and describe_metric(row.metric, row.unit).quality
    if _is_outcomes(row) or not is_by_example:
        return row.model_copy(update={"raw": None})
    raw = tuple(float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else value for value in row.raw or ())
    return row.model_copy(update={"raw": raw})


def _broken(path: Path, why: str) -> InputError:
    return InputError(
        f"This is no baseline: {why}",
        where=str(path),
        expected="a JSON file that `compress gate RUN --baseline FILE --update` wrote",
        hint="take it from the repository again, or write it anew with --update",
    )


def current_origin(why: str) -> BaselineOrigin:
    """Return the origin of a baseline that is written now, with the user name of git or of the system."""
    when = datetime.now(UTC).astimezone().isoformat(timespec="seconds")
    return BaselineOrigin(who=run_git(Path(), "config", "user.name") or getpass.getuser(), when=when, why=why)


def run_git(folder: Path, *arguments: str) -> str | None:
    """Return the output of git in a folder, or None without git, or if it fails."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() if process.returncode == 0 else None


def lowered_metrics(comparison: Comparison, policy: Policy) -> tuple[MetricChange, ...]:
    """Return the gated changes by which a new baseline would demand less than the old one.

    For values that repeat exactly, such as bytes and accuracy, any loss counts, because small ones accumulate over
    updates. Times and memory count only if the verdict is *worse*.
    """
    lowered = []
    for change in comparison.changes:
        metric = describe_metric(change.metric, change.unit)
        loss = -change.effect if metric.better == "higher" else change.effect
        repeats_exactly = metric.quality or change.metric == "size_bytes"
        if policy.rule(change.metric) and (change.verdict == "worse" or (repeats_exactly and loss > 0)):
            lowered.append(change)
    return tuple(lowered)
