"""Tests of compensation for removed blocks: the layer before them is refitted as by brute force, or left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import decoders
import numpy as np
import pytest
import torch
from decoders import context, module_of, save_decoder, text
from torch import nn
from transformers.pytorch_utils import Conv1D

from compress.models.checkpoint import Checkpoint
from compress.stages.base import Context
from compress.stages.blockwise.calibration import calibration_sequences
from compress.stages.prune_decoder.stage import PruneDecoder

SAMPLES, LENGTH, DAMPING = 16, 48, 0.01
pytestmark = pytest.mark.usefixtures("gpt2")
LAST_LAYERS = {"GPT2Config": ("transformer.h", "mlp.c_proj"), "PhiConfig": ("model.layers", "mlp.fc2")}


def cut_of(source: Checkpoint, scratch: Path, gone: list[int], monkeypatch: Any, **fields: Any) -> tuple[Any, Context]:
    """Return the checkpoint that `prune_decoder` leaves when these consecutive blocks change hidden states least."""
    firsts = range(module_of(source).config.num_hidden_layers + 1 - len(gone))
    block_distances = [0.0 if index == gone[0] else 1.0 for index in firsts]
    monkeypatch.setattr("compress.stages.prune_decoder.depth.distances", lambda *given: block_distances)
    given = context(scratch, text(8000))
    asked = {"samples": SAMPLES, "sequence_length": LENGTH, "precision": "fp32", "layers": len(gone)}
    return PruneDecoder(**{**asked, **fields}).run(source, given), given


def stack_of(module: Any, config: str) -> tuple[Any, list[nn.Module]]:
    """Return the list of blocks and the down projection of each."""
    stack, name = LAST_LAYERS.get(config, ("model.layers", "mlp.down_proj"))
    blocks = module.get_submodule(stack)
    return blocks, [block.get_submodule(name) for block in blocks]


@torch.no_grad()
def watched(module: Any, block: nn.Module, layer: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inputs of a layer and the outputs of its block, [tokens, width]."""
    seen: list[torch.Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].reshape(-1, given[0].shape[-1]))),
        block.register_forward_hook(
            lambda _, given, left: seen.append((left[0] if isinstance(left, tuple) else left).flatten(0, 1))
        ),
    ]
    module(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen[0].double(), seen[1].double()


def by_brute_force(
    source: Checkpoint, config: str, gone: list[int], ids: torch.Tensor, unit: float, massive: bool
) -> Any:
    """Return transformers' model without the blocks, the layer before them refitted by QR with damping rows.

    ``massive``: some tokens have massive activations, which together weigh as much as all others.
    """
    whole, cut = module_of(source), module_of(source)
    (whole_blocks, whole_layers), (blocks, layers) = stack_of(whole, config), stack_of(cut, config)
    judges = np.repeat([index % 8 == 7 for index in range(SAMPLES)], LENGTH)
    layer_before = gone[0] - 1
    _, aim = watched(whole, whole_blocks[gone[-1]], whole_layers[gone[-1]], ids)
    for index in gone:
        blocks[index].forward = lambda hidden_states, *rest, **named: hidden_states
    inputs, left = watched(cut, blocks[layer_before], layers[layer_before], ids)
    sizes = aim.square().mean(dim=1, keepdim=True).sqrt()
    large = sizes > 10 * float(np.sort(sizes.numpy().ravel())[(sizes.numel() - 1) // 2])
    assert bool(large.any()) is massive
    times = float((~large).sum() / large.sum()) ** 0.5 if massive else 1.0
    weights = torch.where(large, times, 1.0) / sizes
    rows, targets = (inputs * weights).numpy(), ((aim - left) / unit * weights).numpy()

    def ridge(some: np.ndarray, damping: float) -> np.ndarray:
        chosen_rows = rows[some]
        size = np.sqrt(damping * (chosen_rows**2).sum() / chosen_rows.shape[1])
        below = np.concatenate([chosen_rows, size * np.eye(chosen_rows.shape[1])])
        aims = np.concatenate([targets[some], np.zeros((chosen_rows.shape[1], targets.shape[1]))])
        return np.linalg.lstsq(below, aims, rcond=None)[0]

    def error(damping: float) -> float:
        return float(((targets[judges] - rows[judges] @ ridge(~judges, damping)) ** 2).sum())

    best = min((DAMPING * times for times in (1, 10, 100, 1000)), key=error)
    assert error(best) < (targets[judges] ** 2).sum()
    change = torch.from_numpy(ridge(np.ones_like(judges), best)).float()
    with torch.no_grad():
        weight = layers[layer_before].weight
        weight += change if isinstance(layers[layer_before], Conv1D) else change.T
    return cut


@pytest.mark.parametrize(
    ("config", "gone", "unit"),
    [
        ("LlamaConfig", [2, 3], 1.0),
        ("LlamaConfig", [2, 3], None),  # one token's states are a hundred times as large
        ("GraniteConfig", [2], 0.5),  # adds half of the layer's output
        ("PhiConfig", [2], 1.0),  # parallel attention
        ("GPT2Config", [1], 1.0),
    ],
)
def test_layer_before_removed_blocks_matches_brute_force(
    config: str, gone: list[int], unit: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more: dict[str, Any] = {"residual_multiplier": unit} if unit not in (1, None) else {}
    more |= {"n_inner": 96, "n_positions": 128} if config == "GPT2Config" else {}
    source = save_decoder(tmp_path / "source", config, num_hidden_layers=5, **more)
    ids = calibration_sequences(context(tmp_path, text(8000)), source, SAMPLES, LENGTH)
    if massive := unit is None:
        module = module_of(source)
        with torch.no_grad():
            module.get_input_embeddings().weight[ids[0, 0]] *= 100
        module.save_pretrained(source.folder)
        source = Checkpoint(source.folder)
    result, given = cut_of(source, tmp_path / "scratch", gone, monkeypatch)
    expected, solved_module = by_brute_force(source, config, gone, ids, unit or 1.0, massive), module_of(result)
    assert len(given.notes) == 2, given.notes
    solved, other, unsolved = (
        stack_of(module, config)[1][gone[0] - 1].weight for module in (solved_module, expected, module_of(source))
    )
    assert float((other - unsolved).detach().norm()) > 0.01 * float(unsolved.detach().norm())
    torch.testing.assert_close(solved, other, atol=2e-3 * float(other.detach().abs().max()), rtol=1e-2)
    tokens = ids[:2]
    with torch.no_grad():
        torch.testing.assert_close(solved_module(tokens).logits, expected(tokens).logits, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("config", "gone", "fields", "reason"),
    [
        ("Gemma2Config", [2], {}, "is not added unchanged to the hidden states"),
        ("MixtralConfig", [2], {}, "has no supported feed-forward layers"),
        ("LlamaConfig", [2], {"samples": 1}, "leaves none for validation"),
    ],
)
def test_gap_that_cannot_be_compensated_is_reported_with_the_reason(
    config: str, gone: list[int], fields: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_decoder(tmp_path / "source", config, num_hidden_layers=4)
    result, given = cut_of(source, tmp_path / "scratch", gone, monkeypatch, **fields)
    assert any(reason in remark for remark in given.notes), given.notes
    before = [name for name in source.files if name.startswith("model.layers.1.")]
    assert before and all(torch.equal(result.stored(name), source.stored(name)) for name in before)


@pytest.mark.parametrize("gone", [[0], [2, 3]])
def test_only_the_layer_before_a_gap_changes_and_states_are_deleted(
    gone: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_decoder(tmp_path / "source", num_hidden_layers=5)
    result, _ = cut_of(source, tmp_path / "scratch", gone, monkeypatch)
    remaining = [index for index in range(5) if index not in gone]
    for new, old in enumerate(remaining):
        weights = [
            checkpoint.stored(f"model.layers.{index}.mlp.down_proj.weight")
            for checkpoint, index in ((result, new), (source, old))
        ]
        assert torch.equal(*weights) is (old != gone[0] - 1)
    assert not list((tmp_path / "scratch" / "compensation").rglob("states*"))


def test_identity_block_needs_no_compensation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_decoder(tmp_path / "source", num_hidden_layers=4)
    module = module_of(source)
    with torch.no_grad():
        for layer in (module.model.layers[2].mlp.down_proj, module.model.layers[2].self_attn.o_proj):
            layer.weight.zero_()
    module.save_pretrained(source.folder)
    result, _ = cut_of(Checkpoint(source.folder), tmp_path / "scratch", [2], monkeypatch)
    with torch.no_grad():
        tokens = decoders.some_ids(2, 20)
        torch.testing.assert_close(module_of(result)(tokens).logits, module(tokens).logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(
        result.stored("model.layers.1.mlp.down_proj.weight"), module.model.layers[1].mlp.down_proj.weight
    )
