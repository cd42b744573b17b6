"""A whole search: rounds of trials into the ledger, the best so far at any time, and the session at the end."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from compress.cache import storage_errors
from compress.environment import granted_cores, processor_class
from compress.errors import InputError, StageError
from compress.formats.runtimes import why_unavailable
from compress.formats.silence import quiet_libraries
from compress.metrics import describe_metric, format_seconds, format_value
from compress.pipeline.run import with_absolute_paths
from compress.progress import Progress
from compress.recipe_source import dump_recipe
from compress.recipe_source.document import Document
from compress.report.run_folder import LATEST, new_folder, point_latest, write_whole
from compress.search.best import best_recipe
from compress.search.costs import Costs
from compress.search.engine import Engine, Job
from compress.search.finish import Final, Seed, further_seeds, judge, other_seeds
from compress.search.goal import Goal, named
from compress.search.ledger import NAME as LEDGER
from compress.search.ledger import Entry, Header, Ledger
from compress.search.outcome import Outcome, slack
from compress.search.page import search_page
from compress.search.record import SearchRecord, record_of
from compress.search.space import Space
from compress.search.trial import Trial, Trials, target_profile
from compress.workers.journeys import Journey, Workers

BEST, RECORD, MODEL = "best.yaml", "search.json", "model"
_RESERVED = 30.0


@dataclass(frozen=True)
class SearchDone:
    """A search that has ended, and its folder. ``final`` is None where no recipe keeps every limit."""

    folder: Path
    record: SearchRecord


@dataclass
class SearchRun:
    """``document`` is the recipe's, which lies in ``folder``. Nothing is written before the recipe has been checked."""

    document: Document
    folder: Path
    artifacts: Path
    progress: Progress
    resume: bool = False
    workers: str | None = None
    """Who does the work: `ray`, `ray:ADDRESS`, or this process."""

    def __post_init__(self) -> None:
        quiet_libraries()
        self.space = Space(self.document, self.folder)
        self.search, base = self.space.search, self.space.base
        self.goal = Goal.of(base, self.search)
        self.goal.check_resolution(self.search.select.rows)
        target = target_profile(base).target
        if (reason := why_unavailable(target)) is not None:
            raise InputError(
                f"Trials cannot be measured on {target.name}: {reason}.",
                where="search.target",
                expected="a target that is to be had here",
            )
        self.costs = Costs(self.space, self.artifacts)
        any_trains = self.space.trains(self.space.origin)
        shares = (*self.search.rungs, 1.0) if any_trains else (1.0,)
        self.engine = Engine(self.space, self.costs, self.goal, shares, base.seed)
        self.trials = Trials.here(self.goal, self.folder, self.artifacts, self.progress)
        self.entries: list[Entry] = []
        self._before, self._began, self._is_over = 0.0, time.perf_counter(), False
        self.started = datetime.now(UTC).astimezone()

    @property
    def spent(self) -> float:
        """Seconds of the search so far, those of an earlier process too: its trials' own, less what ran at once."""
        return self._before + time.perf_counter() - self._began

    def run(self) -> SearchDone:
        """Search until the budget is spent or nothing is left, then judge. Raises any `CompressError`.

        A search that ends early leaves its ledger, and `best.yaml` as it was by then.
        """
        if self.workers is not None:
            self.trials.workers = self._opened(self.workers)
        try:
            return self._run()
        finally:
            self.trials.workers.close()

    def _opened(self, told: str) -> Workers:
        from compress.workers.ray_workers import open_workers

        base = self.space.base
        if base.module is not None:
            raise InputError(
                "A model that code beside the recipe makes cannot travel to other machines.",
                where="module",
                mend="search without --workers",
            )
        packages = {name for stage in base.stages for name in stage.calls()}
        target = target_profile(base).name
        return open_workers(told, self.trials.roads, target, sorted(packages), self.progress)

    def _run(self) -> SearchDone:
        place, known = self._place()
        self.place, ledger = place, Ledger(place)
        self.progress.note(self._opening())
        try:
            self._search(ledger, known)
            self.progress.note(f"{len(self.entries)} trials: {self.engine.ended}")
            final = self._finish()
        except KeyboardInterrupt:
            best = self.engine.known.best()
            so_far = f"the best so far is in {place / BEST}" if best is not None else "nothing keeps every limit yet"
            self.progress.note(f"interrupted after {len(self.entries)} trials: {so_far}; --resume goes on from here")
            raise
        record = self._record(final)
        self._write(record)
        if final is not None:
            with storage_errors(place):
                shutil.rmtree(place / MODEL, ignore_errors=True)
                shutil.copytree(final.winner.folder, place / MODEL)
        point_latest(place)
        return SearchDone(place, record)

    def _search(self, ledger: Ledger, known: list[Entry]) -> None:
        """Round by round, until nothing is left to try or there is no time for it."""
        self._before = (known[-1].elapsed or sum(entry.outcome.seconds for entry in known)) if known else 0.0
        self._began, self._is_over = time.perf_counter(), False
        self._ahead()
        while not self._is_over and (jobs := self.engine.round()):
            before, new = jobs[: len(known)], jobs[len(known) :]
            for job in before:
                self._replay(ledger, job, known.pop(0))
            # Kernels may be timed here between rounds: nothing may run on then that nobody waits for.
            guess = None if self.goal.timed else partial(self._guess, new, len(self.entries))
            outcomes = self.trials.together(self._asked(new), guess)
            for outcome, job in zip(outcomes, new, strict=False):
                self._take(ledger, job, outcome)

    def _ahead(self) -> None:
        """What the end will need whatever is found: the baselines of further seeds."""
        base, labels = self.space.base, self.space.labels
        if base.baseline not in labels or self.goal.timed:
            return
        seeds = further_seeds(base, self._seeds())
        recipes = (base.model_copy(update={"seed": seed}) for seed in seeds)
        self.trials.workers.ahead([Journey(recipe, until=base.baseline) for recipe in recipes])

    def _asked(self, jobs: Sequence[Job]) -> Iterator[Trial]:
        """The trials of a round, as long as there is time for them; workers may ask for all before one has ended."""
        first = len(self.entries)
        seconds = [self.costs.marginal_seconds(job.point, self.engine.shares[job.rung]) for job in jobs]
        for place, job in enumerate(jobs):
            under_way = seconds[len(self.entries) - first : place]
            if why := self._out_of_time(job, under_way):
                self.engine.ended, self._is_over = why, True
                return
            self.progress.note(f"trial {first + place}: {self.space.words(job.point)}{self._rung(job)} ({job.why})")
            yield self._trial(job, timed=job.rung == self.engine.full)

    def _guess(self, jobs: Sequence[Job], first: int, outcomes: Mapping[int, Outcome]) -> list[Trial]:
        """What may be tried after a round that began with trial ``first``, by what came of it so far."""
        untold = range(len(self.entries) - first, len(jobs))
        most = self.search.trials
        if self._is_over or (most is not None and len(self.entries) + len(untold) >= most):
            return []
        arrived = {jobs[place]: outcomes[place] for place in untold if place in outcomes}
        next_jobs = self.engine.guess(arrived, [jobs[place] for place in untold if place not in outcomes])
        trials = [self._trial(job, timed=False) for job in next_jobs]
        return [trial for trial in trials if trial.seconds <= self._left()]

    def _trial(self, job: Job, timed: bool) -> Trial:
        share = self.engine.shares[job.rung]
        return Trial(self.space.recipe(job.point, share), timed, self.costs.marginal_seconds(job.point, share))

    def _replay(self, ledger: Ledger, job: Job, entry: Entry) -> None:
        """A trial of an earlier process, as the ledger has it."""
        if (entry.point, entry.rung) != (job.point, job.rung):
            raise InputError(
                f"The search cannot be gone on with: trial {entry.number} of its ledger is not what is decided now.",
                where=str(ledger.path),
                expected="the same version of compress and optuna as before",
                mend="begin anew, without --resume; finished stages are kept",
            )
        self.engine.tell(job, entry.outcome)
        self.entries.append(entry)

    def _take(self, ledger: Ledger, job: Job, outcome: Outcome) -> None:
        """Write down what came of a trial, and tell everybody."""
        if outcome.error is not None and job.point == self.space.origin:
            raise StageError(
                f"The recipe itself fails, so there is nothing to search from: {outcome.error}",
                mend="see `compress run` of the recipe",
            )
        entry = Entry(
            number=len(self.entries),
            point=job.point,
            rung=job.rung,
            words=self.space.words(job.point),
            identity=self.space.identity(job.point),
            outcome=outcome,
            elapsed=self.spent,
        )
        ledger.add(entry)
        self.engine.tell(job, outcome)
        self.entries.append(entry)
        self.progress.note(f"trial {entry.number}: {self.said(entry)}")
        self._write(self._record(None))

    def said(self, entry: Entry) -> str:
        """What came of a trial, in a line."""
        outcome = entry.outcome
        if outcome.error is not None:
            return f"failed: {outcome.error}"
        figures = [
            f"{describe_metric(metric).title.lower()} {format_value(describe_metric(metric), outcome.final[metric])}"
            for metric in self.goal.minimize
            if metric in outcome.final
        ]
        for limit in self.goal.limits:
            room = slack(limit, outcome, self.goal.confidence)
            if room is not None:
                surely = "" if room.low == room.value else f" (surely {room.low:+.2%})"
                figures.append(f"{named(limit)}: {room.value:+.2%} inside{surely}")
        verdict = ""
        if entry.rung == self.engine.full:
            verdict = "keeps every limit" if self.goal.keeps(outcome) else "misses a limit"
            verdict += ", the best so far" if self.engine.known.best() == entry.point else ""
        return "; ".join([*figures, *filter(None, [verdict]), format_seconds(outcome.seconds)])

    def _rung(self, job: Job) -> str:
        share = self.engine.shares[job.rung]
        return "" if share == 1 else f", {share:.0%} of its training"

    def _opening(self) -> str:
        recipes, alike = self.space.size, ""
        if self.space.refused:
            alike = f"; {len(self.space.refused)} values fit no recipe: {', '.join(self.space.refused)}"
        return f"{recipes:,} recipes from {len(self.space.knobs)} choices, {self.search.budget}{alike}"

    def _out_of_time(self, job: Job, under_way: Sequence[float]) -> str | None:
        """Why a trial isn't begun; beside it trials of so many seconds are ``under_way``."""
        if self.search.trials is not None and len(self.entries) + len(under_way) >= self.search.trials:
            return f"as many trials as were asked for ({self.search.trials})"
        if not self.entries:
            return None
        left = self._left() - sum(under_way) / self.trials.workers.width
        if self.costs.marginal_seconds(job.point, self.engine.shares[job.rung]) > left:
            if self.engine.known.finished:
                return f"the budget of {self.search.budget} is spent but for the session at the end"
            raise InputError(
                f"The budget of {self.search.budget} is shorter than one trial: {format_seconds(self.spent)} are "
                "spent, and the recipe as it stands isn't trained yet.",
                where="search.budget",
                mend="give it more time; what was done so far is kept",
            )
        return None

    def _left(self) -> float:
        """Seconds for further trials."""
        return self.search.seconds - self.spent - self._reserve()

    def _reserve(self) -> float:
        """Seconds that the session at the end will take: tests and times, and the further seeds' training."""
        whole = sum(step.seconds for step in self.costs.steps(self.space.origin))
        first = next((one for one in self.engine.known.finished.values()), None)
        if first is not None:
            whole = sum(cost.seconds for cost in first.stages if not cost.cached) or whole
        seeds = self._seeds() * whole
        return _RESERVED + min(seeds, 0.5 * self.search.seconds)

    def _seeds(self) -> int:
        return self.search.seeds if len(self.engine.shares) > 1 else 0

    def _finish(self) -> Final | None:
        best = self.engine.known.best()
        if best is None:
            return None
        seeds = list[Seed]()
        if self._seeds():
            self.progress.note(f"the winner again, of {self._seeds()} more training seed{'s'[: self._seeds() > 1]}")
            seeds += other_seeds(self.space, self.engine, self.trials, self._seeds())
        # Nothing may run here while times are taken.
        self.trials.workers.rest()
        self.progress.note(f"the session at the end, on the test rows: {self.space.words(best)}")
        final = judge(self.space, self.engine, self.trials)
        return final.model_copy(update={"seeds": tuple(seeds)})

    def _record(self, final: Final | None) -> SearchRecord:
        return record_of(self.space, self.engine, self.costs, self.entries, final, self.started)

    def _write(self, record: SearchRecord) -> None:
        with storage_errors(self.place):
            write_whole(self.place / RECORD, record.model_dump_json(indent=1) + "\n")
            best = self.engine.known.best()
            if best is not None:
                write_whole(self.place / BEST, best_recipe(self.space, self.engine, best))
            write_whole(self.place / "search.html", search_page(record))

    def _place(self) -> tuple[Path, list[Entry]]:
        """The folder of the search, and the trials that are known already."""
        searches = self.artifacts / "searches" / self.space.base.name
        header = self._header()
        if self.resume:
            place = (searches / LATEST).resolve()
            if not (place / LEDGER).is_file():
                raise InputError(
                    "There is no search to go on with.", where=str(searches), mend="run it without --resume first"
                )
            before, entries = Ledger(place).read()
            before.check_same(header)
            return place, entries
        with storage_errors(self.artifacts):
            place = new_folder(searches, self.started)
            recipe = with_absolute_paths(self.space.base, self.folder)
            write_whole(place / "recipe.yaml", dump_recipe(recipe))
        Ledger(place).begin(header)
        point_latest(place)
        return place, []

    def _header(self) -> Header:
        plain: dict[str, Any] = to_jsonable_python(self.space.base)
        machine = {"processor": processor_class(), "cores": len(granted_cores())}
        knobs = tuple((knob.name, tuple(knob.values)) for knob in self.space.knobs)
        return Header(recipe=plain, knobs=knobs, rungs=self.engine.shares, machine=machine)
