"""The folder of a search: begun or gone on with, and what is written into it after every trial."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from compress.pipeline.run import with_absolute_paths
from compress.plugins.search.best_recipe import best_recipe
from compress.plugins.search.engine import Engine
from compress.plugins.search.html_report import search_page
from compress.plugins.search.ledger import NAME as LEDGER
from compress.plugins.search.ledger import Entry, Header, Ledger
from compress.plugins.search.record import SearchRecord
from compress.plugins.search.space import Space
from compress.recipe.loading import dump_recipe
from compress.report.run_folder import LATEST, RECIPE, new_folder, point_latest, write_whole
from compress.utils.environment import granted_cores, processor_class
from compress.utils.errors import InputError
from compress.utils.storage import storage_errors

BEST, RECORD, MODEL = "best.yaml", "search.json", "model"


def begin(space: Space, engine: Engine, artifacts: Path, started: datetime) -> Path:
    """A new folder, with the recipe and a ledger without a trial. Raises `StorageError`."""
    with storage_errors(artifacts):
        place = new_folder(artifacts / "searches" / space.base.name, started)
        write_whole(place / RECIPE, dump_recipe(with_absolute_paths(space.base, space.folder)))
    Ledger(place).begin(_header(space, engine))
    point_latest(place)
    return place


def go_on(space: Space, engine: Engine, artifacts: Path) -> tuple[Path, list[Entry]]:
    """The folder of the latest search and its trials; the engine goes on by what it began with.

    Raises `InputError` where there is none, or one of something else.
    """
    searches = artifacts / "searches" / space.base.name
    place = (searches / LATEST).resolve()
    if not (place / LEDGER).is_file():
        raise InputError("There is no search to go on with.", where=str(searches), hint="run it without --resume first")
    before, entries = Ledger(place).read()
    before.check_same(_header(space, engine))
    engine.candidates.past = before.past
    return place, entries


def write(place: Path, space: Space, engine: Engine, record: SearchRecord) -> None:
    """What is known so far: the record, the best recipe and the page. Raises `StorageError`."""
    with storage_errors(place):
        write_whole(place / RECORD, record.model_dump_json(indent=1) + "\n")
        best = engine.known.best() if record.final is None else record.final.winner.point
        if best is not None:
            refit = record.final is not None and record.final.refit
            write_whole(place / BEST, best_recipe(space, engine, best, refit))
        write_whole(place / "search.html", search_page(record))


def _header(space: Space, engine: Engine) -> Header:
    plain: dict[str, Any] = to_jsonable_python(space.base)
    machine = {"processor": processor_class(), "cores": len(granted_cores())}
    knobs = tuple((knob.name, tuple(knob.values)) for knob in space.knobs)
    return Header(recipe=plain, knobs=knobs, rungs=engine.shares, machine=machine, past=tuple(engine.candidates.past))
