"""A whole search: rounds of trials into the ledger, the best so far at any time, and the session at the end."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from compress.plugins.ray.jobs import InProcess, Roads, Workers
from compress.plugins.search.costs import Costs
from compress.plugins.search.dry_run import Prepared
from compress.plugins.search.ending import Ending
from compress.plugins.search.engine import Engine, Job
from compress.plugins.search.final_evaluation import Final
from compress.plugins.search.folder import BEST, MODEL, begin, go_on, write
from compress.plugins.search.formatting import outcome_words
from compress.plugins.search.latency_estimator import Latencies
from compress.plugins.search.ledger import Entry, Ledger
from compress.plugins.search.outcome import Outcome
from compress.plugins.search.progress import Nobody, Seen, Trying, Watcher
from compress.plugins.search.record import SearchRecord, record_of
from compress.plugins.search.refit import Refit
from compress.plugins.search.size_estimator import Foresight
from compress.plugins.search.trial import Quiet, Trial, Trials, target_profile
from compress.recipe.document import Document
from compress.report.run_folder import point_latest
from compress.results.formatting import format_seconds
from compress.utils.errors import InputError, StageError, StorageError
from compress.utils.progress import Progress
from compress.utils.storage import storage_errors


@dataclass(frozen=True)
class SearchDone:
    """A search that has ended, and its folder. ``final`` is None where no recipe's figures keep every limit."""

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
    watcher: Watcher = field(default_factory=Nobody)
    origin: str = "the recipe as it stands"

    def __post_init__(self) -> None:
        roads = Roads(self.folder, self.artifacts, Quiet(self.progress))
        self.prepared = Prepared(self.document, self.folder, self.artifacts, roads)
        self.space, self.goal = self.prepared.space, self.prepared.goal
        self.search, base = self.space.search, self.space.base
        self.costs = Costs(self.space)
        any_trains = self.space.trains(self.space.origin)
        shares = (*self.search.rungs, 1.0) if any_trains else (1.0,)
        self.trials = Trials(self.goal, roads, InProcess(roads))
        foresight = Foresight(self.space, lambda: roads.road(base))
        refit = Refit(self.space, self.trials, foresight)
        self.engine = Engine(self.space, self.costs, self.goal, shares, base.seed, self.prepared.past, refit.is_fit)
        self.ending = Ending(self.space, self.costs, self.engine, self.trials, refit)
        self.latencies = Latencies(foresight)
        self.costs.foresee(foresight, self.latencies)
        self.entries: list[Entry] = []
        self._trying: dict[int, Trying] = {}
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
        from compress.plugins.ray.ray_workers import open_workers

        base = self.space.base
        if base.module is not None:
            raise InputError(
                "A model that code beside the recipe makes cannot travel to other machines.",
                where="module",
                hint="search without --workers",
            )
        packages = {name for stage in base.stages for name in stage.calls()}
        target = target_profile(base).name
        return open_workers(told, self.trials.roads, target, sorted(packages), self.progress)

    def _run(self) -> SearchDone:
        place, known = self._place()
        self.place, ledger = place, Ledger(place)
        self.latencies.keep_in(place)
        for line in self.prepared.opening(self.origin).lines():
            self.progress.note(line)
        try:
            self._search(ledger, known)
            self.progress.note(f"{len(self.entries)} trials: {self.engine.ended}")
            final = self.ending.judged(self.progress.note, self._say, self.search.seconds - self.spent)
        except (KeyboardInterrupt, StorageError) as error:
            self.watcher.leave()
            best = self.engine.known.best()
            so_far = f"the best so far is in {place / BEST}" if best is not None else "nothing keeps every limit yet"
            ended = "interrupted" if isinstance(error, KeyboardInterrupt) else "stopped"
            self.progress.note(
                f"{ended} after {len(self.entries)} trials: {so_far}; the same command with --resume goes on from here"
            )
            raise
        record = self._record(final)
        write(place, self.space, self.engine, record)
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
        if not self.goal.timed:
            self.trials.workers.ahead(self.ending.ahead())
        told = False
        while not self._is_over and (jobs := self._round()):
            if not told and self.engine.candidates.left is not None:
                told, left = True, round(self.engine.candidates.left * self.space.size)
                self.progress.note(f"predictions leave {left:,} of {self.space.size:,} recipes")
            before, new = jobs[: len(known)], jobs[len(known) :]
            for job in before:
                self._replay(ledger, job, known.pop(0))
            # Kernels may be timed here between rounds: nothing may run on then that nobody waits for.
            guess = None if self.goal.timed else partial(self._guess, new, len(self.entries))
            outcomes = self.trials.together(self._asked(new), guess)
            for outcome, job in zip(outcomes, new, strict=False):
                self._take(ledger, job, outcome)

    def _round(self) -> list[Job]:
        """What is tried next. The first time that others than the recipe itself are, all of them are foretold."""
        if len(self.entries) == 1 and self.costs.foresight is not None and self.costs.foresight.begun:
            self._say("foretelling sizes and times of the other recipes")
        return self.engine.round()

    def _asked(self, jobs: Sequence[Job]) -> Iterator[Trial]:
        """The trials of a round, as long as there is time for them; workers may ask for all before one has ended."""
        first = len(self.entries)
        seconds = [self.costs.seconds_left(job.point, self.engine.shares[job.rung]) for job in jobs]
        for place, job in enumerate(jobs):
            under_way = seconds[len(self.entries) - first : place]
            if why := self._out_of_time(job, under_way):
                self.engine.ended, self._is_over = why, True
                return
            self._try(first + place, job)
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
        return Trial(self.space.recipe(job.point, share), timed, self.costs.seconds_left(job.point, share))

    def _replay(self, ledger: Ledger, job: Job, entry: Entry) -> None:
        """A trial of an earlier process, as the ledger has it."""
        if (entry.point, entry.rung) != (job.point, job.rung):
            raise InputError(
                f"The search cannot be gone on with: trial {entry.number} of its ledger is not what is decided now.",
                where=str(ledger.path),
                expected="the same version of compress and optuna as before",
                hint="begin anew, without --resume; finished stages are kept",
            )
        self.engine.tell(job, entry.outcome)
        self.entries.append(entry)

    def _take(self, ledger: Ledger, job: Job, outcome: Outcome) -> None:
        """Write down what came of a trial, and tell everybody."""
        if outcome.error is not None and job.point == self.space.origin:
            raise StageError(
                f"The recipe itself fails, so there is nothing to search from: {outcome.error}",
                hint="see `compress run` of the recipe",
            )
        entry = Entry(
            number=len(self.entries),
            point=job.point,
            rung=job.rung,
            words=self.space.words(job.point),
            identity=self.space.identity(job.point),
            why=job.why,
            outcome=outcome,
            elapsed=self.spent,
        )
        ledger.add(entry)
        self.engine.tell(job, outcome)
        self.entries.append(entry)
        self._trying.pop(entry.number, None)
        self.progress.note(f"trial {entry.number}: {self.said(entry)}")
        write(self.place, self.space, self.engine, self._record(None))
        self._see()

    def _try(self, number: int, job: Job) -> None:
        """Say and show that a trial begins."""
        words, share = self.space.words(job.point), self.engine.shares[job.rung]
        self.progress.note(f"trial {number}: {words}{self._rung(job)} ({job.why})")
        self._trying[number] = Trying(number, words, share, job.why, job.expected, time.monotonic())
        self._see()

    def _see(self, doing: str = "") -> None:
        """Show whoever watches how far it is."""
        trying = () if doing else tuple(self._trying.values())
        self.watcher.see(Seen(self._record(None), trying, self._left(), time.monotonic(), doing))

    def _say(self, doing: str) -> None:
        """Say and show what runs that is no trial."""
        self.progress.note(doing)
        self._see(doing)

    def said(self, entry: Entry) -> str:
        """What came of a trial, in a line."""
        outcome = entry.outcome
        if outcome.error is not None:
            return f"failed: {outcome.error}"
        verdict = ""
        if entry.rung == self.engine.full:
            verdict = "keeps every limit" if self.goal.keeps(outcome) else "misses a limit"
            verdict += ", the best so far" if self.engine.known.best() == entry.point else ""
        return "; ".join(
            [*outcome_words(self.goal, outcome), *filter(None, [verdict]), format_seconds(outcome.seconds)]
        )

    def _rung(self, job: Job) -> str:
        share = self.engine.shares[job.rung]
        return "" if share == 1 else f", {share:.0%} of its training"

    def _out_of_time(self, job: Job, under_way: Sequence[float]) -> str | None:
        """Why a trial isn't begun; beside it trials of so many seconds are ``under_way``."""
        if self.search.trials is not None and len(self.entries) + len(under_way) >= self.search.trials:
            return f"as many trials as were asked for ({self.search.trials})"
        if not self.entries:
            return None
        left = self._left() - sum(under_way) / self.trials.workers.width
        if self.costs.seconds_left(job.point, self.engine.shares[job.rung]) > left:
            if len(self.entries) == 1 and self.spent > self.search.seconds:
                return (
                    f"the budget of {self.search.budget} is shorter than one trial, which took "
                    f"{format_seconds(self.spent)}; --resume with more time goes on from there"
                )
            return f"the budget of {self.search.budget} is spent but for the session at the end"
        return None

    def _left(self) -> float:
        """Seconds for further trials."""
        return self.search.seconds - self.spent - self.ending.reserve()

    def _record(self, final: Final | None) -> SearchRecord:
        return record_of(self.space, self.engine, self.costs, self.entries, final, self.started)

    def _place(self) -> tuple[Path, list[Entry]]:
        """The folder of the search, and the trials that are known already."""
        if self.resume:
            return go_on(self.space, self.engine, self.artifacts)
        return begin(self.space, self.engine, self.artifacts, self.started), []
