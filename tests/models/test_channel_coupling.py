"""Tests of channel removal: pruned nets equal unpruned ones with zeroed reading weights, and load again."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import channel_nets
import pytest
import tiny_images
import torch
from torch import nn

from compress.models.channel_coupling import Coupling, find_couplings, masked, remove_channels
from compress.models.model import TorchModel
from compress.models.pruned_layer_sizes import CHANNELS_KEY, layer_sizes, record
from compress.tasks.registry import TASKS
from compress.utils.errors import ModelError, StageError

MAKERS: dict[str, Callable[[], TorchModel]] = {
    "plain": channel_nets.plain,
    "regnet": channel_nets.reg_net,
    "mobilenet": tiny_images.mobile_net,
}
PIXELS = torch.randn(2, 3, tiny_images.SIDE, tiny_images.SIDE, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=MAKERS)
def found(request: pytest.FixtureRequest) -> tuple[TorchModel, list[Coupling]]:
    model = MAKERS[request.param]()
    return model, couplings(model)[0]


def network(model: TorchModel) -> Any:
    return getattr(model.module, "network", model.module)


def couplings(model: TorchModel) -> tuple[list[Coupling], dict[str, str]]:
    return find_couplings(network(model), lambda: model.module(pixel_values=PIXELS).logits)


def logits(model: TorchModel) -> torch.Tensor:
    with torch.no_grad():
        return model.module.eval()(pixel_values=PIXELS).logits


def some_kept(coupling: Coupling, seed: int) -> torch.Tensor:
    """Return a random half, at least one, of the channel indices of each group."""
    order = torch.randperm(coupling.prunable_units, generator=torch.Generator().manual_seed(seed))
    return coupling.channels_at(order[: max(1, coupling.prunable_units // 2)].sort().values)


def silence(net: nn.Module, coupling: Coupling, kept: torch.Tensor) -> None:
    """Zero the weights by which layers read channels that aren't kept, so that those channels have no effect."""
    gone = set(range(coupling.size)) - set(kept.tolist())
    for part in coupling.readers:
        layer: Any = net.get_submodule(part.layer)
        for feature, channel in zip(part.features.tolist(), part.channels.tolist(), strict=True):
            if channel in gone and isinstance(layer, nn.Linear):
                layer.weight.data[:, feature] = 0
            elif channel in gone:
                width, outputs = layer.weight.shape[1], layer.out_channels // layer.groups
                group, index = divmod(feature, width)
                layer.weight.data[group * outputs : (group + 1) * outputs, index] = 0


def test_removed_channels_equal_zeroed_reader_weights(found: tuple[TorchModel, list[Coupling]]) -> None:
    model, sets = found
    every = [(coupling, some_kept(coupling, seed)) for seed, coupling in enumerate(sets) if coupling.prunable_units > 1]
    for cuts in (*([choice] for choice in every[:6]), every):
        expected, smaller = copy.deepcopy(model), copy.deepcopy(model)
        for coupling, kept_channels in cuts:
            silence(network(expected), coupling, kept_channels)
        remove_channels(network(smaller), cuts)
        assert smaller.parameters() < model.parameters()
        torch.testing.assert_close(logits(smaller), logits(expected), rtol=1e-4, atol=1e-4)
        zeros = masked(network(model), cuts, lambda: model.module(pixel_values=PIXELS).logits)
        torch.testing.assert_close(zeros, logits(expected), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits(smaller), logits(model), atol=1e-3), "what went had a say"


def test_coupled_layers_of_the_test_net() -> None:
    sets, whole = couplings(channel_nets.plain())
    layers = {frozenset(part.layer for part in coupling.parts): coupling for coupling in sets}
    stem = {"stem", "stem_norm", "grouped", "expand", "joined_norm", "hidden"}
    wide = {"expand", "depthwise", "depthwise_norm", "squeeze", "excite", "project"}
    narrow = {"project", "slope", "joined_norm", "hidden"}
    expected = (stem, wide, {"squeeze", "excite"}, narrow, {"hidden", "classifier"})
    assert set(layers) == {frozenset(names) for names in expected}
    assert (layers[frozenset(stem)].size, layers[frozenset(stem)].groups) == (16, 4)
    assert layers[frozenset(wide)].size == 24 and not whole
    # The first of two flattened maps has 12 channels of 4 x 4 positions; those of the stem follow.
    hidden = next(part for part in layers[frozenset(stem)].readers if part.layer == "hidden")
    assert hidden.features.min() == 12 * 16 and torch.equal(hidden.channels, (hidden.features - 12 * 16) // 16)


def test_unprunable_channels_report_the_reason() -> None:
    sets, whole = couplings(channel_nets.plain(channel_nets.Stubborn))
    assert [coupling.name for coupling in sets] == ["middle"]
    assert whole["stem"] == "norm (GroupNorm) computes over all of them"
    assert whole["wide"] == "a parameter outside any layer belongs to them"
    assert len(whole) == 3 and "again is called more than once" in whole.values()


def test_pruned_model_is_saved_and_loaded(found: tuple[TorchModel, list[Coupling]], tmp_path: Path) -> None:
    model = copy.deepcopy(found[0])
    for _ in range(2):  # pruned twice in sequence
        original, sets = (
            layer_sizes(network(model)),
            [coupling for coupling in couplings(model)[0] if coupling.prunable_units > 1],
        )
        remove_channels(network(model), [(coupling, some_kept(coupling, 1)) for coupling in sets])
        record(model.module.config, original, network(model))
    model.save(tmp_path)
    again = TorchModel.load(tmp_path, TASKS[tiny_images.TASK])
    assert layer_sizes(network(again)) == layer_sizes(network(model)) and again.parameters() == model.parameters()
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    shapes = {name: tensor.shape for name, tensor in again.module.state_dict().items()}
    assert sum(math.prod(shape) for shape in shapes.values()) == sum(t.numel() for t in model.tensors().values())


SIZES = {"in_channels": 8, "out_channels": 24, "groups": 1}


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        ([1], "is no table of layers"),
        ({"stem.7": SIZES}, "names the layer 'stem.7', which this network lacks"),
        ({"expand": {"out_channels": 8}}, "other sizes than in_channels, out_channels, groups"),
        ({"expand": {**SIZES, "out_channels": 0}}, "gives expand out_channels 0, of 24 at most"),
        ({"expand": {**SIZES, "out_channels": 25}}, "gives expand out_channels 25, of 24 at most"),
        ({"expand": {**SIZES, "in_channels": "8"}}, "gives expand in_channels '8'"),
        ({"grouped": {"in_channels": 6, "out_channels": 8, "groups": 4}}, "4 groups, which don't divide"),
        ({"expand": SIZES}, "The weights are not those of the module"),
    ],
)
def test_mismatched_pruning_record_is_refused(recorded: Any, message: str, tmp_path: Path) -> None:
    model = channel_nets.plain()
    setattr(model.module.config, CHANNELS_KEY, recorded)
    model.save(tmp_path)
    with pytest.raises(ModelError, match=message):
        TorchModel.load(tmp_path, TASKS[tiny_images.TASK])


def test_untraceable_network_is_refused() -> None:
    def fails() -> torch.Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("no gradients here")
        return torch.zeros(2, 2)

    with pytest.raises(StageError, match="cannot be traced: no gradients here"):
        find_couplings(nn.Sequential(nn.Conv2d(3, 4, 1)), fails)
