"""A language model and its draft in one folder: the model's own tokens, here and in openvino-genai."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from causal import context
from mergeable import ROWS, save_mergeable_llama, train_tokenizer
from quantized import quantize_tiny_llama

from compress.bench.worker import generate
from compress.checkpoints.checkpoint import Checkpoint
from compress.checkpoints.model import files_in
from compress.errors import StageError
from compress.formats.model_file import model_file
from compress.formats.openvino.model import IR_FILE, OpenVinoModel, find_draft
from compress.formats.openvino.runtime import StatefulReader, open_stateful
from compress.formats.openvino.stage import OpenVino
from compress.formats.runtimes import get_runtime
from compress.formats.targets import TARGETS
from compress.runtimes.decoder import ComesInBursts, GreedyDecoder, WritesItself
from compress.runtimes.drafted import DraftedDecoder
from compress.tasks.registry import get_task

pytest.importorskip("openvino")
pytest.importorskip("openvino_tokenizers")


def draft_of(source: Checkpoint, folder: Path) -> Checkpoint:
    draft = quantize_tiny_llama(source, folder)
    train_tokenizer().save_pretrained(draft.folder)
    return draft


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, ...]]:
    """The folder of a pair, and what the stage said."""
    folder = tmp_path_factory.mktemp("pair")
    source = save_mergeable_llama(folder / "source", max_position_embeddings=2048)
    made = context(source, folder / "scratch")
    stage = OpenVino(draft_of="start", precision="fp32", kv_cache_precision="f32")
    model = stage.run(draft_of(source, folder / "draft"), made)
    (folder / "shipped").mkdir()
    model.save(folder / "shipped")
    return folder / "shipped", tuple(made.remarks)


def written(decoder: GreedyDecoder, ids: list[int], count: int = 40) -> list[int]:
    found = [decoder.prefill(ids)]
    while len(found) < count:
        found.append(decoder.step(found[-1]))
    return found


def prompt(length: int, seed: int = 0) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(3, ROWS, length).tolist()
    return found


def test_the_runtime_takes_the_draft_and_the_tokens_are_the_models(shipped: tuple[Path, tuple[str, ...]]) -> None:
    folder, remarks = shipped
    assert any("writes what the model alone writes behind 8 of 8 beginnings" in said for said in remarks)
    exact = open_stateful(folder / IR_FILE, 1, exact=True)
    # The draft is to be fast; its file says f32, as that of the model, whose answers they are.
    assert exact._draft is not None and exact._draft().settings["cache"] == "u8" and exact.settings["cache"] == "f32"
    pair = exact.decoder()
    assert isinstance(pair, DraftedDecoder) and isinstance(pair, ComesInBursts)
    for ids in (prompt(7), prompt(300), prompt(7, 3)):
        assert written(pair, ids) == written(exact.alone(), ids)
    assert 0 < pair.accepted < pair.drafted and pair.readings < 3 * 39


def test_the_target_times_a_model_alone_there_too(shipped: tuple[Path, tuple[str, ...]]) -> None:
    pytest.importorskip("openvino_genai")
    graph = shipped[0] / "draft" / IR_FILE
    session: Any = get_runtime("openvino").open(graph.parent, TARGETS["openvino"], 1)
    assert "openvino-genai" in session.settings["runtime"] and "draft" not in session.settings
    decoder, alone = session.decoder(), open_stateful(graph, 1).decoder()
    own = written(alone, prompt(7))
    found = decoder.write(prompt(7), 40)
    assert found.tokens == own == written(decoder, prompt(7)) and (found.drafted, found.accepted) == (0, 0)
    # A prompt is read anew each time.
    assert not session.pipeline.scheduler.enable_prefix_caching


def test_the_target_times_it_in_openvino_genai(shipped: tuple[Path, tuple[str, ...]]) -> None:
    pytest.importorskip("openvino_genai")
    folder = shipped[0]
    session: Any = get_runtime("openvino").open(folder, TARGETS["openvino"], 1)
    assert "openvino-genai" in session.settings["runtime"]
    assert session.settings["draft"] == "draft" and session.settings["drafted_tokens"] == 5
    decoder, alone = session.decoder(), open_stateful(folder / IR_FILE, 1).alone()
    assert isinstance(decoder, WritesItself) and decoder.vocabulary == alone.vocabulary
    for ids in (prompt(1), prompt(7), prompt(300)):
        found, own = decoder.write(ids, 40), written(alone, ids)
        assert found.tokens == own and 0 < found.accepted < found.drafted and 0 < found.first_ms < found.all_ms
        timed = generate(decoder, ids, 39)
        assert timed["tokens"] == own and len(timed["steps_ms"]) == 39 and len(set(timed["steps_ms"])) == 1
        assert generate(decoder, ids, 0)["tokens"] == own[:1]
    assert "own" not in vars(session)  # no second copy of the model while it is timed
    assert written(decoder, prompt(7)) == written(alone, prompt(7))
    ids = {"input_ids": np.array([prompt(9)])}
    np.testing.assert_array_equal(session.predict(ids)["logits"], session.own.predict(ids)["logits"])


def unopened(*given: Any, **named: Any) -> Any:
    raise RuntimeError("Check failed")


@pytest.mark.parametrize(
    "missing", [("genai.find_spec", lambda name: None), ("runtime.Pipeline", unopened)], ids=["absent", "unopened"]
)
def test_without_openvino_genai_it_is_our_own_loop(
    missing: tuple[str, Any], shipped: tuple[Path, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"compress.formats.openvino.{missing[0]}", missing[1])
    session: Any = get_runtime("openvino").open(shipped[0], TARGETS["openvino"], 1)
    assert session.settings["draft"] == "draft" and session.settings["drafted_tokens"] == 4
    assert session.settings["runtime"].startswith("openvino ") and isinstance(session.decoder(), DraftedDecoder)


def test_tokens_that_were_read_in_vain_change_nothing(shipped: tuple[Path, tuple[str, ...]]) -> None:
    session = open_stateful(shipped[0] / IR_FILE, 1, exact=True)
    reader, ids = StatefulReader(session._again()), prompt(30)
    texts = [ids[:12], [*ids[:12], 5, 6, 7], [*ids[:13], 9], [*ids[:9], 4, 4], ids[:20], [3, *ids], ids]
    asked = []
    for text in texts:
        found = reader.read(text)
        whole = session.logits(np.array([text]))[0]
        np.testing.assert_allclose(found, whole[-len(found) :], atol=1e-4)
        asked.append(len(found))
    # Never the tokens that both begin with, but for the last.
    assert asked == [12, 3, 2, 2, 11, 31, 30]


def test_the_folder_is_one_model_for_whoever_opens_it(shipped: tuple[Path, tuple[str, ...]], tmp_path: Path) -> None:
    folder = shipped[0]
    assert model_file(folder) == folder / IR_FILE and find_draft(folder / IR_FILE) == folder / "draft" / IR_FILE
    assert find_draft(folder / "draft" / IR_FILE) is None
    assert len(files_in(folder, ".bin")) == 6 and len(files_in(folder, ".bin", ("draft",))) == 3
    OpenVinoModel.load(folder, get_task("text-generation")).save(tmp_path)
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    assert [path.relative_to(tmp_path) for path in sorted(tmp_path.rglob("*")) if path.is_file()] == names
    # Alone it is a model like any other.
    draft: Any = get_runtime("openvino").open(folder / "draft", TARGETS["openvino"], 1)
    assert "draft" not in draft.settings


def test_openvino_genai_opens_the_pair_as_it_is(shipped: tuple[Path, tuple[str, ...]]) -> None:
    pytest.importorskip("openvino_genai")
    drafts: Any = importlib.import_module("drafts")
    folder = shipped[0]
    beside = drafts.draft_of(folder)
    assert beside == folder / "draft"
    prompts = drafts.encoded(drafts.check_pair(folder, beside), drafts.PROMPTS[:3])
    alone, pair = (drafts.in_openvino(folder, draft, 3, 1) for draft in (None, beside))
    found = drafts.compare(alone, pair, prompts, 16)
    assert found.differing == () and 0 < found.acceptance.value <= 1


def test_what_stood_in_the_text_before_is_a_draft_too(shipped: tuple[Path, tuple[str, ...]]) -> None:
    pytest.importorskip("openvino_genai")
    drafts: Any = importlib.import_module("drafts")
    folder = shipped[0] / "draft"
    prompts = drafts.encoded(drafts.check_pair(folder, folder), drafts.PROMPTS[:3])
    alone, looked_up = (drafts.in_openvino(folder, None, 3, 1, lookup) for lookup in (0, 2))
    found = drafts.compare(alone, looked_up, prompts, 64)
    # Of three that are looked up all may be right, and one more is always the model's own.
    assert found.differing == () and 1 < found.tokens_per_reading <= 4 and found.acceptance is None


def test_tokens_of_another_are_refused(tmp_path: Path) -> None:
    source = save_mergeable_llama(tmp_path / "source")
    draft = draft_of(source, tmp_path / "draft")
    file = draft.folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"!"', '"!!"'))
    with pytest.raises(StageError, match=r"1 of the draft's .* tokens are not those of the model"):
        OpenVino(draft_of="start").run(draft, context(source, tmp_path / "scratch"))


def test_it_refers_to_the_model_and_keys_of_before_stay() -> None:
    alone, pair = OpenVino(), OpenVino(draft_of="start")
    assert pair.refers_to() == ("start",) and alone.refers_to() == ()
    assert "draft_of" not in alone.key_fields() and pair.key_fields()["draft_of"] == "start"
    assert pair.idle_fields(get_task("text-generation").capabilities) == ()
    assert pair.idle_fields(get_task("text-classification").capabilities) == ("draft_of",)
