"""Count the answers of runs that differ between processor classes.

    python benchmarks/processors.py artifacts/runs/quickstart/latest artifacts/runs/names/latest --write

Every class runs the shipped file on the same rows of the test split, in the batches of the evaluation:

- `2 threads`: this processor with two threads. All others have one, as has the reference.
- `AVX2`: an emulated Haswell, whose kernels have no VNNI and whose 8-bit products may saturate; with fewer rows.
- `ARM`: an emulated 64-bit ARM processor (`arm64.py`), with fewer rows.
- `WebAssembly`: ONNX Runtime's module for browsers, in Node.

An answer is the class of a row or token, or the nearest other row of an embedding. Outputs without such an answer, as
losses of tokens, have only the difference of the outputs: the largest one, relative to their root mean square. A class
that is not available is skipped with the reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from arm64 import EmulatedArm, find_emulated_arm

from compress.utils.errors import CompressError

REFERENCE = "1 thread"
TARGETS = {REFERENCE: "cpu", "2 threads": "cpu", "AVX2": "cpu", "ARM": "cpu", "WebAssembly": "node"}
ANSWERS, VECTORS = "answers", "vectors"
EMULATED = ("AVX2", "ARM")
_SECONDS = 3600
_RESULTS = Path(__file__).parent / "results" / "processors.json"
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Agreement:
    """Agreement of a class with the reference. ``differing`` is None for outputs without answers."""

    run: str
    processor: str
    rows: int = 0
    answers: int = 0
    differing: int | None = None
    difference: float = 0.0
    skipped: str | None = None


def main(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    rows: Annotated[int, typer.Option(help="Rows of the test split.")] = 2000,
    emulated_rows: Annotated[int, typer.Option(help="Rows on emulated processors.")] = 200,
    only: Annotated[list[str] | None, typer.Option(help="Classes. Default: all.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Write the results to results/.")] = False,
) -> None:
    """Print a table of the answers that differ."""
    results = list[Agreement]()
    with tempfile.TemporaryDirectory(prefix="compress-processors-") as folder:
        for run in runs:
            for processor in only or list(TARGETS)[1:]:
                # Batches are equal, because a scale of activations may cover a batch.
                count = min(rows, emulated_rows) if processor in EMULATED else rows
                results.append(compared(run, processor, count, Path(folder)))
                typer.echo(_line(results[-1]))
    if write:
        _RESULTS.write_text(json.dumps(page(results), indent=1, ensure_ascii=False) + "\n")


def page(results: Sequence[Agreement]) -> dict[str, Any]:
    """Return the content of the page of results: a row for each run, a column for each class."""
    processors = list(TARGETS)[1:]
    cells = {(result.run, result.processor): result for result in results}
    return {
        "title": "Answers on other processors",
        "order": 12,
        "command": "python benchmarks/processors.py RUNS --write",
        "machine": "an x86-64 processor with VNNI",
        "measured": date.today().isoformat(),
        "text": "Answers of the shipped file that differ from those of one thread, and in brackets the largest "
        "difference of an output relative to their root mean square. AVX2 and ARM are emulated, with fewer rows.",
        "page": "results/processors.md",
        "tables": [
            {
                "columns": ["recipe", *processors],
                "rows": [
                    [run, *(_cell(cells.get((run, processor))) for processor in processors)]
                    for run in dict.fromkeys(result.run for result in results)
                ],
                "conclusion": "Two threads return the same bytes as one. Other processors sum floats in another order, "
                "and a last bit can move a value to the next integer of the following layer.",
            }
        ],
    }


def _cell(result: Agreement | None) -> str:
    if result is None:
        return "-"
    if result.skipped is not None:
        return f"skipped: {result.skipped.rstrip('.')}"
    if result.differing is None:
        return f"no answers ({result.difference:.0e})"
    return f"{result.differing} of {result.answers:,} ({result.difference:.0e})"


def compared(run: Path, processor: str, rows: int, folder: Path) -> Agreement:
    """Run a class and the reference on the same rows, and compare them."""
    name = run.parent.name if run.name == "latest" else run.name
    reference = predictions(run, REFERENCE, rows, folder)
    other = reference if isinstance(reference, str) else predictions(run, processor, rows, folder)
    if isinstance(reference, str) or isinstance(other, str):
        return Agreement(name, processor, skipped=str(other))
    return agreement(name, processor, reference, other)


def _line(result: Agreement) -> str:
    start = f"{result.run:<20} {result.processor:<12}"
    if result.skipped is not None:
        return f"{start} skipped: {result.skipped}"
    differing = "no answers" if result.differing is None else f"{result.differing} of {result.answers} answers differ"
    return f"{start} {result.rows:>5} rows  {differing:<32} outputs differ by up to {result.difference:.1e}"


def predictions(run: Path, processor: str, rows: int, folder: Path) -> dict[str, np.ndarray] | str:
    """Return the outputs that a process of a class kept, or the reason why there are none."""
    file = folder / f"{hashlib.sha256(f'{run}/{processor}/{rows}'.encode()).hexdigest()}.npz"
    command = [sys.executable, "-c", "import processors; processors.work()", run, processor, rows, file]
    path = os.pathsep.join(filter(None, [str(_HERE), str(_HERE.parent), os.environ.get("PYTHONPATH", "")]))
    process = None if file.exists() else subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=_SECONDS, check=False,
    )  # fmt: skip
    if process is not None and process.returncode:
        return (process.stderr.strip().splitlines() or ["no error message"])[-1]
    with np.load(file) as arrays:
        return {name: arrays[name] for name in arrays.files}


def work() -> None:
    """Write the outputs of a class, in a process of its own. Arguments: run, class, rows, file."""
    run, processor, rows, file = sys.argv[1:]
    try:
        np.savez(file, **outputs(Path(run), processor, int(rows)))  # type: ignore[arg-type]
    except CompressError as error:
        raise SystemExit(error.what) from None


def outputs(run: Path, processor: str, rows: int) -> dict[str, np.ndarray]:
    """Return what the task keeps of each output, and the answers, if there are any."""
    from compress.evaluation.evaluate import encode_for_model, predict
    from compress.formats.quiet_output import quiet_libraries
    from compress.formats.targets import find_target
    from compress.pipeline.artifact import check_opens, find_artifact
    from compress.utils.progress import SilentProgress

    artifact = find_artifact(run, None)
    target = find_target(TARGETS[processor])
    check_opens(artifact.folder, target)
    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="compress-processors-") as scratch:
        runner = artifact.runner(Path(scratch), SilentProgress())
        recipe, task, data = runner.recipe, runner.inputs.task, runner.inputs.data
        table = data.split("test")
        examples = encode_for_model(
            artifact.folder, task, table.slice(0, rows), recipe.data.max_length, recipe.evaluation
        )
        if processor in EMULATED:
            kept = emulated(processor, artifact.folder, task, examples)
        else:
            threads = 2 if processor == "2 threads" else 1
            kept = dict(predict(artifact.folder, task, examples, target, threads, SilentProgress(), "").kept)
    if recipe.task.endswith("feature-extraction") and len(kept) == 1:
        return {VECTORS: next(iter(kept.values()))}
    return kept | ({} if (answered := answers(task, kept)) is None else {ANSWERS: answered})


def emulated(processor: str, folder: Path, task: Any, examples: Any) -> dict[str, np.ndarray]:
    """Return the outputs of a graph that an emulated processor runs, in the same batches."""
    import onnx

    from compress.formats.generation.decoder import feeder
    from compress.formats.onnx.model import find_graphs
    from compress.formats.runtime import get_runtime
    from compress.formats.targets import find_target
    from compress.tasks.tokens import by_length, keep_all

    emulator = find_haswell() if processor == "AVX2" else find_emulated_arm()
    if isinstance(emulator, str):
        raise SystemExit(emulator)
    graphs = find_graphs(folder)
    if len(graphs) != 1:
        raise SystemExit("a model of several graphs")
    feed = feeder(get_runtime("onnxruntime").open(folder, find_target("cpu"), 1), str(folder))
    batches = by_length(examples, 1 if examples.full_call else task.batch_size)
    feeds = [feed(examples.batch(indices)) for indices in batches]
    answered = iter(emulator.run(onnx.load(graphs[0]), feeds, optimize=True))
    return dict(keep_all(task, examples, batches, lambda indices: next(answered)))


@dataclass(frozen=True)
class EmulatedHaswell(EmulatedArm):
    """The Python of this process on an emulated x86 processor without AVX-512 and VNNI."""

    def python(self) -> tuple[list[str], dict[str, str]]:
        """Return the command of the emulated Python, and its environment."""
        return [self.emulator, "-cpu", self.processor, sys.executable, "-P"], {"OMP_NUM_THREADS": "1"}


def find_haswell() -> EmulatedHaswell | str:
    """Return the emulator, or the reason why there is none."""
    emulator = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
    if emulator is None:
        return "qemu-x86_64 is not on PATH (Debian: apt-get install qemu-user)"
    return EmulatedHaswell(emulator, Path(), "Haswell")


def answers(task: Any, kept: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Return the class of each row or token, the text of a row, or the integers that the task keeps last, or None."""
    probabilities = task.probabilities(kept)
    if probabilities is not None:
        return np.asarray(probabilities.argmax(axis=-1))
    # Labels of words and answers are texts. References, which are texts too, are equal on all processors.
    texts = [values for values in kept.values() if values.dtype.kind == "U"]
    if texts:
        return texts[0]
    integers = [values.reshape(len(values), -1) for name, values in kept.items() if values.dtype.kind in "iub"]
    return integers[-1] if integers else None


