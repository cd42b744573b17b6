"""Speculative decoding: whatever the draft is, the tokens are the model's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from causal import context
from mergeable import ROWS, save_mergeable_llama, train_tokenizer
from quantized import quantize_tiny_llama

from compress.bench.worker import generate
from compress.checkpoints.checkpoint import Checkpoint
from compress.errors import ModelError, StageError
from compress.formats.gguf.decoder import LlamaCppDecoder, Reader
from compress.formats.gguf.export import Types, write_gguf
from compress.formats.gguf.llama_cpp_library import LlamaModel
from compress.formats.gguf.model import find_draft
from compress.formats.gguf.stage import Gguf
from compress.formats.runtimes import get_runtime
from compress.formats.targets import TARGETS
from compress.runtimes.drafted import DraftedDecoder

WORDS = 40


class Pair:
    """Files of a model and of others that draft for it."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "model.gguf"
        source = save_mergeable_llama(folder / "source", max_position_embeddings=2048)
        rounded = quantize_tiny_llama(source, folder / "rounded")
        train_tokenizer().save_pretrained(rounded.folder)
        other = save_mergeable_llama(folder / "other", seed=5, max_position_embeddings=2048)
        small = save_mergeable_llama(folder / "small", max_position_embeddings=2048, num_hidden_layers=1)
        self.models = {}
        for name, made in (("source", source), ("rounded", rounded), ("other", other), ("small", small)):
            write_gguf(made, folder / f"{name}.gguf", Types("f32"))
            self.models[name] = LlamaModel(folder / f"{name}.gguf")

    def alone(self) -> LlamaCppDecoder:
        return LlamaCppDecoder(self.models["source"], self.file, 1)

    def drafted(self, draft: str) -> DraftedDecoder:
        model = Reader(self.models["source"], self.file, 1, 5)
        return DraftedDecoder(model, Reader(self.models[draft], self.file, 1), "")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("pair"))


def prompt(length: int, seed: int = 0) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(3, ROWS, length).tolist()
    return found


def written(decoder: LlamaCppDecoder | DraftedDecoder, ids: list[int], count: int = WORDS) -> list[int]:
    found = [decoder.prefill(ids)]
    while len(found) < count:
        found.append(decoder.step(found[-1]))
    return found


@pytest.mark.parametrize("draft", ["source", "rounded", "other", "small"])
def test_the_tokens_are_those_of_the_model_alone(draft: str, pair: Pair) -> None:
    drafted = pair.drafted(draft)
    # The second is longer than the room that both begin with, and a prompt does not remember the one before.
    for ids in (prompt(7), prompt(500), prompt(7, 3)):
        assert written(drafted, ids) == written(pair.alone(), ids)
    assert drafted.drafted > 0 and 0 <= drafted.accepted <= drafted.drafted


def test_a_draft_that_is_always_right_is_always_taken(pair: Pair) -> None:
    drafted = pair.drafted("source")
    written(drafted, prompt(9), 1 + 5 * 6)
    # A reading gives what was drafted and one more.
    assert drafted.accepted == drafted.drafted == 4 * 6 and drafted.readings == 6


def test_what_is_accepted_is_what_both_would_have_written(pair: Pair) -> None:
    drafted, alone, draft = pair.drafted("rounded"), pair.alone(), LlamaCppDecoder(pair.models["rounded"], pair.file, 1)
    ids = prompt(12, 1)
    found = written(drafted, ids, 60)
    assert 0 < drafted.accepted < drafted.drafted
    # By hand: the draft goes on from the model's own text, as far as both agree.
    text, readings, accepted, proposed = [*ids, alone.prefill(ids)], 0, 0, 0
    while len(text) < len(ids) + 60:
        ahead = written(draft, text, 4)
        own = [alone.prefill([*text, *ahead[:count]]) for count in range(5)]
        right = next((place for place in range(4) if ahead[place] != own[place]), 4)
        readings, accepted, proposed = readings + 1, accepted + right, proposed + 4
        text += own[: right + 1]
    assert text[len(ids) : len(ids) + 60] == found
    assert (drafted.readings, drafted.accepted, drafted.drafted) == (readings, accepted, proposed)


def test_somebody_who_goes_another_way_is_followed(pair: Pair) -> None:
    drafted, alone = pair.drafted("source"), pair.alone()
    assert drafted.prefill(prompt(7)) == alone.prefill(prompt(7))
    for token in (5, 6, 5, 9, 9, 30):
        assert drafted.step(token) == alone.step(token)


