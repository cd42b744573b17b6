"""A language model with a draft head beside it: openvino-genai's tokens are the model's own."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from causal import LENGTH, context
from mergeable import save_mergeable_llama

from compress.checkpoints.checkpoint import Checkpoint
from compress.checkpoints.head_checkpoint import HeadCheckpoint
from compress.errors import MissingExtraError, StageError
from compress.formats.openvino.draft_head import name_blocks
from compress.formats.openvino.model import IR_FILE
from compress.formats.openvino.runtime import core, open_stateful
from compress.formats.openvino.stage import OpenVino
from compress.formats.runtimes import get_runtime
from compress.formats.targets import TARGETS
from compress.stages.eagle3 import Eagle3

pytest.importorskip("openvino_genai")
pytest.importorskip("openvino_tokenizers")
SHIPS = OpenVino(draft_of="start", precision="fp32", kv_cache_precision="f32")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, HeadCheckpoint]:
    """A model, and a head for it."""
    folder = tmp_path_factory.mktemp("head")
    source = save_mergeable_llama(folder / "source", num_hidden_layers=10, max_position_embeddings=2048)
    stage = Eagle3(steps=400, batch_size=2, sequence_length=LENGTH, draft_vocab_size=300, learning_rate=3e-3)
    return source, stage.run(source, context(source, folder / "scratch"))


@pytest.fixture(scope="module")
def shipped(
    made: tuple[Checkpoint, HeadCheckpoint], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, tuple[str, ...]]:
    """The folder of the pair, and what the stage said."""
    folder = tmp_path_factory.mktemp("pair")
    given = context(made[0], folder / "scratch")
    model = SHIPS.run(made[1], given)
    (folder / "shipped").mkdir()
    model.save(folder / "shipped")
    return folder / "shipped", tuple(given.remarks)


def test_the_pair_writes_the_models_own_tokens(shipped: tuple[Path, tuple[str, ...]]) -> None:
    folder, remarks = shipped
    assert any("writes what the model alone writes behind 8 of 8 beginnings" in said for said in remarks)
    session: Any = get_runtime("openvino").open(folder, TARGETS["openvino"], 1)
    assert session.settings["draft"] == "draft" and session.settings["drafted_tokens"] == 2
    alone: Any = open_stateful(folder / IR_FILE, 1).decoder()
    drafted = accepted = 0
    for seed in range(4):
        ids = np.random.default_rng(seed).integers(3, 340, 9).tolist()
        found, own = session.decoder().write(ids, 40), [alone.prefill(ids)]
        while len(own) < 40:
            own.append(alone.step(own[-1]))
        assert found.tokens == own
        drafted, accepted = drafted + found.drafted, accepted + found.accepted
    assert 0 < accepted < drafted


def test_without_openvino_genai_the_model_is_alone(
    shipped: tuple[Path, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.formats.openvino.genai.find_spec", lambda name: None)
    session: Any = get_runtime("openvino").open(shipped[0], TARGETS["openvino"], 1)
    assert "draft" not in session.settings and session.settings["runtime"].startswith("openvino ")


def test_the_benchmark_of_drafts_takes_it(shipped: tuple[Path, tuple[str, ...]]) -> None:
    drafts: Any = importlib.import_module("drafts")
    folder = shipped[0]
    prompts = drafts.encoded(drafts.check_pair(folder, drafts.draft_of(folder)), drafts.PROMPTS[:3])
    alone, pair = (drafts.in_openvino(folder, draft, 3, 1) for draft in (None, drafts.draft_of(folder)))
    assert drafts.compare(alone, pair, prompts, 16).differing == ()


def test_the_file_has_no_table_and_says_what_it_is(shipped: tuple[Path, tuple[str, ...]]) -> None:
    folder = shipped[0] / "draft"
    graph = core().read_model(folder / IR_FILE)
    assert graph.get_rt_info("eagle3_mode").astype(str) == "True"
    tokens = json.loads((folder / "config.json").read_text())["draft_vocab_size"]
    # The weights of the head in 8 bits and what else there is of them, not 352 rows of 64 in any.
    assert (folder / "openvino_model.bin").stat().st_size < 352 * 64 + 3 * 64 * 64 + 64 * tokens + 4 * 64 * 128 * 3


def test_a_head_without_its_model_and_a_model_of_another_form_are_refused(
    made: tuple[Checkpoint, HeadCheckpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert OpenVino().objects_to(Eagle3()) == (
        None,
        "openvino with draft_of, the label of the model that the head is for",
    )
    assert SHIPS.objects_to(Eagle3()) is None
    graph = core().read_model(save_parallel(tmp_path))
    with pytest.raises(StageError, match="2 blocks, and 0 of them end"):
        name_blocks(graph, 2)
    monkeypatch.setattr("compress.formats.openvino.genai.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="openvino-genai"):
        SHIPS.run(made[1], context(made[0], tmp_path / "scratch"))


def save_parallel(folder: Path) -> Path:
    """A graph of two blocks that have no gate."""
    import openvino
    from openvino import opset13 as ops

    value = given = ops.parameter([1, 8], openvino.Type.f32, "given")
    for _ in range(2):
        wide = ops.relu(ops.matmul(value, ops.constant(np.ones((8, 8), np.float32)), False, True))
        value = ops.add(value, ops.matmul(wide, ops.constant(np.ones((8, 8), np.float32)), False, True))
    openvino.save_model(openvino.Model([ops.result(value)], [given], "plain"), folder / "plain.xml")
    return folder / "plain.xml"


def test_a_head_that_answers_otherwise_is_refused(
    made: tuple[Checkpoint, HeadCheckpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.checkpoints.eagle3 import read_head
    from compress.errors import IntegrityError
    from compress.formats.openvino import draft_head

    head = read_head(made[1])
    files, difference = draft_head.write_head(head, 1e-3)
    assert set(files) == {IR_FILE, "openvino_model.bin"} and difference < 1e-4
    whole = draft_head._graph

    def bent(head: Any, table: Any) -> Any:
        with torch.no_grad():
            head.midlayer.hidden_norm.weight += 0.01
        return whole(head, table)

    monkeypatch.setattr(draft_head, "_graph", bent)
    with pytest.raises(IntegrityError, match="differ from torch"):
        draft_head.write_head(head, 1e-3)
