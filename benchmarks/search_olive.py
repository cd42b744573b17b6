"""Olive's joint search compared with ours: the fastest post-training INT8 model within an accuracy limit.

The command `olive` of `benchmarks/search.py`. Both start from the same float ONNX file and use the same calibration and
selection rows. Both results are measured in one session on the test rows.
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

FOLDER = Path(__file__).parent
RECIPE = FOLDER / "searching" / "post-training.yaml"
PINNED = ("olive-ai==0.13.0", "requests>=2", "pydantic<2.13")  # not pinned by its metadata
SHARED = ("onnxruntime", "torch", "transformers", "onnx")
_CALIBRATION = 256
OLIVE, OURS = "Olive's", "ours"


def olive(
    artifacts: Annotated[Path, typer.Option(help="Folder of the stage cache.")] = Path("artifacts"),
    trials: Annotated[int, typer.Option(help="Largest number of models that Olive makes.")] = 24,
    share: Annotated[float, typer.Option(help="Time of our search as a share of Olive's.")] = 1 / 3,
    write: Write = False,
) -> None:
    """Run both searches, ours in a share of Olive's time, and compare the results on the test rows."""
    from compress.formats.quiet_output import quiet_libraries
    from compress.plugins.ray.jobs import JobContext
    from compress.plugins.search.record import SearchRecord
    from compress.plugins.search.space import SearchSpace
    from compress.recipe.document import read_document
    from compress.report.progress import ConsoleProgress

    quiet_libraries()
    space = SearchSpace(read_document(RECIPE), RECIPE.parent)
    base = space.base.model_copy(update={"stages": space.base.stages[:-1], "baseline": "onnx"})
    runner = JobContext(RECIPE.parent, artifacts, ConsoleProgress()).runner(base)
    runner.run_all()
    folder = artifacts / "olive"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    theirs = _run_olive(runner, space.search.select.split, base.limits[0].bound, trials, folder)
    start = time.perf_counter()
    ours = _run_ours(runner, share * theirs["seconds"], folder / "ours")
    seconds = time.perf_counter() - start
    record = SearchRecord.model_validate_json((ours / "search.json").read_text())
    table = [
        ["seconds, without the training before", f"{theirs['seconds']:.0f}", f"{seconds:.0f}"],
        ["of these for trials", "", f"{record.seconds:.0f}"],
        ["models made", str(theirs["models"]), str(len(record.trials))],
        *_compare(runner, ours / "model", Path(theirs["best"])),
        ["best recipe", theirs["words"], record.best or ""],
    ]
    note = (
        f"`python benchmarks/search.py olive --write`; {PINNED[0]}, onnxruntime {version('onnxruntime')}. Olive's "
        f"time is without its start; ours is that of the whole command, limited to {share:.0%} of Olive's: start, "
        "trials, and the final session on the test rows."
    )
    show("Olive's joint search", ("quantity", OLIVE, OURS), table, write, notes=[note])


_START_SECONDS = 8.0
"""Approximate time from the command to the first trial."""


def _run_ours(runner: StageRunner, seconds: float, artifacts: Path) -> Path:
    """Run our search, whose cache only has the trained and exported model, and return its folder."""
    for label in runner.recipe.labels():
        source = runner.results[label].entry.folder
        shutil.copytree(source.parent, artifacts / "cache" / source.parent.name)
    command = ["compress", "search", str(RECIPE), "--artifacts", str(artifacts)]
    subprocess.run([*command, "--budget", f"{seconds - _START_SECONDS:.0f}s"], check=True)
    return (artifacts / "searches" / RECIPE.stem / "latest").resolve()


def _run_olive(runner: StageRunner, split: str, keep: float, trials: int, folder: Path) -> dict[str, Any]:
    """Run Olive's search in a separate environment and return its result."""
    from peers.environment import Packages, peer_python

    python = peer_python(
        "olive",
        (Packages((*PINNED, *(f"{name}=={version(name).split('+')[0]}" for name in SHARED))),),
        typer.echo,
    )
    examples = {name: _arrays(runner, name) for name in ("train", split)}
    calibration_rows = np.random.default_rng(runner.recipe.seed).permutation(len(examples["train"]["labels"]))[
        :_CALIBRATION
    ]
    unlabeled = {name: array[calibration_rows] for name, array in examples["train"].items() if name != "labels"}
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
    command = [str(python), str(FOLDER / "peers" / "olive_search.py"), str(folder / "order.json")]
    with (folder / "olive.log").open("w") as log:
        done = subprocess.run([*command, str(folder / "answer.json")], check=False, stdout=log, stderr=log)
    if done.returncode:
        raise SystemExit(f"Olive ended with {done.returncode}:\n{(folder / 'olive.log').read_text()[-2000:]}")
    answer: dict[str, Any] = json.loads((folder / "answer.json").read_text())
    return answer


def _arrays(runner: StageRunner, split: str) -> dict[str, np.ndarray]:
    """Return the inputs of a split's rows, padded to one length, and their labels."""
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


def _compare(runner: StageRunner, ours: Path, theirs: Path) -> list[list[str]]:
    """Return rows with accuracy, bytes and latency of both models, in one session on the test rows."""
    from compress.data.dataset import TEST
    from compress.pipeline.target_session import TargetSession
    from compress.results.report import BASELINE

    olive_folder = theirs.parent.parent / "as a folder"
    shutil.copytree(runner.folder_of("onnx"), olive_folder, dirs_exist_ok=True)
    shutil.copy(theirs, next(olive_folder.rglob("*.onnx")))
    labels = {BASELINE: runner.folder_of("onnx"), OURS: ours, OLIVE: olive_folder}
    session = TargetSession(runner, runner.recipe.profiles()[0], labels, TEST)
    rows = [*session.sizes(), *session.accuracies([]), *session.timings(remeasure=False)[0]]
    return by_model(rows, (OLIVE, OURS), ("accuracy", "size_bytes", "latency_ms", "speedup"))