def test_what_is_read_again_is_only_what_differs(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, ids = Reader(pair.models["source"], pair.file, 1), prompt(20)
    fresh = reader.read(ids)
    asked: list[int] = []
    append = reader._context.append
    monkeypatch.setattr(reader._context, "append", lambda given: asked.append(len(given)) or append(given))
    other = [*ids[:12], ids[12] + 1 if ids[12] < ROWS - 1 else 3, *ids[13:]]
    for given in (ids, other, ids):
        found = reader.read(given)
    assert asked == [1, 8, 8]
    np.testing.assert_allclose(found, fresh, atol=1e-3)


def test_a_bench_gives_each_token_the_mean_of_those_that_came_at_once(pair: Pair) -> None:
    slow = generate(pair.alone(), prompt(9), 11)
    fast = generate(pair.drafted("source"), prompt(9), 11)
    assert fast["tokens"] == slow["tokens"] and len(fast["steps_ms"]) == len(slow["steps_ms"]) == 11
    assert len(set(fast["steps_ms"])) == 1 < len(set(slow["steps_ms"]))
    assert fast["steps_ms"][0] > 0


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Checkpoint, Checkpoint]:
    source = save_mergeable_llama(tmp_path / "source")
    draft = quantize_tiny_llama(source, tmp_path / "draft")
    train_tokenizer().save_pretrained(draft.folder)
    return source, draft


def test_the_stage_ships_the_pair_and_the_runtime_takes_it(
    checkpoints: tuple[Checkpoint, Checkpoint], tmp_path: Path
) -> None:
    source, draft = checkpoints
    made = context(source, tmp_path / "scratch")
    shipped = Gguf(draft_of="start", float_type="f32").run(draft, made)
    assert {"model.gguf", "draft.gguf", "config.json"} <= {path.name for path in shipped.folder.iterdir()}
    assert shipped.file.name == "model.gguf" and find_draft(shipped.file) == shipped.folder / "draft.gguf"
    assert made.remarks[0].startswith("draft: gguf: 20 of 20 tensors are kept to the bit")
    assert "writes what the model alone writes behind 8 of 8 beginnings" in made.remarks[1]
    target = TARGETS["llama-cpp"]
    opened = get_runtime("llama-cpp").open(shipped.folder, target, 1)
    write_gguf(source, tmp_path / "alone.gguf", Types("f32"))
    alone = get_runtime("llama-cpp").open(tmp_path / "alone.gguf", target, 1)
    assert opened.settings["draft"] == "draft.gguf" and "draft" not in alone.settings
    batch = {"input_ids": np.array([prompt(20)])}
    assert np.array_equal(opened.predict(batch)["logits"], alone.predict(batch)["logits"])
    decoders: Any = opened.decoder(), alone.decoder()  # type: ignore[attr-defined]
    assert isinstance(decoders[0], DraftedDecoder)
    assert written(decoders[0], prompt(9)) == written(decoders[1], prompt(9))


def test_tokens_of_another_are_refused(checkpoints: tuple[Checkpoint, Checkpoint], tmp_path: Path) -> None:
    source, draft = checkpoints
    file = draft.folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"!"', '"!!"'))
    with pytest.raises(StageError, match=r"1 of the draft's .* tokens are not those of the model"):
        Gguf(draft_of="start").run(draft, context(source, tmp_path / "scratch"))


def test_models_of_two_tables_are_no_pair(pair: Pair, tmp_path: Path) -> None:
    model = pair.models["source"]
    other = save_mergeable_llama(tmp_path / "fewer")
    write_gguf(other, tmp_path / "fewer.gguf", Types("f32"))
    draft = LlamaModel(tmp_path / "fewer.gguf")
    draft.vocabulary -= 1
    with pytest.raises(ModelError, match=f"draft has {ROWS - 1} tokens and the model {ROWS}"):
        DraftedDecoder(Reader(model, pair.file, 1), Reader(draft, pair.file, 1), "")


def test_it_refers_to_the_model_and_keys_of_before_stay() -> None:
    alone, pair = Gguf(), Gguf(draft_of="start")
    assert pair.refers_to() == ("start",) and alone.refers_to() == ()
    assert "draft_of" not in alone.key_fields() and pair.key_fields()["draft_of"] == "start"
    assert pair.without_rounding().draft_of is None
