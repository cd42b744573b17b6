"""Olive's joint search and ours for the same thing: INT8 after training that keeps the accuracy and is fastest.

The command `olive` of `benchmarks/search.py`. Both begin with the same float ONNX file, calibrate with the same rows
and choose by the same others; one session on the test rows judges what each of them found.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from search_page import Write, by_model, show

if TYPE_CHECKING:
    from compress.pipeline.runner import StageRunner

HERE = Path(__file__).parent
RECIPE = HERE / "searching" / "post-training.yaml"
PINNED = ("olive-ai==0.13.0", "requests>=2", "pydantic<2.13")  # which its own metadata leave open
HALF_WIDTHS_PER_DEVIATION = ("onnxruntime", "torch", "transformers", "onnx")
_CALIBRATION = 256
OLIVE, OURS = "Olive's", "ours"


def olive(
    artifacts: Annotated[Path, typer.Option(help="Where stages are cached.")] = Path("artifacts"),
    trials: Annotated[int, typer.Option(help="Models that Olive makes at most.")] = 24,
    share: Annotated[float, typer.Option(help="Of Olive's seconds, how much ours has for everything.")] = 1 / 3,
    write: Write = False,
) -> None:
    """Seconds of both searches, ours with a part of Olive's, and what they found on rows that neither saw."""
    from compress.cli.output import ConsoleProgress
    from compress.formats.quiet_output import quiet_libraries
    from compress.plugins.ray.jobs import JobContext
    from compress.plugins.search.record import SearchRecord
    from compress.plugins.search.space import SearchSpace
    from compress.recipe.document import read_document

    quiet_libraries()
    space = SearchSpace(read_document(RECIPE), RECIPE.parent)
    base = space.base.model_copy(update={"stages": space.base.stages[:-1], "baseline": "onnx"})
    runner = JobContext(RECIPE.parent, artifacts, ConsoleProgress()).runner(base)
    runner.run_all()
    folder = artifacts / "olive"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    theirs = _olive(runner, space.search.select.split, base.limits[0].bound, trials, folder)
    began = time.perf_counter()
    found = _ours(runner, share * theirs["seconds"], folder / "ours")
    took = time.perf_counter() - began
    record = SearchRecord.model_validate_json((found / "search.json").read_text())
    table = [
        ["seconds, without the training before", f"{theirs['seconds']:.0f}", f"{took:.0f}"],
        ["of these for trials", "", f"{record.seconds:.0f}"],
        ["models made", str(theirs["models"]), str(len(record.trials))],
        *_judged(runner, found / "model", Path(theirs["best"])),
        ["what it found", theirs["words"], record.best or ""],
    ]
    note = (
        f"`python benchmarks/search.py olive --write`; {PINNED[0]}, onnxruntime {version('onnxruntime')}. Olive's "
        f"seconds are without its start; ours are the whole command's, which had {share:.0%} of them: its start, its "
        "trials, and the session on the test rows at its end."
    )
    show("Olive's joint search", ("quantity", OLIVE, OURS), table, write, notes=[note])


_START_SECONDS = 8.0
"""From the command to the first trial, about."""


def _ours(runner: StageRunner, seconds: float, artifacts: Path) -> Path:
    """The folder of a search in as many seconds; of earlier work it has the trained and exported model alone."""
    for label in runner.recipe.labels():
        source = runner.results[label].entry.folder
        shutil.copytree(source.parent, artifacts / "cache" / source.parent.name)
    command = ["compress", "search", str(RECIPE), "--artifacts", str(artifacts)]
    subprocess.run([*command, "--budget", f"{seconds - _START_SECONDS:.0f}s"], check=True)
    return (artifacts / "searches" / RECIPE.stem / "latest").resolve()


def _olive(runner: StageRunner, split: str, keep: float, trials: int, folder: Path) -> dict[str, Any]:
    """What Olive answers, in an environment of its own."""
    from peers.environment import Packages, peer_python

    python = peer_python(
        "olive",
        (Packages((*PINNED, *(f"{name}=={version(name).split('+')[0]}" for name in HALF_WIDTHS_PER_DEVIATION))),),
        typer.echo,
    )
    examples = {name: _arrays(runner, name) for name in ("train", split)}
    few = np.random.default_rng(runner.recipe.seed).permutation(len(examples["train"]["labels"]))[:_CALIBRATION]
    unlabeled = {name: array[few] for name, array in examples["train"].items() if name != "labels"}
    for name, arrays in (("rows", examples[split]), ("calibration", unlabeled)):
        np.savez(folder / name, allow_pickle=False, **arrays)
    order = {
        "model": str(next(runner.folder_of("onnx").rglob("*.onnx"))),
        "rows": str(folder / "rows.npz"),
        "calibration": str(folder / "calibration.npz"),
        "keep": keep,
        "trials": trials,
        "output": str(folder / "found"),
    }
    (folder / "order.json").write_text(json.dumps(order))
    command = [str(python), str(HERE / "peers" / "olive_search.py"), str(folder / "order.json")]
    with (folder / "olive.log").open("w") as log:
        done = subprocess.run([*command, str(folder / "answer.json")], check=False, stdout=log, stderr=log)
    if done.returncode:
        raise SystemExit(f"Olive ended with {done.returncode}:\n{(folder / 'olive.log').read_text()[-2000:]}")
    answer: dict[str, Any] = json.loads((folder / "answer.json").read_text())
    return answer


def _arrays(runner: StageRunner, split: str) -> dict[str, np.ndarray]:
    """The inputs of a split's rows, padded to one length, and their labels."""
    from compress.evaluation.evaluate import encode_for_model

    recipe = runner.recipe
    examples = encode_for_model(
        runner.folder_of("onnx"),
        runner.inputs.task,
        runner.inputs.data.split(split),
        recipe.data.max_length,
        recipe.evaluation,
    )
    assert examples.labels is not None, "rows are labeled"
    return {**examples.batch(range(len(examples))), "labels": np.asarray(examples.labels)}


def _judged(runner: StageRunner, ours: Path, theirs: Path) -> list[list[str]]:
    """Accuracy, bytes and time of both and of the float model, side by side on the test rows."""
    from compress.data.dataset import TEST
    from compress.pipeline.target_session import TargetSession
    from compress.results.report import BASELINE

    as_folder = theirs.parent.parent / "as a folder"
    shutil.copytree(runner.folder_of("onnx"), as_folder, dirs_exist_ok=True)
    shutil.copy(theirs, next(as_folder.rglob("*.onnx")))
    labels = {BASELINE: runner.folder_of("onnx"), OURS: ours, OLIVE: as_folder}
    session = TargetSession(runner, runner.recipe.profiles()[0], labels, TEST)
    found = [*session.sizes(), *session.accuracies([]), *session.timings(remeasure=False)[0]]
    return by_model(found, (OLIVE, OURS), ("accuracy", "size_bytes", "latency_ms", "speedup"))
