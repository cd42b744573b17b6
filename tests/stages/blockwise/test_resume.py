"""A killed quantization goes on at the block after the last finished one and ends with the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from decoders import Notes, context, save_decoder
from safetensors import SafetensorError

from compress.models.checkpoint import Checkpoint
from compress.stages.blockwise.resume import BlockCache
from compress.stages.gptq.stage import Gptq
from compress.utils.errors import StorageError
from compress.utils.storage import digest_directory

BLOCKS = 4
STAGE = Gptq(group_size=32, samples=8, sequence_length=32, embedding_bits=4)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save_decoder(tmp_path_factory.mktemp("source"), num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def undisturbed(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> str:
    return digest_directory(STAGE.run(source, context(tmp_path_factory.mktemp("undisturbed"))).folder)


def finish(source: Checkpoint, scratch: Path) -> tuple[str, list[str]]:
    """The digest at the end, and the blocks that were done this time."""
    notes = Notes()
    result = STAGE.run(source, context(scratch, progress=notes))
    return digest_directory(result.folder), [line.split(":")[0] for line in notes.said if line.startswith("model.")]


class Stop(Exception):  # noqa: N818
    """The moment at which a run ends."""


@pytest.mark.parametrize("done", [1, 3, 4])
def test_a_run_that_ends_after_a_block_goes_on_with_the_next(
    done: int, source: Checkpoint, undisturbed: str, tmp_path: Path
) -> None:
    def stop(message: str) -> None:
        if message.startswith(f"model.layers.{done - 1}:"):
            raise Stop

    with pytest.raises(Stop):
        STAGE.run(source, context(tmp_path, progress=Notes(stop)))
    digest, blocks = finish(source, tmp_path)
    assert digest == undisturbed
    assert blocks == [f"model.layers.{index}" for index in range(done, BLOCKS)]


CHILD = """
import os, sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
from decoders import Notes, context
from test_resume import STAGE
from compress.models.checkpoint import Checkpoint
import compress.stages.gptq.quantizer as walk

solve, count = walk.solve_layers, 0

def and_die(*arguments):
    global count
    count += 1
    if count == 7 * 2 + 4:
        os.kill(os.getpid(), 9)
    return solve(*arguments)

walk.solve_layers = and_die
STAGE.run(Checkpoint(Path(sys.argv[1])), context(Path(sys.argv[2])))
"""


@pytest.mark.slow
def test_a_run_killed_within_a_block(source: Checkpoint, undisturbed: str, tmp_path: Path) -> None:
    here = Path(__file__).parent
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(source.folder), str(tmp_path), str(here), str(here.parents[1] / "support")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(here.parents[2])},
        check=False,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert BlockCache(tmp_path).count(BLOCKS) == 2
    digest, blocks = finish(source, tmp_path)
    assert digest == undisturbed
    assert blocks == ["model.layers.2", "model.layers.3"]


def test_a_block_file_that_was_cut_short_counts_for_nothing(
    source: Checkpoint, undisturbed: str, tmp_path: Path
) -> None:
    STAGE.run(source, context(tmp_path))
    path = BlockCache(tmp_path).file(2)
    path.write_bytes(path.read_bytes()[:-100])
    digest, blocks = finish(source, tmp_path)
    assert digest == undisturbed
    # The states that entered block 2 are gone, so the walk begins anew.
    assert blocks == [f"model.layers.{index}" for index in range(BLOCKS)]


def test_a_full_disk_is_called_so_and_what_is_done_is_kept(
    source: Checkpoint, undisturbed: str, tmp_path: Path
) -> None:
    (tmp_path / "states-00002.partial").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="The disk is full") as caught:
        STAGE.run(source, context(tmp_path))
    assert "run again" in str(caught.value)
    (tmp_path / "states-00002.partial").unlink()
    digest, blocks = finish(source, tmp_path)
    assert digest == undisturbed
    assert blocks == ["model.layers.1", "model.layers.2", "model.layers.3"]


def test_a_disk_that_safetensors_finds_full(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(StorageError, match="The disk is full"):
        STAGE.run(source, context(tmp_path))


def test_only_the_states_at_work_are_kept(source: Checkpoint, tmp_path: Path) -> None:
    STAGE.run(source, context(tmp_path))
    assert [path.name for path in tmp_path.glob("states-*")] == [f"states-{BLOCKS:05}.bin"]
    assert not list(tmp_path.rglob("*.partial"))
