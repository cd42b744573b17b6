"""The licences of what a recipe reads, over earlier runs, and of what runs its files; what they forbid."""

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
from compress.pipeline.licence_detection import Stated, package_licence, stated_by
from compress.pipeline.licence_rules import NOT_STATED, canonical, duties, is_known, joined
from compress.recipe.recipe import Recipe
from compress.report.run_folder import LOCK, REPORT
from compress.results.report import LicenceRecord, Report, load_report
from compress.sources.resolve import find_model, hub_card
from compress.stages.base import all_references
from compress.utils.errors import InputError, ModelError, did_you_mean

RUNTIME, OF_RUN = "runtime ", " of run "
"""How names of records begin, and how those go on that an earlier run brings along."""
_LATER = "its card, which the run fetches"
_ASKS = {
    "share-alike": "what is made of it has to be passed on under the same licence",
    "non-commercial": "no commercial use",
    "no-derivatives": "what is made of it may not be passed on",
    "use-restrictions": "its restrictions of use have to be passed on, with its text",
    "no-training": "what it says may not train other models",
}


@dataclass(frozen=True)
class Source:
    """A model, adapter or data set as the recipe names it; ``binds`` where the weights that ship are made of it."""

    role: Literal["model", "student", "adapter", "data", "test data"]
    name: str
    binds: bool

    @property
    def is_data(self) -> bool:
        """Whether it is rows."""
        return self.role in ("data", "test data")


@dataclass(frozen=True)
class Objection:
    """What a reader must know of a licence, in words; ``forbids`` what the recipe does."""

    words: str
    forbids: bool = False


def find_licences(recipe: Recipe, folder: Path, fetch: bool = False) -> tuple[LicenceRecord, ...]:
    """Of every source of a recipe in ``folder`` and every runtime of its targets; with ``fetch`` cards of the Hub too.

    What an earlier run of this machine made brings along the licences of its own sources. Raises `InputError` for a
    name under `licences` that the recipe doesn't read.
    """
    sources = tuple(_sources(recipe))
    _check_names(recipe, sources)
    found: list[LicenceRecord] = []
    for source in sources:
        place = _place(source, recipe.data, folder)
        stated, earlier = _stated(source, place, recipe, fetch), _earlier(source, place)
        if earlier and not stated.by:
            stated = Stated(carried(earlier.licences), f"run {earlier.recipe}")
        found.append(_record(source, stated, recipe))
        if earlier:
            own = (one for one in earlier.licences if not one.of.startswith(RUNTIME))
            of_run = f"{OF_RUN}{earlier.recipe}"
            found += [one.model_copy(update={"of": f"{one.of}{of_run}", "binds": False}) for one in own]
    return (*found, *_runtimes(recipe))


def _runtimes(recipe: Recipe) -> Iterator[LicenceRecord]:
    """Of the packages that run what is written for the recipe's targets."""
    named = (RUNTIMES.get(profile.target.runtime) for profile in recipe.profiles())
    for package in dict.fromkeys(one.package for one in named if one and one.package):
        licence = package_licence(package)
        said = "its metadata" if licence != NOT_STATED else ""
        yield LicenceRecord(of=f"{RUNTIME}{package}", name=package, licence=licence, stated_in=said)


def carried(records: Iterable[LicenceRecord]) -> str:
    """The licence that weights made of these sources have, as an SPDX expression, or `NOT_STATED`."""
    return joined(record.licence for record in records if record.binds)


def objections(records: Sequence[LicenceRecord], recipe: Recipe) -> list[Objection]:
    """Duties, contradictions between them, unknown terms, and what the recipe may not do."""
    sources = [record for record in records if not record.of.startswith(RUNTIME)]
    found = [one for record in sources if (one := _forbidden(record, sources, recipe))]
    for record in sources:
        asked = [_ASKS[duty] for duty in record.duties if duty in _ASKS]
        if asked:
            found.append(Objection(f"{_shown(record)}: {'; '.join(asked)}"))
    found += _contradictions(sources)
    silent = [record.of for record in sources if record.licence == NOT_STATED and record.stated_in != _LATER]
    if silent:
        found.append(
            Objection(f"no licence is stated of {', '.join(silent)}; `licences.stated` of the recipe may say it")
        )
    strange = [_shown(record) for record in sources if record.licence != NOT_STATED and not is_known(record.licence)]
    if strange:
        found.append(Objection(f"read the terms before you pass the model on: {', '.join(strange)}"))
    return found


def refuse_forbidden(records: Sequence[LicenceRecord], recipe: Recipe) -> list[str]:
    """What isn't forbidden but has to be known, in words. Raises `InputError` for a recipe that a licence forbids."""
    found = objections(records, recipe)
    for one in found:
        if one.forbids:
            raise InputError(
                one.words,
                where="licences",
                expected="a model whose licence permits it",
                hint="take another model, or give the reason why you may under `licences.allowed` of the recipe",
            )
    return [one.words for one in found]


def _forbidden(record: LicenceRecord, sources: Sequence[LicenceRecord], recipe: Recipe) -> Objection | None:
    """Whether the recipe does what the licence of weights doesn't permit."""
    changes = any(stage.output_spec().changes_weights for stage in recipe.stages)
    if record.binds and "no-derivatives" in record.duties and changes:
        what = "permits no derivatives, and the recipe changes the weights"
    elif "no-training" in record.duties and (student := _other_student(record, sources)):
        what = f"forbids to train other models with what it says, and the recipe teaches {student} so"
    else:
        return None
    if record.allowed is not None:
        return Objection(f"{_shown(record)} {what}; the recipe says why it may: {record.allowed}")
    return Objection(f"The licence of {_shown(record)} {what}.", forbids=True)


