"""Rotated checkpoints: the same answers in other coordinates, and who cannot be rotated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import Notes, context, module_of, save_decoder, some_ids

from compress.models.checkpoint import Checkpoint
from compress.numerics.rotation import rotation
from compress.quantization import rotate
from compress.stages.equalize.stage import Equalize
from compress.stages.rotate import Rotate
from compress.utils.errors import StageError

IDS = some_ids(2, 20, seed=5)


def rotated(source: Checkpoint, scratch: Path, notes: Notes | None = None, **fields: Any) -> Checkpoint:
    return Rotate(**fields).run(source, context(scratch, progress=notes))


@torch.no_grad()
def logits(checkpoint: Checkpoint) -> torch.Tensor:
    found: torch.Tensor = module_of(checkpoint)(input_ids=IDS).logits
    return found


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("size", [1, 6, 16, 36])
@pytest.mark.parametrize("hadamard", [True, False])
def test_matrices_are_orthogonal_and_another_each_time(size: int, hadamard: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (rotation(size, hadamard, generator) for _ in range(2))
    torch.testing.assert_close(first @ first.T, torch.eye(size, dtype=torch.float64))
    assert size == 1 or not torch.equal(first, second)
    if hadamard and size == 16:
        torch.testing.assert_close(first.abs(), torch.full_like(first, 0.25))


@pytest.mark.parametrize("config", ["LlamaConfig", "Qwen2Config", "Qwen3Config", "Phi3Config", "GraniteConfig"])
def test_transformers_answers_the_same(config: str, tmp_path: Path) -> None:
    """With heads that share values, biases, norms of heads, joint layers, and factors on embeddings and residuals."""
    source = save_decoder(tmp_path / "source", config, head_dim=32) if config == "Qwen3Config" else None
    source = source or save_decoder(tmp_path / "source", config)
    result, before = rotated(source, tmp_path / "scratch"), logits(source)
    assert relative(logits(result), before) < 1e-4
    norms = [name for name in result.files if name.endswith("layernorm.weight")] + ["model.norm.weight"]
    assert all(torch.equal(result.stored(name), torch.ones(64)) for name in norms)


def test_each_part_turns_what_it_says(tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source", "Gemma2Config", num_hidden_layers=1)
    result = rotated(source, tmp_path / "scratch", hidden=False)
    assert relative(logits(result), logits(source)) < 1e-4
    changed = {name for name in source.files if not torch.equal(source.stored(name), result.stored(name))}
    assert changed == {f"model.layers.0.self_attn.{name}_proj.weight" for name in ("v", "o")}
    # Each head's values keep their sizes, in other directions.
    before, after = (found.weight("model.layers.0.self_attn.v_proj").view(2, 16, 64) for found in (source, result))
    torch.testing.assert_close(after.square().sum(1), before.square().sum(1))


def test_the_states_between_blocks_are_those_before_times_one_matrix(tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source")
    result = rotated(source, tmp_path / "scratch", matrix="random")
    turn = rotation(64, False, torch.Generator().manual_seed(0)).float()
    with torch.no_grad():
        before, after = (
            module_of(found).model(IDS, output_hidden_states=True).hidden_states for found in (source, result)
        )
    for one, other in zip(before[:2], after[:2], strict=True):
        assert relative(other, one @ turn) < 1e-4


def test_a_tied_head_gets_weights_of_its_own_and_that_is_said(tmp_path: Path) -> None:
    source, notes = save_decoder(tmp_path / "source"), Notes()
    assert "lm_head.weight" not in source.files
    result = rotated(source, tmp_path / "scratch", notes)
    assert result.config["tie_word_embeddings"] is False and "lm_head.weight" in result.files
    rows = source.stored("model.embed_tokens.weight").shape[0]
    assert notes.said[-1].endswith(f"{64 * rows:,} more, {128 * rows:,} bytes in float16")
    assert rotated(source, tmp_path / "heads", hidden=False).config["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("Gemma2Config", r"model.layers.0 \(Gemma2RMSNorm\) would not compute the same"),  # norms behind the layers
        ("PhiConfig", r"model.layers.0 \(LayerNorm\) would not"),  # norms that subtract the mean
        ("MixtralConfig", r"model.layers.0 \(.*MixtralRMSNorm.*\) would not"),  # experts apart from what is read
    ],
)
def test_what_cannot_be_rotated_is_named(config: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=expected):
        rotated(save_decoder(tmp_path / "source", config, num_hidden_layers=1), tmp_path / "scratch", heads=False)


def test_a_rotation_that_is_not_taken_back_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_decoder(tmp_path / "source")
    plain = rotate._Work._surroundings
    monkeypatch.setattr(rotate._Work, "_surroundings", lambda work, turn: plain(work, torch.eye(64).double()))
    with pytest.raises(StageError, match="The logits of LlamaForCausalLM would not compute the same"):
        rotated(source, tmp_path / "scratch")


def test_nothing_to_rotate_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden, heads, or both"):
        Rotate(hidden=False, heads=False)


def test_layers_that_files_keep_transposed_stay_so(tmp_path: Path) -> None:
    import tiny_decoders

    tiny_decoders.save("gpt2", tmp_path / "model")
    source = Checkpoint(tmp_path / "model")
    for stage in (Equalize(), Rotate(hidden=False)):
        result = stage.run(source, context(tmp_path / stage.kind))
        assert relative(logits(result), logits(source)) < 1e-4
