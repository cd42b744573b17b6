"""Licences of everything that a recipe reads, of earlier runs and of runtimes, and conflicts with the recipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

from compress.data.config import DataConfig, is_file_name, is_sample, sample_split
from compress.data.dataset import TEST
from compress.data.samples.sample import known_samples
from compress.data.source import find
from compress.formats.registry import RUNTIMES
from compress.pipeline.licence_detection import (
    NOT_STATED,
    LicenceStatement,
    canonical,
    duties,
    find_licence,
    is_known,
    joined,
    package_licence,
)
from compress.recipe.recipe import Recipe
from compress.report.run_folder import LOCK, REPORT
from compress.results.report import LicenceRecord, load_report
from compress.sources.resolve import find_model, hub_card
from compress.stages.base import all_references
from compress.utils.errors import InputError, ModelError, did_you_mean

RUNTIME, OF_RUN = "runtime ", " of run "
"""Prefix of records of runtimes, and infix of records that an earlier run contributes."""
_LATER = "its card, which the run fetches"
_ASKS = {
    "share-alike": "derived models must be distributed under the same licence",
    "non-commercial": "no commercial use",
    "no-derivatives": "derived models must not be distributed",
    "use-restrictions": "its use restrictions and its text must be passed on",
    "no-training": "its outputs must not be used to train other models",
}


@dataclass(frozen=True)
class Source:
    """Model, adapter or data set as the recipe names it. ``binds`` is True if the final weights derive from it."""

    role: Literal["model", "student", "adapter", "data", "test data"]
    name: str
    binds: bool

    @property
    def is_data(self) -> bool:
        """Return True for rows of data."""
        return self.role in ("data", "test data")


def find_licences(recipe: Recipe, folder: Path, fetch: bool = False) -> tuple[LicenceRecord, ...]:
    """Return the licences of every source of a recipe and of every runtime of its targets.

    With ``fetch`` cards of the Hugging Face Hub are downloaded. A model of an earlier run on this machine adds the
    licences of that run's sources. Raises `InputError` for a name under `licences` that the recipe does not read.
    """
    sources = tuple(_sources(recipe))
    source_names = [source.name for source in sources]
    for field in ("stated", "allowed"):
        for name in getattr(recipe.licences, field):
            if name not in source_names:
                raise InputError(
                    f"The recipe has no source named {name!r}.{did_you_mean(name, source_names)}",
                    where=f"licences.{field}",
                    expected=f"one of {', '.join(source_names)}",
                )
    records: list[LicenceRecord] = []
    for source in sources:
        path = _place(source, recipe.data, folder)
        # The report of the earlier run on this machine that made the model.
        home = path.parent if path is not None and not source.is_data else None
        is_run = home is not None and all((home / name).is_file() for name in (REPORT, LOCK))
        earlier = load_report(home / REPORT) if home is not None and is_run else None
        # A licence in the files wins over that of the earlier run.
        stated = _stated(source, path, recipe, fetch)
        if earlier and not stated.by:
            stated = LicenceStatement(carried(earlier.licences), f"run {earlier.recipe}")
        name = Path(source.name).name if Path(source.name).is_absolute() else source.name
        records.append(
            LicenceRecord(
                of=source.role if source.role == "model" else f"{source.role} {name}",
                name=name,
                licence=stated.licence,
                stated_in=stated.by,
                binds=source.binds,
                duties=duties(stated.licence),
                allowed=recipe.licences.allowed.get(source.name),
            )
        )
        if earlier:
            # Weights of an earlier run carry the duties of that run's sources.
            records += [
                record.model_copy(update={"of": f"{record.of}{OF_RUN}{earlier.recipe}", "binds": False})
                for record in earlier.licences
                if not record.of.startswith(RUNTIME)
            ]
    # The packages that run files for the recipe's targets.
    runtimes = (RUNTIMES.get(profile.target.runtime) for profile in recipe.profiles())
    for package in dict.fromkeys(runtime.package for runtime in runtimes if runtime and runtime.package):
        licence = package_licence(package)
        stated_in = "its metadata" if licence != NOT_STATED else ""
        records.append(LicenceRecord(of=f"{RUNTIME}{package}", name=package, licence=licence, stated_in=stated_in))
    return tuple(records)


def carried(records: Iterable[LicenceRecord]) -> str:
    """Return the licence of weights made from these sources as an SPDX expression, or `NOT_STATED`."""
    return joined(record.licence for record in records if record.binds)


def remarks_on(records: Sequence[LicenceRecord], recipe: Recipe) -> list[str]:
    """Return duties, contradictions between them, unknown terms, and conflicts with the recipe."""
    sources = [record for record in records if not record.of.startswith(RUNTIME)]
    remarks = []
    for record in sources:
        # The user may have a separate permission. The recipe then states the reason, and the report repeats it.
        if (conflict := _conflict(record, sources, recipe)) is not None:
            reason = f"; the recipe gives the reason for an exception: {record.allowed}" if record.allowed else ""
            remarks.append(f"{_shown(record)} {conflict}{reason}")
    remarks += [f"{_shown(record)}: {'; '.join(map(_ASKS.__getitem__, record.duties))}"
                for record in sources if record.duties]  # fmt: skip
    # Pairs of share-alike licences and others with duties may not be combined.
    with_duties = [record for record in sources if record.duties and (record.binds or record.of.startswith("data "))]
    remarks += [
        f"{_shown(first)} and {_shown(second)} may contradict each other: "
        "one requires its own terms for derived models, and the other has further duties"
        for first, second in combinations(with_duties, 2)
        if first.licence != second.licence and "share-alike" in (*first.duties, *second.duties)
    ]
    without_licence = [record.of for record in sources if record.licence == NOT_STATED and record.stated_in != _LATER]
    if without_licence:
        names = ", ".join(without_licence)
        remarks.append(f"no licence is stated for {names}; `licences.stated` of the recipe may say it")
    # Unknown licences are not judged. The user has to read them.
    licensed = [record for record in sources if record.licence != NOT_STATED]
    unknown_terms = [_shown(record) for record in licensed if not is_known(record.licence)]
    if unknown_terms:
        remarks.append(f"read the terms before you distribute the model: {', '.join(unknown_terms)}")
    return remarks


def refuse_forbidden(records: Sequence[LicenceRecord], recipe: Recipe) -> None:
    """Raise `InputError` for a recipe that a licence forbids."""
    for record in records:
        conflict = _conflict(record, records, recipe)
        if conflict is not None and record.allowed is None:
            raise InputError(
                f"The licence of {_shown(record)} {conflict}.",
                where="licences",
                expected="a model whose licence permits it",
                hint="use another model, or give the reason for an exception under `licences.allowed` of the recipe",
            )


def _conflict(record: LicenceRecord, sources: Sequence[LicenceRecord], recipe: Recipe) -> str | None:
    """Return what the recipe does although the licence of a model does not permit it, or None."""
    changes_weights = any(stage.output_spec().changes_weights for stage in recipe.stages)
    if record.binds and "no-derivatives" in record.duties and changes_weights:
        return "permits no derivatives, and the recipe changes the weights"
    # Students with another licence than the model whose output trains them.
    students = [other.name for other in sources if other.of.startswith("student ") and other.licence != record.licence]
    if record.of == "model" and "no-training" in record.duties and students:
        return f"forbids training other models on its outputs, which the recipe does for {students[0]}"
    return None


def _shown(record: LicenceRecord) -> str:
    """Return a record in words."""
    of = f"{record.of} {record.name}" if record.of == "model" else record.of
    return f"{of}, {record.licence}"


def _stated(source: Source, place: Path | None, recipe: Recipe, fetch: bool) -> LicenceStatement:
    """Return the licence that the recipe, a sample, a file or a card states for a source.

    Args:
        source: The source.
        place: Its path, if it is local.
        recipe: The recipe.
        fetch: Download cards of the Hub.
    """
    if (licence := recipe.licences.stated.get(source.name)) is not None:
        return LicenceStatement(canonical(licence), "the recipe")
    if is_sample(source.name):
        sample = known_samples().get(source.name.removeprefix("sample:"))
        licence_of_sample = canonical(sample.spdx or sample.licence) if sample else NOT_STATED
        return LicenceStatement(licence_of_sample, "the sample" if licence_of_sample != NOT_STATED else "")
    stated = find_licence(place) if place is not None else LicenceStatement(NOT_STATED, "")
    # True for a download of the Hub's library, which does not contain the card.
    if stated.by or (place is not None and place.exists() and place.parent.name != "snapshots"):
        return stated
    if source.role == "adapter" or is_file_name(source.name):
        return stated
    card = hub_card(source.name, "dataset" if source.is_data else "model", fetch)
    if card is None:
        return LicenceStatement(NOT_STATED, "" if fetch else _LATER)
    return find_licence(card)


def _place(source: Source, data: DataConfig, folder: Path) -> Path | None:
    """Return the local path of a source, or None. Nothing is downloaded."""
    if is_sample(source.name):
        return None
    # Rows may be named relative to the data's folder.
    for base in (folder, folder / data.source if source.is_data and data.source else folder):
        if (path := find(source.name, base)) is not None:
            return path
    if source.is_data or source.role == "adapter":
        return None
    try:
        return find_model(source.name)
    except ModelError:
        return None


def _sources(recipe: Recipe) -> Iterator[Source]:
    """Yield the starting model, models and adapters that stages name, and every source of rows."""
    references = {
        reference.name: reference for reference in all_references(recipe.stages) if reference.kind != "folder"
    }
    # The last trained student replaces the model before it. A student with random weights is only a config.
    students = [name for name, reference in references.items() if reference.kind == "model"]
    yield Source("model", recipe.model, binds=not students)
    for name, reference in references.items():
        if reference.kind == "adapter":
            yield Source("adapter", name, binds=True)
        elif not reference.random_weights:
            yield Source("student", name, binds=name == students[-1])
    # Rows that are only used for evaluation do not affect the weights.
    splits = {split: name for split, name in recipe.data.splits.items() if split != TEST}
    training_names = {*data_names(recipe.data.model_copy(update={"splits": splits}))}
    for name in dict.fromkeys(data_names(recipe.data)):
        yield Source("data" if name in training_names else "test data", name, binds=False)


def data_names(data: DataConfig) -> Iterator[str]:
    """Yield every source of rows as the recipe names it."""
    if data.source:
        yield data.source
    for name in (*data.splits.values(), *data.unlabeled):
        if sample := sample_split(name):
            yield sample[0]
        elif is_sample(name) or is_file_name(name) or (not data.source and not name.startswith("random:")):
            yield name
