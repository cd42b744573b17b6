"""The `data` section of a recipe."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from compress.utils.pydantic_models import Frozen, FrozenAliased

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
SPLITS = ("train", "validation", "test")
FILE_SUFFIXES = (*TABLE_SUFFIXES, ".txt")
SPREADSHEET_SUFFIXES = (".xlsx", ".xls", ".ods")
"""Files that are named as data and refused when they are read."""
_SAMPLE = re.compile(r"^sample:[a-z0-9-]+$")
_NAME = re.compile(r"^[A-Za-z0-9-]+$")
Language = Literal["text", "python"]


def is_file_name(value: str) -> bool:
    """Return whether a split or unlabeled source is a data file and not the name of a split."""
    return value.lower().endswith((*FILE_SUFFIXES, *SPREADSHEET_SUFFIXES))


def is_sample(value: str) -> bool:
    """Return whether a reference has the form `sample:NAME`."""
    return bool(_SAMPLE.match(value))


def sample_split(value: str) -> tuple[str, str] | None:
    """Return `sample:NAME/SPLIT` as (`sample:NAME`, `SPLIT`), or ``None`` for anything else."""
    sample, _, split = value.partition("/")
    return (sample, split) if is_sample(sample) and split else None


class HoldOut(FrozenAliased):
    """Rows that no stage reads and by which models are selected. The test split then judges the selection."""

    rows: int = Field(ge=1, description="number of rows to hold out, in addition to their duplicates")
    source: str = Field("train", alias="from", description="split that the rows are taken from")
    split: str = Field("select", min_length=1, description="name of the new split")
    seed: int = Field(0, ge=0, description="seed of the random choice")


class DataConfig(Frozen):
    """Source of the examples, and the content of each split."""

    source: str | None = Field(
        None,
        description="`sample:NAME`, a folder with one file or folder per split, a file or a folder with one folder per "
        "class, which is split automatically, or a Hugging Face dataset id. "
        "Optional if every split names a file or, by a path with a slash, a folder.",
    )
    splits: dict[str, str] = Field(
        {"train": "train", "validation": "validation", "test": "test"},
        description="maps a split to its name in the source; a CSV, TSV, JSONL, JSON, Parquet or text file; a folder "
        "with one subfolder per class of images or recordings; `sample:NAME/SPLIT`; or, for an ONNX file without a "
        "task, a folder of .npz files or `random:COUNT`",
    )
    without_labels: tuple[str, ...] = Field(
        (), description="splits without labels, which can be used for export and calibration but not for training"
    )
    columns: dict[str, str] = Field(
        {},
        description="maps the task's column names to those in the files, e.g. `doc.body` for a nested JSON field",
    )
    labels: tuple[str, ...] | None = Field(None, min_length=2, description="class names in the order of their ids")
    unlabeled: tuple[str, ...] = Field(
        (), description="extra inputs for distillation: `sample:NAME` or files with the task's input columns"
    )
    drop_overlap: bool = Field(
        False,
        description="drop train and validation rows that also occur in test; without it such rows are an error",
    )
    hold_out: tuple[HoldOut, ...] | None = Field(
        None,
        description="rows held out of a split as a new split that no stage reads, e.g. `select: {rows: 1500, from: "
        "train}`; `compress search` selects recipes by `select`",
    )
    also: dict[str, Language] = Field(
        {},
        description="additional test splits of a language model and their kind, e.g. {verses: text, code: python}; "
        "for python, each kind of token is also evaluated",
    )
    max_length: int = Field(128, ge=4, description="maximum number of tokens of an example; longer ones are truncated")

    @field_validator("hold_out", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return (value,) if isinstance(value, dict | HoldOut) else tuple(value) if isinstance(value, list) else value

    @field_validator("without_labels")
    @classmethod
    def _test_has_labels(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "test" in value:
            raise ValueError("splits other than test, on which the result is measured")
        return value

    @field_validator("also")
    @classmethod
    def _also_are_splits(cls, value: dict[str, Language], info: ValidationInfo) -> dict[str, Language]:
        others = info.data.get("splits", {}).keys() - {"train", "validation", "test"}
        for name in value:
            if name not in others or not _NAME.match(name):
                expected = "names of `splits` other than train, validation and test, of letters, digits and hyphens"
                raise ValueError(f"{expected} ({name!r})")
        return value
