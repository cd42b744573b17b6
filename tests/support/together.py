"""Processes of a distributed training on this machine, forked from one that has imported the libraries."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked


def train_together(work: Callable[[Path, int], Any], folder: Path, count: int = 2) -> list[Any]:
    """Run ``work(folder, rank)`` in ``count`` distributed processes and return their results by rank."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    started = [
        forked._server().Process(target=_one, args=(work, folder, rank, count, port), daemon=True)
        for rank in range(count)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        assert process.exitcode == 0, (folder / f"{started.index(process)}.error").read_text()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def _one(work: Callable[[Path, int], Any], folder: Path, rank: int, count: int, port: int) -> None:
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
    import torch

    # With several threads, torch might wait for worker threads that the fork did not copy.
    torch.set_num_threads(1)
    try:
        (folder / f"{rank}.json").write_text(json.dumps(work(folder, rank)))
    except BaseException as error:
        (folder / f"{rank}.error").write_text(repr(error))
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
