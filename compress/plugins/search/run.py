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
from compress.plugins.search.costs import CostEstimator
from compress.plugins.search.dry_run import PreparedSearch
from compress.plugins.search.engine import Engine, PlannedTrial
from compress.plugins.search.final_evaluation import FinalEvaluation, FinalResult
from compress.plugins.search.formatting import format_outcome
from compress.plugins.search.latency_estimator import LatencyEstimator
from compress.plugins.search.ledger import Ledger, LedgerEntry
from compress.plugins.search.outcome import TrialOutcome
from compress.plugins.search.progress import NoDisplay, ProgressDisplay, RunningTrial, SearchSnapshot
from compress.plugins.search.record import SearchRecord, build_record
from compress.plugins.search.refit import Refit
from compress.plugins.search.search_folder import BEST, MODEL, create_folder, resume_folder, write
from compress.plugins.search.size_estimator import SizeEstimator
from compress.plugins.search.trial import BarsOnly, RecipeTrial, TrialRunner, target_profile
from compress.recipe.document import Document
from compress.report.run_folder import update_latest_link
from compress.results.formatting import format_seconds
from compress.utils.errors import InputError, StageError, StorageError
from compress.utils.progress import Progress
from compress.utils.storage import storage_errors


@dataclass(frozen=True)
class SearchResult:
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
    watcher: ProgressDisplay = field(default_factory=NoDisplay)
    origin: str = "the recipe as it stands"

    def __post_init__(self) -> None:
        roads = Roads(self.folder, self.artifacts, BarsOnly(self.progress))
        self.prepared = PreparedSearch(self.document, self.folder, self.artifacts, roads)
        self.space, self.goal = self.prepared.space, self.prepared.goal
        self.search, base = self.space.search, self.space.base
        self.costs = CostEstimator(self.space)
        any_trains = self.space.trains(self.space.origin)
        shares = (*self.search.rungs, 1.0) if any_trains else (1.0,)
        self.trials = TrialRunner(self.goal, roads, InProcess(roads))
        foresight = SizeEstimator(self.space, lambda: roads.runner(base))
        refit = Refit(self.space, self.trials, foresight)
        self.engine = Engine(
            self.space, self.costs, self.goal, shares, base.seed, self.prepared.past, refit.fits_limits
        )
        self.ending = FinalEvaluation(self.space, self.costs, self.engine, self.trials, refit)
        self.latencies = LatencyEstimator(foresight)
        self.costs.use_estimators(foresight, self.latencies)
        self.entries: list[LedgerEntry] = []
        self._trying: dict[int, RunningTrial] = {}
        self._before, self._began, self._is_over = 0.0, time.perf_counter(), False
        self.started = datetime.now(UTC).astimezone()

    @property
    def spent(self) -> float:
        """Seconds of the search so far, those of an earlier process too: its trials' own, less what ran at once."""
        return self._before + time.perf_counter() - self._began

    def run(self) -> SearchResult:
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
        packages = {name for stage in base.stages for name in stage.called_packages()}
        target = target_profile(base).name
        return open_workers(told, self.trials.roads, target, sorted(packages), self.progress)

    def _run(self) -> SearchResult:
        place, known = self._place()
        self.place, ledger = place, Ledger(place)
        self.latencies.use_snapshot(place)
        for line in self.prepared.summary(self.origin).lines():
            self.progress.note(line)
        try:
            self._search(ledger, known)
            self.progress.note(f"{len(self.entries)} trials: {self.engine.end_reason}")
            final = self.ending.run(self.progress.note, self._say, self.search.seconds - self.spent)
        except (KeyboardInterrupt, StorageError) as error:
            self.watcher.stop()
            best = self.engine.observations.best()
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
        update_latest_link(place)
        return SearchResult(place, record)

    def _search(self, ledger: Ledger, known: list[LedgerEntry]) -> None:
        """Round by round, until nothing is left to try or there is no time for it."""
        self._before = (known[-1].elapsed or sum(entry.outcome.seconds for entry in known)) if known else 0.0
        self._began, self._is_over = time.perf_counter(), False
        if not self.goal.needs_timing:
            self.trials.workers.prefetch(self.ending.prefetch_jobs())
        told = False
        while not self._is_over and (jobs := self._round()):
            if not told and self.engine.candidates.remaining_share is not None:
                told, left = True, round(self.engine.candidates.remaining_share * self.space.size)
                self.progress.note(f"predictions leave {left:,} of {self.space.size:,} recipes")
            before, new = jobs[: len(known)], jobs[len(known) :]
            for job in before:
                self._replay(ledger, job, known.pop(0))
            # Kernels may be timed here between rounds: nothing may run on then that nobody waits for.
            guess = None if self.goal.needs_timing else partial(self._guess, new, len(self.entries))
            outcomes = self.trials.run_all(self._asked(new), guess)
            for outcome, job in zip(outcomes, new, strict=False):
                self._take(ledger, job, outcome)

    def _round(self) -> list[PlannedTrial]:
        """What is tried next. The first time that others than the recipe itself are, all of them are foretold."""
        if len(self.entries) == 1 and self.costs.foresight is not None and self.costs.foresight.is_ready:
            self._say("foretelling sizes and times of the other recipes")
        return self.engine.next_round()

    def _asked(self, jobs: Sequence[PlannedTrial]) -> Iterator[RecipeTrial]:
        """The trials of a round, as long as there is time for them; workers may ask for all before one has ended."""
        first = len(self.entries)
        seconds = [self.costs.corrected_remaining_seconds(job.point, self.engine.shares[job.rung]) for job in jobs]
        for place, job in enumerate(jobs):
            under_way = seconds[len(self.entries) - first : place]
            if why := self._out_of_time(job, under_way):
                self.engine.end_reason, self._is_over = why, True
                return
            self._try(first + place, job)
            yield self._trial(job, timed=job.rung == self.engine.full_rung)

    def _guess(
        self, jobs: Sequence[PlannedTrial], first: int, outcomes: Mapping[int, TrialOutcome]
    ) -> list[RecipeTrial]:
        """What may be tried after a round that began with trial ``first``, by what came of it so far."""
        untold = range(len(self.entries) - first, len(jobs))
        most = self.search.trials
        if self._is_over or (most is not None and len(self.entries) + len(untold) >= most):
            return []
        arrived = {jobs[place]: outcomes[place] for place in untold if place in outcomes}
        next_jobs = self.engine.speculate(arrived, [jobs[place] for place in untold if place not in outcomes])
        trials = [self._trial(job, timed=False) for job in next_jobs]
        return [trial for trial in trials if trial.seconds <= self._left()]

    def _trial(self, job: PlannedTrial, timed: bool) -> RecipeTrial:
        share = self.engine.shares[job.rung]
        return RecipeTrial(
            self.space.recipe(job.point, share), timed, self.costs.corrected_remaining_seconds(job.point, share)
        )

    def _replay(self, ledger: Ledger, job: PlannedTrial, entry: LedgerEntry) -> None:
        """A trial of an earlier process, as the ledger has it."""
        if (entry.point, entry.rung) != (job.point, job.rung):
            raise InputError(
                f"The search cannot be gone on with: trial {entry.number} of its ledger is not what is decided now.",
                where=str(ledger.path),
                expected="the same version of compress and optuna as before",
                hint="begin anew, without --resume; finished stages are kept",
            )
        self.engine.record(job, entry.outcome)
        self.entries.append(entry)

    def _take(self, ledger: Ledger, job: PlannedTrial, outcome: TrialOutcome) -> None:
        """Write down what came of a trial, and tell everybody."""
        if outcome.error is not None and job.point == self.space.origin:
            raise StageError(
                f"The recipe itself fails, so there is nothing to search from: {outcome.error}",
                hint="see `compress run` of the recipe",
            )
        entry = LedgerEntry(
            number=len(self.entries),
            point=job.point,
            rung=job.rung,
            words=self.space.describe(job.point),
            identity=self.space.identity(job.point),
            why=job.why,
            outcome=outcome,
            elapsed=self.spent,
        )
        ledger.append(entry)
        self.engine.record(job, outcome)
        self.entries.append(entry)
        self._trying.pop(entry.number, None)
        self.progress.note(f"trial {entry.number}: {self.describe_entry(entry)}")
        write(self.place, self.space, self.engine, self._record(None))
        self._see()

    def _try(self, number: int, job: PlannedTrial) -> None:
        """Say and show that a trial begins."""
        words, share = self.space.describe(job.point), self.engine.shares[job.rung]
        self.progress.note(f"trial {number}: {words}{self._rung(job)} ({job.why})")
        self._trying[number] = RunningTrial(number, words, share, job.why, job.expected, time.monotonic())
        self._see()

    def _see(self, doing: str = "") -> None:
        """Show whoever watches how far it is."""
        trying = () if doing else tuple(self._trying.values())
        self.watcher.show(SearchSnapshot(self._record(None), trying, self._left(), time.monotonic(), doing))

    def _say(self, doing: str) -> None:
        """Say and show what runs that is no trial."""
        self.progress.note(doing)
        self._see(doing)

    def describe_entry(self, entry: LedgerEntry) -> str:
        """What came of a trial, in a line."""
        outcome = entry.outcome
        if outcome.error is not None:
            return f"failed: {outcome.error}"
        verdict = ""
        if entry.rung == self.engine.full_rung:
            verdict = "keeps every limit" if self.goal.meets_limits(outcome) else "misses a limit"
            verdict += ", the best so far" if self.engine.observations.best() == entry.point else ""
        return "; ".join(
            [*format_outcome(self.goal, outcome), *filter(None, [verdict]), format_seconds(outcome.seconds)]
        )

    def _rung(self, job: PlannedTrial) -> str:
        share = self.engine.shares[job.rung]
        return "" if share == 1 else f", {share:.0%} of its training"

    def _out_of_time(self, job: PlannedTrial, under_way: Sequence[float]) -> str | None:
        """Why a trial isn't begun; beside it trials of so many seconds are ``under_way``."""
        if self.search.trials is not None and len(self.entries) + len(under_way) >= self.search.trials:
            return f"as many trials as were asked for ({self.search.trials})"
        if not self.entries:
            return None
        left = self._left() - sum(under_way) / self.trials.workers.width
        if self.costs.corrected_remaining_seconds(job.point, self.engine.shares[job.rung]) > left:
            if len(self.entries) == 1 and self.spent > self.search.seconds:
                return (
                    f"the budget of {self.search.budget} is shorter than one trial, which took "
                    f"{format_seconds(self.spent)}; --resume with more time goes on from there"
                )
            return f"the budget of {self.search.budget} is spent but for the session at the end"
        return None

    def _left(self) -> float:
        """Seconds for further trials."""
        return self.search.seconds - self.spent - self.ending.reserved_seconds()

    def _record(self, final: FinalResult | None) -> SearchRecord:
        return build_record(self.space, self.engine, self.costs, self.entries, final, self.started)

    def _place(self) -> tuple[Path, list[LedgerEntry]]:
        """The folder of the search, and the trials that are known already."""
        if self.resume:
            return resume_folder(self.space, self.engine, self.artifacts)
        return create_folder(self.space, self.engine, self.artifacts, self.started), []
