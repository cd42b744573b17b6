"""Read mutated files of every kind that may come from strangers, and record what ends in no error about the file.

    python benchmarks/fuzz.py --minutes 60 [--kind gguf] [--seed 7] [--jobs 2]
    python benchmarks/fuzz.py --mutations 500           # of each kind, as in CI
    python benchmarks/fuzz.py --kind gguf --seed 7 --index 1234     # one mutation again, with its traceback
    python benchmarks/fuzz.py --kind gguf --input artifacts/fuzz/gguf-7-1234    # a folder that a run has kept

A mutation follows from kind, seed and index alone. A reader fails if it raises anything but a `CompressError`, takes
more than 20 s or 2 GB, or accepts what the packages gguf, onnx and safetensors read otherwise. The kinds are the rows
of `benchmarks/fuzzing/targets.py`. Exit code 1: something failed.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import mmap
import os
import pickle
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

sys.path.insert(0, str(Path(__file__).parent))
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")

from fuzzing.targets import TARGETS, Target
from fuzzing.worker import (
    LIMIT_SECONDS,
    Sandbox,
    State,
    load_seeds,
    mutated,
    read_case,
    read_state,
    report_failure,
    scratch_root,
    silence,
    work,
)

Seeds = Sequence[Mapping[str, bytes]]


@dataclass
class Run:
    """Worker of one kind and what it has done; a worker that died is started again behind the case that killed it."""

    target: Target
    seeds: Seeds
    seconds: float
    mutations: int | None
    shared: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, 4096))
    begun: float = 0.0
    ended: float = 0.0
    pid: int = 0

    @property
    def state(self) -> State:
        """Return its counts."""
        return read_state(self.shared)

    def start(self, seed: int, first: int, failures: Path) -> None:
        """Start a worker at an index."""
        self.begun = self.begun or time.time()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        code = 3
        try:
            silence()
            work(self.target, self.seeds, seed, self._indices(first), self.shared, failures)
            code = 0
        except BaseException as error:  # noqa: BLE001, the parent reports it
            (failures / f"{self.target.kind}.error").write_text(f"{type(error).__name__}: {error}")
        finally:
            os._exit(code)

    def _indices(self, first: int) -> Iterator[int]:
        deadline = self.begun + self.seconds
        for index in itertools.count(first):
            if self.mutations is not None and index >= self.mutations:
                return
            if self.mutations is None and time.time() > deadline:
                return
            yield index

    def poll(self, seed: int, failures: Path) -> bool:
        """Return whether the worker has ended; start another one if it was killed by its input."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        started = self.state.started
        if not pid and started and time.time() - started > LIMIT_SECONDS + 10:
            # A hang in a library, which no signal handler of Python interrupts.
            os.kill(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            pid, reason = self.pid, f"hang in a library, more than {LIMIT_SECONDS} s"
        elif pid:
            reason = f"killed by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else ""
        if not pid:
            return False
        self.ended = time.time()
        if not os.WIFSIGNALED(status):
            if os.waitstatus_to_exitcode(status):
                raise SystemExit(f"{self.target.kind}: {(failures / f'{self.target.kind}.error').read_text()}")
            return True
        index = self.state.index
        report_failure(failures, self.target, seed, index, reason, None, self._case(seed, index, failures))
        # The counts of the dead worker go on.
        state = self.state
        state.started = 0.0
        state.failures += 1
        self.shared[: 8 * len(vars(state))] = _packed(state)
        self.start(seed, index + 1, failures)
        return False

    def _case(self, seed: int, index: int, failures: Path) -> Sandbox:
        """Write the folder of a case anew."""
        number, name, content, _ = mutated(self.target, self.seeds, seed, index)
        sandbox = Sandbox(failures / "last", self.seeds[number], scan=False)
        sandbox.put(self.target, name, content)
        return sandbox

    def row(self) -> dict[str, Any]:
        """Return the numbers of the table."""
        state, seconds = self.state, max(self.ended - self.begun, 1e-9)
        done = state.accepted + state.rejected + state.failures
        return {
            "kind": self.target.kind, "mutations": done, "accepted": state.accepted, "rejected": state.rejected,
            "failures": state.failures, "per_second": round(done / seconds, 1), "seconds": round(seconds, 1),
            "peak_mb": round(state.peak_bytes / 1e6, 1), "longest_seconds": round(state.longest, 2),
            "fallbacks": state.fallbacks, "longest_index": state.longest_index,
        }  # fmt: skip


def build_seeds(targets: Sequence[Target], folder: Path) -> list[Seeds]:
    """Return the seeds of each kind. A process of its own builds them: its threads would be missing in the workers."""
    # What all workers import.
    for name in ("torch", "transformers", "onnx", "pyarrow.parquet", "gguf", "safetensors.torch", "peft", "PIL.Image"):
        importlib.import_module(name)
    file = folder / "seeds.pickle"
    pid = os.fork()
    if not pid:
        code = 1
        try:
            file.write_bytes(pickle.dumps([load_seeds(target) for target in targets]))
            code = 0
        except BaseException:  # noqa: BLE001, the parent ends too
            traceback.print_exc()
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("The seeds could not be built.")
    seeds: list[Seeds] = pickle.loads(file.read_bytes())
    file.unlink()
    return seeds


def _packed(state: State) -> bytes:
    from fuzzing.worker import _STATE

    return _STATE.pack(*vars(state).values())


def run_all(runs: list[Run], seed: int, jobs: int, failures: Path) -> None:
    """Run the workers, ``jobs`` at a time, and print a row for each that ends."""
    waiting, active = runs[:], list[Run]()
    typer.echo(_line("kind", "mutations", "accepted", "rejected", "failures", "per s", "peak MB", "longest s"))
    while waiting or active:
        while waiting and len(active) < jobs:
            active.append(waiting.pop(0))
            active[-1].start(seed, 0, failures)
        for run in [run for run in active if run.poll(seed, failures)]:
            active.remove(run)
            row = run.row()
            keys = ("kind", "mutations", "accepted", "rejected", "failures", "per_second", "peak_mb", "longest_seconds")
            typer.echo(_line(*(row[key] for key in keys)))
        time.sleep(0.02)


def _line(*cells: object) -> str:
    return f"{cells[0]:<20}" + "".join(f"{cell:>11}" for cell in cells[1:])


def show_case(target: Target, seeds: Seeds, seed: int, index: int | None, folder: Path | None) -> None:
    """Read one mutation, or a folder, and print what happens."""
    import tempfile

    with tempfile.TemporaryDirectory(dir=scratch_root()) as name:
        if folder is not None:
            files = {
                path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
            }
            sandbox = Sandbox(Path(name), files, scan=False)
        else:
            assert index is not None, "one of the two is given"
            number, file, content, _ = mutated(target, seeds, seed, index)
            sandbox = Sandbox(Path(name), seeds[number], scan=False)
            sandbox.put(target, file, content)
            typer.echo(f"{file}: {content[:500]!r}{'...' if len(content) > 500 else ''}")
        typer.echo("accepted" if read_case(target, sandbox.folder) else "rejected")


def parsed() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="time of all kinds together")
    parser.add_argument("--mutations", type=int, help="number of mutations of each kind, in place of a time")
    parser.add_argument("--kind", action="append", choices=[target.kind for target in TARGETS], help="repeatable")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--index", type=int, help="read one mutation of a kind, and print its traceback")
    parser.add_argument("--input", type=Path, help="read a folder of a kind, and print its traceback")
    parser.add_argument("--output", type=Path, default=Path("artifacts/fuzz"), help="folder of the results")
    return parser.parse_args()


