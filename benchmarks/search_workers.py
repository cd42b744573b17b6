"""The same search on a local Ray cluster of one node and of two nodes, each with one processor and an empty cache.

The command `ray` of `benchmarks/search.py`.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from search_page import MEASURED_AND_REQUIRED, Write, show

RECIPE = Path(__file__).parent / "searching" / "workers.yaml"
_STORE = 200 * 2**20


def ray(
    recipe: Annotated[Path, typer.Option(help="Recipe with a `search:` block.")] = RECIPE,
    write: Write = False,
) -> None:
    """Time a search on one node and on two, and check that the results are the same."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="search-workers-") as folder:
        single, double = (run_search(recipe, Path(folder) / f"{nodes}", nodes) for nodes in (1, 2))
    same = {name: single[name] == double[name] for name in ("winner", "decisions", "bytes")}
    rows = [
        ["seconds on one node, on two", f"{single['seconds']:.0f}, {double['seconds']:.0f}", ""],
        ["speed-up", f"{single['seconds'] / double['seconds']:.2f}", "1.7"],
        ["the same winner", "yes" if same["winner"] else "no", "yes"],
        ["the same trials in the ledger", "yes" if same["decisions"] else "no", "yes"],
        ["the same bytes of every trial's model", "yes" if same["bytes"] else "no", "yes"],
        ["trials", f"{len(single['decisions'])}, {len(double['decisions'])}", ""],
    ]
    show("Two Ray nodes of one processor", MEASURED_AND_REQUIRED, rows, write)


def run_search(recipe: Path, folder: Path, nodes: int, is_lost: Callable[[Path], bool] | None = None) -> dict[str, Any]:
    """Run a search on a number of nodes, and return its time and results.

    Args:
        recipe: Recipe with a `search:` block.
        folder: Folder of all files.
        nodes: Number of nodes.
        is_lost: Is called with the artifacts again and again; the last node is killed once it returns True.

    Returns:
        The seconds, the winner, the decisions, the digests of the models, and whether a node was killed.
    """
    import torch
    from ray.cluster_utils import Cluster

    from compress.plugins.search.observations import Ledger
    from compress.plugins.search.run import SearchRun
    from compress.recipe.document import read_document
    from compress.report.progress import ConsoleProgress

    torch.set_num_threads(1)
    cluster = Cluster()
    cluster.add_node(num_cpus=0, object_store_memory=_STORE, include_dashboard=False)
    for number in range(nodes):
        environment = {"COMPRESS_WORKER_FOLDER": str(folder / f"node {number}")}
        last = cluster.add_node(num_cpus=1, object_store_memory=_STORE, env_vars=environment)
    done, killed = threading.Event(), threading.Event()

    def kill_last() -> None:
        while is_lost and not done.wait(0.1):
            if is_lost(folder / "artifacts"):
                cluster.remove_node(last, allow_graceful=False)
                killed.set()
                return

    watcher = threading.Thread(target=kill_last)
    watcher.start()
    try:
        workers = f"ray:{cluster.address}"
        search = SearchRun(
            read_document(recipe), recipe.parent, folder / "artifacts", ConsoleProgress(), workers=workers
        )
        start = time.perf_counter()
        result = search.run()
        seconds = time.perf_counter() - start
    finally:
        done.set()
        watcher.join()
        cluster.shutdown()
    trials = Ledger(result.folder).read(repair=False)[1]
    return {
        "seconds": seconds,
        "winner": result.record.best,
        "decisions": [(trial.point, trial.rung) for trial in trials],
        "bytes": [trial.outcome.model for trial in trials],
        "killed": killed.is_set(),
    }
