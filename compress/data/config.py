"""The `data` section of a recipe."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from compress.utils.pydantic_models import Frozen, FrozenAliased

FILE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_SAMPLE = re.compile(r"^sample:[a-z0-9-]+$")
_NAME = re.compile(r"^[A-Za-z0-9-]+$")
Language = Literal["text", "python"]


def is_file_name(value: str) -> bool:
    """Return whether a split or unlabeled source is a data file and not the name of a split."""
    return value.endswith(FILE_SUFFIXES)


def is_sample(value: str) -> bool:
    """Return whether a reference has the form `sample:NAME`."""
    return bool(_SAMPLE.match(value))


def sample_split(value: str) -> tuple[str, str] | None:
    """Return `sample:NAME/SPLIT` as (`sample:NAME`, `SPLIT`), or ``None`` for anything else."""
    sample, _, split = value.partition("/")
    return (sample, split) if is_sample(sample) and split else None


class HoldOut(FrozenAliased):
    """Rows that no stage reads and by which models are selected. The test split then judges the selection."""

    rows: int = Field(ge=1, description="number of rows to hold out; equal rows go with them")
    source: str = Field("train", alias="from", description="split that the rows are taken from")
    split: str = Field("select", min_length=1, description="name of the new split")
    seed: int = Field(0, ge=0, description="seed of the random choice")


class DataConfig(Frozen):
    """Source of the examples, and the content of each split."""

    source: str | None = Field(
        None,
        description="`sample:NAME`, a folder with one file or folder a split, or a Hugging Face dataset id. "
        "May be left out when every split names a file or, by a path with a slash, a folder.",
    )
    splits: dict[str, str] = Field(
        {"train": "train", "validation": "validation", "test": "test"},
        description="split -> its name in the source, a CSV, JSONL or Parquet file, a folder with one folder for "
        "each class of images or recordings, `sample:NAME/SPLIT`, or, of a graph of no task, a folder of .npz files or "
        "`random:COUNT`",
    )
    without_labels: tuple[str, ...] = Field(
        (), description="splits whose rows have no label: enough to export and to calibrate with, not to train on"
    )
    columns: dict[str, str] = Field({}, description="the task's column name -> the column's name in the files")
    labels: tuple[str, ...] | None = Field(None, min_length=2, description="class names in the order of their ids")
    unlabeled: tuple[str, ...] = Field(
        (), description="extra inputs for distillation: `sample:NAME` or files with the task's input columns"
    )
    drop_overlap: bool = Field(
        False,
        description="leave out train and validation rows that also stand in test, instead of refusing them",
    )
    hold_out: tuple[HoldOut, ...] | None = Field(
        None,
        description="rows of a split that become one of their own, seen by no stage: {rows: 1500, from: train}; "
        "`compress search` chooses by those of `select`",
    )
    also: dict[str, Language] = Field(
        {},
        description="further splits that a language model is judged on beside test, by what they are written in: "
        "{verses: text, code: python}; of python each kind of token is judged too",
    )
    max_length: int = Field(128, ge=4, description="tokens an example is cut to")

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

    @model_validator(mode="after")
    def _also_are_splits(self) -> DataConfig:
        for name in self.also:
            if name not in self.splits or name in ("train", "validation", "test") or not _NAME.match(name):
                raise ValueError(
                    f"in `also` names of `splits` other than train, validation and test, of letters, digits and "
                    f"hyphens ({name!r})"
                )
        return self