def nearest_rows(vectors: np.ndarray) -> np.ndarray:
    """Return the nearest other row of each, by the cosine of their angle."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    return np.asarray(similarity.argmax(axis=1))


def agreement(
    run: str, processor: str, reference: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]
) -> Agreement:
    """Compare the outputs of a class with those of the reference."""
    rows = min(len(values) for values in other.values())
    pairs = {name: (reference[name], values) for name, values in other.items()}
    floats = [pair for name, pair in pairs.items() if name != ANSWERS and pair[0].dtype.kind == "f"]
    difference = max((_largest_difference(*pair) for pair in floats), default=0.0)
    if VECTORS in pairs:
        pairs[ANSWERS] = (nearest_rows(pairs[VECTORS][0]), nearest_rows(pairs[VECTORS][1]))
    if ANSWERS not in pairs:
        return Agreement(run, processor, rows, difference=difference)
    ours, theirs = pairs[ANSWERS]
    # A task fills rows of few tokens with -1.
    given = ours.size - int((ours == -1).sum() if ours.dtype.kind == "i" else 0)
    return Agreement(run, processor, rows, given, int((ours != theirs).sum()), difference)


def _largest_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    finite = np.isfinite(ours) & np.isfinite(theirs)
    scale = np.sqrt(np.square(ours[finite], dtype=np.float64).mean())
    return float(np.abs(ours[finite] - theirs[finite]).max() / scale) if scale else 0.0


if __name__ == "__main__":
    typer.run(main)
