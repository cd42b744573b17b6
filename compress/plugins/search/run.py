"""Run of a search: rounds of trials with a ledger, then the final evaluation."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from compress.plugins.ray.jobs import Job, JobContext
from compress.plugins.search.console import ProgressDisplay, RunningTrial, SearchSnapshot
from compress.plugins.search.costs import CostEstimator
from compress.plugins.search.dry_run import PreparedSearch
from compress.plugins.search.engine import Engine, PlannedTrial
from compress.plugins.search.final_evaluation import FinalEvaluation, FinalResult, Refit
from compress.plugins.search.observations import Ledger, LedgerEntry
from compress.plugins.search.outcome import TrialOutcome, target_profile
from compress.plugins.search.record import SearchRecord, build_record, format_outcome
from compress.plugins.search.search_folder import BEST, MODEL, create_folder, resume_folder, write_results
from compress.plugins.search.size_estimator import SizeEstimator
from compress.plugins.search.trial import BarsOnly, TrialRunner
from compress.recipe.document import Document
from compress.report.run_folder import update_latest_link
from compress.results.formatting import format_seconds
from compress.utils.errors import InputError, StageError, StorageError
from compress.utils.progress import Progress
from compress.utils.storage import storage_errors


@dataclass(frozen=True)
class SearchResult:
    """Search that has ended. ``record.final`` is None if no recipe's measured values meet every limit."""

    folder: Path
    record: SearchRecord


