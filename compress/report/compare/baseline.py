"""Baselines as small files to commit: what a gate needs of a report, who set it, when and why, and if it comes down."""

from __future__ import annotations

import getpass
import json
import math
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from compress.recipe.policy import Policy
from compress.report.compare.change import Change, Comparison
from compress.report.compare.machine_match import fingerprint
from compress.report.run_folder import REPORT, write_whole
from compress.results.measurement import MACHINE, Measurement
from compress.results.metrics import describe_metric
from compress.results.report import (
    FrozenRecord,
    Report,
    invalid_fields,
    pack_bits,
    parse_report,
    read_text,
    unpack_bits,
)
from compress.utils.errors import InputError
from compress.utils.pydantic_models import Frozen

SCHEMA = 1
KIND = "compress baseline"
_DIGITS = 7
_GIT_SECONDS = 20.0


class Origin(FrozenRecord):
    """Who set the bar, when and why."""

    who: str
    when: str = Field(description="ISO 8601, with the offset from UTC")
    why: str


class Outcomes(Frozen):
    """Per-example outcomes of a row. Example i is right if bit i of ``bits`` is 1, as `pack_bits` counts them."""

    metric: str
    model: str
    target: str
    count: int = Field(ge=1)
    bits: str = Field(description="Base64 of the bits")

    @classmethod
    def of(cls, row: Measurement) -> Outcomes:
        """Pack the 0 and 1 of a row."""
        assert row.raw is not None
        packed = pack_bits(row.raw)
        return cls(metric=row.metric, model=row.model, target=row.target, count=len(row.raw), bits=packed)

    def raw(self) -> tuple[float, ...]:
        """The outcomes as a measurement keeps them. Raises `ValueError` where the bits are not as many as ``count``."""
        bits = unpack_bits(self.bits)
        if len(bits) != -(-self.count // 8) * 8:
            raise ValueError(f"{self.count} outcomes of {self.metric} take {-(-self.count // 8)} bytes")
        return tuple(float(bit) for bit in bits[: self.count])


class BaselineFile(FrozenRecord):
    """The file. ``report`` is a report of schema 1 without its long samples; ``outcomes`` belong to its rows."""

    kind: str = KIND
    schema_version: int = Field(SCHEMA, alias="schema")
    origin: Origin
    outcomes: tuple[Outcomes, ...] = ()
    report: dict[str, Any]


def load_baseline(path: Path) -> Report:
    """The report behind a baseline's file, a run's folder or a `report.json`. Raises `InputError`."""
    place = path / REPORT if path.is_dir() else path
    text = read_text(place)
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        content = None
    if not isinstance(content, dict) or not {"kind", "report"} <= content.keys():
        return parse_report(text, str(place))
    file = parse_baseline(content, place)
    report = parse_report(json.dumps(file.report), str(place))
    try:
        kept = {(found.model, found.metric, found.target): found.raw() for found in file.outcomes}
    except ValueError as error:
        raise _broken(place, str(error)) from None
    rows = [
        row.model_copy(update={"raw": kept.get((row.model, row.metric, row.target), row.raw)})
        for row in report.measurements
    ]
    return report.model_copy(update={"measurements": tuple(rows)})


def parse_baseline(content: dict[str, Any], path: Path) -> BaselineFile:
    """A file's JSON with its origin. Raises `InputError` for another kind or schema, or missing parts."""
    schema = content.get("schema")
    if content.get("kind") != KIND:
        raise _broken(path, f"it names no kind {KIND!r}")
    if schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        again = "write it anew: compress gate RUN --baseline FILE --update"
        raise InputError(
            f"The baseline has schema {schema!r}; this compress reads {SCHEMA}.",
            where=str(path),
            expected=f"a baseline of schema {SCHEMA}",
            hint="pip install --upgrade compress" if newer else again,
        )
    try:
        return BaselineFile.model_validate(content)
    except ValidationError as error:
        raise _broken(path, "; ".join(invalid_fields(error))) from None


def write_baseline(report: Report, path: Path, origin: Origin, model: str = "final") -> None:
    """Write the baseline of one model whole or not at all; kilobytes, lines that a reviewer can read.

    Raises `InputError` where the report lacks the model or ``path`` is a folder, `StorageError` where it cannot be
    written.
    """
    if model not in report.models:
        raise InputError(f"There is no model {model!r} in the report.", expected=f"one of {', '.join(report.models)}")
    if path.is_dir():
        raise InputError("The baseline is a folder.", where=str(path), expected="a file such as baselines/my.json")
    rows = [row for row in report.measurements if row.model in (model, MACHINE)]
    packed = [Outcomes.of(row) for row in rows if _is_outcomes(row)]
    small = report.model_copy(
        update={
            "measurements": tuple(_cut(row) for row in rows),
            "environment": {**fingerprint(report.environment), **_noise(report.environment)},
            "bytes_by_layer": {},
            "stages": (),
            "integrity": (),
            "limits": (),
            "calibration": (),
            "notes": (),
        }
    )
    file = BaselineFile(origin=origin, outcomes=tuple(packed), report=json.loads(small.to_json()))
    write_whole(path, _lines(file))


def _lines(file: BaselineFile) -> str:
    """One line for each row, so that a change of one figure is a change of one line."""
    dumped = file.model_dump(mode="json")
    report = dumped.pop("report")
    kept = {name: value for name, value in report.items() if value or value == 0}
    parts = [f"  {json.dumps(name)}: {_block(value, '    ')}" for name, value in dumped.items()]
    inner = [f"    {json.dumps(name)}: {_block(value, '      ')}" for name, value in kept.items()]
    return "{\n" + ",\n".join([*parts, '  "report": {\n' + ",\n".join(inner) + "\n  }"]) + "\n}\n"


def _block(value: Any, indent: str) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        filled = ({name: held for name, held in item.items() if held is not None} for item in value)
        inner = (json.dumps(item, ensure_ascii=False) for item in filled)
        return "[\n" + ",\n".join(indent + item for item in inner) + "\n" + indent[2:] + "]"
    return json.dumps(value, ensure_ascii=False)


def _is_outcomes(row: Measurement) -> bool:
    return bool(row.raw) and len(row.raw or ()) == row.n and not set(row.raw or ()) - {0.0, 1.0}


def _is_by_example(row: Measurement) -> bool:
    """Other values for each example of a quality, such as losses: they pair too."""
    return bool(row.raw) and len(row.raw or ()) == row.n and describe_metric(row.metric, row.unit).quality


def _cut(row: Measurement) -> Measurement:
    """Without samples, but for values of single examples; those are rounded, and their mean with them is not."""
    if _is_outcomes(row) or not _is_by_example(row):
        return row.model_copy(update={"raw": None})
    raw = tuple(float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else value for value in row.raw or ())
    return row.model_copy(update={"raw": raw})


def _noise(environment: dict[str, Any]) -> dict[str, Any]:
    noise = environment.get("noise")
    if not isinstance(noise, dict):
        return {}
    return {"noise": {name: noise[name] for name in ("verdict", "reasons") if name in noise}}


def _broken(path: Path, why: str) -> InputError:
    return InputError(
        f"This is no baseline: {why}",
        where=str(path),
        expected="a JSON file that `compress gate RUN --baseline FILE --update` wrote",
        hint="take it from the repository again, or write it anew with --update",
    )


def origin(why: str) -> Origin:
    """The origin of a baseline that is written now: the name that git knows, else the user's."""
    when = datetime.now(UTC).astimezone().isoformat(timespec="seconds")
    return Origin(who=git(Path(), "config", "user.name") or getpass.getuser(), when=when, why=why)


def git(folder: Path, *arguments: str) -> str | None:
    """What git says of a folder; None without git, or where it fails."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def lowered(comparison: Comparison, policy: Policy) -> tuple[Change, ...]:
    """The gated changes by which a new baseline would ask less than the old one.

    Of figures that repeat exactly, such as bytes and accuracy, any loss counts: small ones add up from update to
    update. Times and memory count only where the verdict is *worse*.
    """
    return tuple(
        change for change in comparison.changes if policy.rule(change.metric) is not None and _asks_less(change)
    )


def _asks_less(change: Change) -> bool:
    known = describe_metric(change.metric, change.unit)
    if change.verdict == "worse":
        return True
    if not (known.quality or change.metric == "size_bytes"):
        return False
    return change.effect < 0 if known.better == "higher" else change.effect > 0