def main() -> None:
    """Run the kinds, print the table and write the results."""
    options = parsed()
    targets = [target for target in TARGETS if not options.kind or target.kind in options.kind]
    if options.index is not None or options.input is not None:
        (target,) = targets
        show_case(target, load_seeds(target), options.seed, options.index, options.input)
        return
    failures: Path = options.output
    failures.mkdir(parents=True, exist_ok=True)
    (failures / "failures.jsonl").unlink(missing_ok=True)
    seconds = options.minutes * 60 / len(targets) * min(options.jobs, len(targets))
    seeds = build_seeds(targets, failures)
    runs = [Run(target, files, seconds, options.mutations) for target, files in zip(targets, seeds, strict=True)]
    run_all(runs, options.seed, options.jobs, failures)
    rows = [run.row() for run in runs]
    total = {key: sum(row[key] for row in rows) for key in ("mutations", "accepted", "rejected", "failures")}
    typer.echo(_line("total", *total.values()))
    (failures / "results.json").write_text(json.dumps({"seed": options.seed, "total": total, "kinds": rows}, indent=1))
    log = failures / "failures.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for (kind, name), count in Counter((record["kind"], record["signature"]) for record in records).items():
        first = next(record for record in records if (record["kind"], record["signature"]) == (kind, name))
        command = f"python benchmarks/fuzz.py --kind {kind} --seed {options.seed} --index {first['index']}"
        typer.echo(f"{kind}: {count} x {name}\n    {command}")
    raise SystemExit(1 if total["failures"] else 0)


if __name__ == "__main__":
    main()