@dataclass
class SearchRun:
    """Search of the recipe in ``document``, whose paths are relative to ``folder``.

    Nothing is written before the recipe is checked.
    """

    document: Document
    folder: Path
    artifacts: Path
    progress: Progress
    resume: bool = False
    workers: str | None = None
    """`ray`, `ray:ADDRESS`, or None for this process."""
    watcher: ProgressDisplay = field(default_factory=ProgressDisplay)
    origin: str = "the recipe as it stands"

    def __post_init__(self) -> None:
        context = JobContext(self.folder, self.artifacts, BarsOnly(self.progress))
        # Check everything before the first file is written.
        self.prepared = PreparedSearch(self.document, self.folder, self.artifacts, context)
        self.space, self.goal = self.prepared.space, self.prepared.goal
        self.search, base = self.space.search, self.space.base
        shares = (*self.search.rungs, 1.0) if self.space.trains(self.space.origin) else (1.0,)
        self.trials = TrialRunner.in_process(self.goal, context)
        self.size_estimator = SizeEstimator(self.space, lambda: context.runner(base))
        # The precise estimator takes over once the first trial has produced the baseline.
        self.costs = CostEstimator(self.space, self.size_estimator)
        refit = Refit(self.space, self.trials, self.size_estimator)
        self.engine = Engine(self.space, self.costs, self.goal, shares, base.seed, refit.fits_limits)
        self.final_evaluation = FinalEvaluation(self.space, self.costs, self.engine, self.trials, refit)
        self.entries: list[LedgerEntry] = []
        self._running_trials: dict[int, RunningTrial] = {}
        self._earlier_seconds, self._start_time, self._is_over = 0.0, time.perf_counter(), False
        self.started = datetime.now(UTC).astimezone()

    @property
    def spent(self) -> float:
        """Seconds of the search so far, earlier processes included."""
        return self._earlier_seconds + time.perf_counter() - self._start_time

    def run(self) -> SearchResult:
        """Search until the budget is spent or nothing is left to try, then evaluate. Raises any `CompressError`.

        A search that is interrupted leaves its ledger and the present `best.yaml`.
        """
        if self.workers is not None:
            from compress.plugins.ray.ray_workers import open_workers

            base = self.space.base
            if base.module is not None:
                raise InputError(
                    "A model that code beside the recipe builds cannot be sent to other machines.",
                    where="module",
                    hint="search without --workers",
                )
            packages = sorted({name for stage in base.stages for name in stage.called_packages()})
            target, context = target_profile(base).name, self.trials.context
            self.trials.workers = open_workers(self.workers, context, target, packages, self.progress)
        try:
            return self._run()
        finally:
            self.trials.workers.close()

    def _run(self) -> SearchResult:
        if self.resume:
            folder, entries = resume_folder(self.space, self.engine, self.artifacts)
        else:
            folder, entries = create_folder(self.space, self.engine, self.artifacts, self.started), []
        self.results_folder, ledger = folder, Ledger(folder)
        self.size_estimator.use_snapshot(folder)
        for line in self.prepared.summary(self.origin).lines():
            self.progress.note(line)
        try:
            self._search(ledger, entries)
            self.progress.note(f"{len(self.entries)} trials: {self.engine.end_reason}")
            # The test rows are read here for the first time.
            final = self.final_evaluation.run(self.progress.note, self._announce, self.search.seconds - self.spent)
        except (KeyboardInterrupt, StorageError) as error:
            self.watcher.stop()
            best = self.engine.observations.best()
            result = f"the best so far is in {folder / BEST}" if best is not None else "no recipe meets every limit yet"
            ended = f"{'interrupted' if isinstance(error, KeyboardInterrupt) else 'stopped'} after {len(self.entries)}"
            self.progress.note(f"{ended} trials: {result}; the same command with --resume continues")
            raise
        record = self._record(final)
        write_results(folder, self.space, self.engine, record)
        if final is not None:
            with storage_errors(folder):
                shutil.rmtree(folder / MODEL, ignore_errors=True)
                shutil.copytree(final.winner.folder, folder / MODEL)
        update_latest_link(folder)
        return SearchResult(folder, record)

    def _search(self, ledger: Ledger, earlier_entries: list[LedgerEntry]) -> None:
        """Run rounds until nothing is left to try or the time is spent."""
        if earlier_entries:
            total = sum(entry.outcome.seconds for entry in earlier_entries)
            self._earlier_seconds = earlier_entries[-1].elapsed or total
        self._start_time, self._is_over = time.perf_counter(), False
        # Workers may start on baselines of the final evaluation unless that would disturb timings.
        if not self.goal.needs_timing:
            self.trials.workers.prefetch(self.final_evaluation.prefetch_jobs())
        is_share_noted = False
        while not self._is_over:
            # Before the second trial, sizes of all recipes are predicted, which takes a while.
            if len(self.entries) == 1 and self.costs.size_estimator is not None and self.costs.size_estimator.is_ready:
                self._announce("predicting the sizes of the other recipes")
            if not (planned_trials := self.engine.next_round()):
                break
            if not is_share_noted and self.engine.candidates.remaining_share is not None:
                is_share_noted, count = True, round(self.engine.candidates.remaining_share * self.space.size)
                self.progress.note(f"predictions leave {count:,} of {self.space.size:,} recipes")
            replayed, new_trials = planned_trials[: len(earlier_entries)], planned_trials[len(earlier_entries) :]
            # The engine plans the trials of an earlier process once more, and their outcomes come from the ledger.
            for planned in replayed:
                entry = earlier_entries.pop(0)
                if (entry.point, entry.rung) != (planned.point, planned.rung):
                    raise InputError(
                        f"The search cannot be resumed: trial {entry.number} of its ledger is another one now.",
                        where=str(ledger.path),
                        expected="the same version of compress and optuna as before",
                        hint="start again without --resume; finished stages are cached",
                    )
                self.engine.record(planned, entry.outcome)
                self.entries.append(entry)
            # Speculative work would disturb the timing of models.
            guess = None if self.goal.needs_timing else partial(self._speculate, new_trials, len(self.entries))
            outcomes = self.trials.run_all(self._affordable_trials(new_trials), guess)
            for outcome, planned in zip(outcomes, new_trials, strict=False):
                self._record_outcome(ledger, planned, outcome)

    def _affordable_trials(self, planned_trials: Sequence[PlannedTrial]) -> Iterator[Job]:
        """Yield the trials of a round while there is time for them; workers may take all before one has ended."""
        first = len(self.entries)
        seconds = [self._expected_seconds(planned) for planned in planned_trials]
        for index, planned in enumerate(planned_trials):
            # Trials between the last recorded one and this one are running.
            running = seconds[len(self.entries) - first : index]
            if why := self._out_of_time(planned, running):
                self.engine.end_reason, self._is_over = why, True
                return
            # Note and show that a trial begins.
            number = first + index
            words, share = self.space.describe(planned.point), self.engine.shares[planned.rung]
            part = "" if share == 1 else f", {share:.0%} of its training"
            self.progress.note(f"trial {number}: {words}{part} ({planned.why})")
            running_trial = RunningTrial(number, words, share, planned.why, planned.expected, time.monotonic())
            self._running_trials[number] = running_trial
            self._update_display()
            yield self._trial(planned, timed=planned.rung == self.engine.full_rung)

    def _speculate(
        self, planned_trials: Sequence[PlannedTrial], first: int, outcomes: Mapping[int, TrialOutcome]
    ) -> list[Job]:
        """Return the trials that may be tried after this round, given its outcomes so far.

        Args:
            planned_trials: Trials of the round.
            first: Number of the first one.
            outcomes: Outcomes by position in the round.
        """
        # Some trials of the round may have arrived already.
        pending = range(len(self.entries) - first, len(planned_trials))
        max_trials = self.search.trials
        if self._is_over or (max_trials is not None and len(self.entries) + len(pending) >= max_trials):
            return []
        arrived = {planned_trials[index]: outcomes[index] for index in pending if index in outcomes}
        running = [planned_trials[index] for index in pending if index not in outcomes]
        trials = [self._trial(planned, timed=False) for planned in self.engine.speculate(arrived, running)]
        return [trial for trial in trials if trial.seconds <= self._remaining_seconds()]

    def _expected_seconds(self, planned: PlannedTrial) -> float:
        return self.costs.corrected_remaining_seconds(planned.point, self.engine.shares[planned.rung])

    def _trial(self, planned: PlannedTrial, timed: bool) -> Job:
        recipe = self.space.recipe(planned.point, self.engine.shares[planned.rung])
        return self.trials.job(recipe, timed, self._expected_seconds(planned))

    def _record_outcome(self, ledger: Ledger, planned: PlannedTrial, outcome: TrialOutcome) -> None:
        """Write an outcome to the ledger, record it and show it."""
        if outcome.error is not None and planned.point == self.space.origin:
            raise StageError(
                f"The recipe itself fails, so there is nothing to search from: {outcome.error}",
                hint="see `compress run` of the recipe",
            )
        entry = LedgerEntry(
            number=len(self.entries),
            point=planned.point,
            rung=planned.rung,
            words=self.space.describe(planned.point),
            identity=self.space.identity(planned.point),
            why=planned.why,
            outcome=outcome,
            elapsed=self.spent,
        )
        # Write the ledger before any decision depends on the outcome, so that a killed search resumes exactly here.
        ledger.append(entry)
        self.engine.record(planned, outcome)
        self.entries.append(entry)
        self._running_trials.pop(entry.number, None)
        self.progress.note(f"trial {entry.number}: {self.describe_entry(entry)}")
        write_results(self.results_folder, self.space, self.engine, self._record(None))
        self._update_display()

    def _update_display(self, doing: str = "") -> None:
        """Show the present state of the search."""
        trying = () if doing else tuple(self._running_trials.values())
        left = self._remaining_seconds()
        self.watcher.show(SearchSnapshot(self._record(None), trying, left, time.monotonic(), doing))

    def _announce(self, doing: str) -> None:
        """Note and show work that is not a trial."""
        self.progress.note(doing)
        self._update_display(doing)

    def describe_entry(self, entry: LedgerEntry) -> str:
        """Describe the outcome of a trial in a line."""
        outcome = entry.outcome
        if outcome.error is not None:
            return f"failed: {outcome.error}"
        verdict = ""
        if entry.rung == self.engine.full_rung:
            verdict = "meets every limit" if self.goal.meets_limits(outcome) else "misses a limit"
            verdict += ", the best so far" if self.engine.observations.best() == entry.point else ""
        parts = [*format_outcome(self.goal, outcome), verdict, format_seconds(outcome.seconds)]
        return "; ".join(filter(None, parts))

    def _out_of_time(self, planned: PlannedTrial, running: Sequence[float]) -> str | None:
        """Return why a trial is not started, None if it may start. Other trials are ``running`` for so many seconds."""
        if self.search.trials is not None and len(self.entries) + len(running) >= self.search.trials:
            return f"the maximum of {self.search.trials} trials is reached"
        # The first trial runs in any case, since nothing can be shipped without it.
        if not self.entries:
            return None
        left = self._remaining_seconds() - sum(running) / self.trials.workers.width
        if self._expected_seconds(planned) <= left:
            return None
        if len(self.entries) == 1 and self.spent > self.search.seconds:
            return (
                f"the budget of {self.search.budget} is shorter than one trial, which took "
                f"{format_seconds(self.spent)}; --resume with more time continues from there"
            )
        return f"the budget of {self.search.budget} is spent, except for the final evaluation"

    def _remaining_seconds(self) -> float:
        """Return the seconds left for further trials."""
        return self.search.seconds - self.spent - self.final_evaluation.reserved_seconds()

    def _record(self, final: FinalResult | None) -> SearchRecord:
        return build_record(self.space, self.engine, self.costs, self.entries, final, self.started)