def _other_student(record: LicenceRecord, sources: Sequence[LicenceRecord]) -> str | None:
    if record.of != "model":
        return None
    others = (one for one in sources if one.of.startswith("student ") and one.licence != record.licence)
    return next((one.name for one in others), None)


def _contradictions(sources: Sequence[LicenceRecord]) -> Iterator[Objection]:
    """Pairs that weights can hardly keep to both, since one stands no terms but its own; lawyers know exceptions."""
    asking = [record for record in sources if record.duties and (record.binds or record.of.startswith("data "))]
    for one, other in combinations(asking, 2):
        if one.licence != other.licence and "share-alike" in (*one.duties, *other.duties):
            yield Objection(
                f"{_shown(one)} and {_shown(other)} may contradict each other: "
                "one wants its own terms for what is made of it, and the other has more"
            )


def _shown(record: LicenceRecord) -> str:
    of = f"{record.of} {record.name}" if record.of == "model" else record.of
    return f"{of}, {record.licence}"


def _record(source: Source, stated: Stated, recipe: Recipe) -> LicenceRecord:
    name = Path(source.name).name if Path(source.name).is_absolute() else source.name
    return LicenceRecord(
        of=source.role if source.role == "model" else f"{source.role} {name}",
        name=name,
        licence=stated.licence,
        stated_in=stated.by,
        binds=source.binds,
        duties=duties(stated.licence),
        allowed=recipe.licences.allowed.get(source.name),
    )


def _stated(source: Source, place: Path | None, recipe: Recipe, fetch: bool) -> Stated:
    if (given := recipe.licences.stated.get(source.name)) is not None:
        return Stated(canonical(given), "the recipe")
    if is_sample(source.name):
        sample = known_samples().get(source.name.removeprefix("sample:"))
        said = canonical(sample.spdx or sample.licence) if sample else NOT_STATED
        return Stated(said, "the sample" if said != NOT_STATED else "")
    stated = stated_by(place) if place is not None else Stated(NOT_STATED, "")
    if stated.by or (place is not None and place.exists() and not _of_hub(place)):
        return stated
    if source.role == "adapter" or is_file_name(source.name):
        return stated
    card = hub_card(source.name, "dataset" if source.is_data else "model", fetch)
    if card is None:
        return Stated(NOT_STATED, "" if fetch else _LATER)
    return stated_by(card)


def _place(source: Source, data: DataConfig, folder: Path) -> Path | None:
    """Where it lies on this machine, with nothing fetched."""
    if is_sample(source.name):
        return None
    for home in (folder, folder / data.source if source.is_data and data.source else folder):
        if (here := find(source.name, home)) is not None:
            return here
    if source.is_data or source.role == "adapter":
        return None
    try:
        return find_model(source.name)
    except ModelError:
        return None


def _of_hub(place: Path) -> bool:
    """Whether it is a download of the Hub's library, which leaves the card out."""
    return place.parent.name == "snapshots"


def _earlier(source: Source, place: Path | None) -> Report | None:
    """The earlier run whose model this is."""
    home = place.parent if place is not None and not source.is_data else None
    if home is None or not all((home / name).is_file() for name in (REPORT, LOCK)):
        return None
    return load_report(home / REPORT)


def _sources(recipe: Recipe) -> Iterator[Source]:
    """The starting model, models and adapters that stages name, and every place that rows come from."""
    named = {one.name: one for one in all_references(recipe.stages) if one.kind != "folder"}
    # The last student that is read takes the place of what went before it; one of random weights is its config alone.
    students = [name for name, one in named.items() if one.kind == "model"]
    yield Source("model", recipe.model, binds=not students)
    for name, one in named.items():
        if one.kind == "adapter":
            yield Source("adapter", name, binds=True)
        elif not one.random_weights:
            yield Source("student", name, binds=name == students[-1])
    # Rows that judge and nothing else leave no trace in the weights.
    splits = {split: name for split, name in recipe.data.splits.items() if split != TEST}
    learned = {*data_names(recipe.data.model_copy(update={"splits": splits}))}
    for name in dict.fromkeys(data_names(recipe.data)):
        yield Source("data" if name in learned else "test data", name, binds=False)


def data_names(data: DataConfig) -> Iterator[str]:
    """Every place that a recipe's rows come from, as it names it."""
    if data.source:
        yield data.source
    for name in (*data.splits.values(), *data.unlabeled):
        if elsewhere := sample_split(name):
            yield elsewhere[0]
        elif is_sample(name) or is_file_name(name) or (not data.source and not name.startswith("random:")):
            yield name


def _check_names(recipe: Recipe, sources: Sequence[Source]) -> None:
    read = [source.name for source in sources]
    for field in ("stated", "allowed"):
        for name in getattr(recipe.licences, field):
            if name not in read:
                raise InputError(
                    f"The recipe reads nothing that is called {name!r}.{did_you_mean(name, read)}",
                    where=f"licences.{field}",
                    expected=f"one of {', '.join(read)}",
                )
