"""Tests of channel pruning: which and how many channels go; pruned models save, train, export and quantize."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import channel_nets
import pytest
import tiny_images
import torch
import yaml
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from compress.data.dataset import Dataset
from compress.models.model import TorchModel
from compress.models.pruned_layer_sizes import CHANNELS_KEY
from compress.models.structure import blocks
from compress.models.transformer_pruning import HEADS_KEY
from compress.pipeline.integrity import IntegrityCheck, ModelSize, PredictionProbe, inspector_of
from compress.recipe.loading import read_recipe
from compress.stages.base import Context
from compress.stages.distill.stage import Distill
from compress.stages.finetune import Finetune
from compress.stages.prune.stage import Prune
from compress.stages.sparsify.stages import SparsifyGradually
from compress.tasks.registry import TASKS
from compress.utils.errors import RecipeError, StageError

DATA = tiny_images.dataset(24)
QUICK: dict[str, Any] = {"epochs": 20, "batch_size": 24, "learning_rate": 3e-3, "precision": "fp32"}
PIXELS = torch.randn(2, 3, tiny_images.SIDE, tiny_images.SIDE, generator=torch.Generator().manual_seed(3))


def prune(model: TorchModel, context: Context | None = None, **parameters: Any) -> TorchModel:
    return Prune(**parameters).run(model, context or tiny_images.context(DATA))


def flops(model: TorchModel) -> int:
    """Return the FLOPs for one image by torch's own counter."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.module(pixel_values=PIXELS[:1])
    return counter.get_total_flops()


def test_channels_without_readers_are_removed_first() -> None:
    model = channel_nets.plain()
    net: Any = model.module.network
    with torch.no_grad():
        net.hidden.weight[:, : 12 * 16].view(20, 12, 16)[:, [1, 2, 5, 7, 10, 11]] = 0
        net.project.weight[:, 8:16] = 0
        net.squeeze.weight[:, 8:16] = 0
    original = copy.deepcopy(net)
    prune(model, channels=0.5, channel_multiple=2)
    assert torch.equal(net.slope.weight, original.slope.weight[[0, 3, 4, 6, 8, 9]])
    assert net.depthwise.groups == net.depthwise.in_channels == len(net.depthwise.weight) == 12
    gone = set(original.depthwise_norm.running_mean.tolist()) - set(net.depthwise_norm.running_mean.tolist())
    assert set(original.depthwise_norm.running_mean[8:16].tolist()) < gone


def test_channels_with_zero_activation_are_removed_first() -> None:
    silent, model = [0, 3, 8, 9], channel_nets.plain()
    net: Any = model.module.network
    with torch.no_grad():
        net.project.weight[silent] = 0
        net.project.bias[silent] = 0
        net.joined_norm.running_mean[silent] = 0
        net.joined_norm.bias[silent] = 0
        net.hidden.weight[:, : 12 * 16].view(20, 12, 16)[:, silent] *= 50
    prune(model, channels=0.34, channel_multiple=4)
    assert net.project.weight.abs().sum((1, 2, 3)).min().item() > 0


@pytest.mark.parametrize(
    ("share", "multiple", "kept"),
    # Coupled sets of 16 (in 4 groups), 24, 8, 12 and 20 channels keep the nearest multiple.
    [(0.5, 1, (8, 12, 4, 6, 10)), (0.5, 8, (8, 16, 8, 8, 8)), (0.3, 4, (12, 16, 4, 8, 16)), (0.8, 1, (4, 5, 2, 2, 4))],
)
def test_each_layer_keeps_a_multiple_of_channels(share: float, multiple: int, kept: tuple[int, ...]) -> None:
    net: Any = prune(channel_nets.plain(), channels=share, channel_multiple=multiple).module.network
    sizes = (net.stem.out_channels, net.expand.out_channels, net.squeeze.out_channels, net.project.out_channels)
    assert (*sizes, net.hidden.out_features) == kept
    assert net.grouped.groups == 4 and net.hidden.in_features == (kept[0] + kept[3]) * 16


MAKERS: dict[str, Callable[[], TorchModel]] = {"plain": channel_nets.plain, "regnet": channel_nets.reg_net}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("figure", ["flops", "parameters"])
def test_global_flops_or_parameter_share_is_reached(name: str, figure: str) -> None:
    model = MAKERS[name]()
    count: Callable[[TorchModel], int] = flops if figure == "flops" else TorchModel.parameters
    count_before, context = count(model), tiny_images.context(DATA)
    prune(model, context, channel_multiple=2, **{figure: 0.5})
    # Whole multiples of channels may remove at most one step more than needed.
    assert 0.35 * count_before < count(model) <= 0.5 * count_before
    match = re.search(
        r"([\d,]+) -> ([\d,]+) multiplications an image, ([\d,]+) -> ([\d,]+) parameters", context.notes[0]
    )
    numbers = [int(number.replace(",", "")) for number in match.groups()]
    assert 2 * numbers[1] == flops(model) and numbers[3] == model.parameters()


def test_pruned_model_keeps_the_stage_contract(tmp_path: Path) -> None:
    model, context = channel_nets.plain(), tiny_images.context(DATA)
    digests_before = inspector_of(model).digests()
    stage = Prune(channels=0.5)
    stage.run(model, context)
    model.save(tmp_path)
    probe = PredictionProbe(
        load=lambda folder: TorchModel.load(folder, TASKS[tiny_images.TASK]),
        encode=lambda processor: context.task.encode(context.data.split("test"), processor, None, 24),
    )
    IntegrityCheck("prune", stage.output_spec()).check(model, digests_before, ModelSize(1, 1), tmp_path, probe)
    assert TorchModel.load(tmp_path, TASKS[tiny_images.TASK]).parameters() == model.parameters()


def test_pruned_nets_are_finetuned_and_distilled() -> None:
    teacher = channel_nets.plain()
    student = prune(copy.deepcopy(teacher), channels=0.4, channel_multiple=4)
    context = replace(tiny_images.context(DATA), earlier=lambda label: teacher)

    def distance() -> float:
        with torch.no_grad():
            pair = [
                model.module.eval()(pixel_values=context_pixels(context, model)).logits for model in (teacher, student)
            ]
        return float((pair[0] - pair[1]).square().mean())

    start = distance()
    Distill(teacher="finetune", **QUICK).run(student, context)
    assert distance() < start
    sizes = {name: tensor.shape for name, tensor in student.module.state_dict().items()}
    Finetune(**QUICK).run(student, context)
    assert {name: tensor.shape for name, tensor in student.module.state_dict().items()} == sizes


def context_pixels(context: Context, model: TorchModel) -> torch.Tensor:
    examples = context.encode("train", model)
    return torch.from_numpy(examples.batch(range(len(examples)))["pixel_values"])


def test_model_predictions_replace_missing_labels_for_importance() -> None:
    context = tiny_images.context(DATA)
    rows = {"train": DATA.split("train").drop_columns(["label"])}
    unlabeled = replace(context, data=Dataset(context.task.columns, rows, ()))
    model = prune(channel_nets.plain(), unlabeled, channels=0.5)
    answered = DATA.split("train").set_column(1, "label", [own_answers(channel_nets.plain(), context)])
    labeled = replace(context, data=Dataset(context.task.columns, {"train": answered}, tiny_images.LABELS))
    again = prune(channel_nets.plain(), labeled, channels=0.5)
    assert all(
        torch.equal(tensor, other)
        for tensor, other in zip(model.tensors().values(), again.tensors().values(), strict=True)
    )


def own_answers(model: TorchModel, context: Context) -> list[str]:
    with torch.no_grad():
        chosen = model.module(pixel_values=context_pixels(context, model)).logits.argmax(-1)
    return [tiny_images.LABELS[index] for index in chosen.tolist()]


def test_heads_neurons_and_layers_of_a_vit(tmp_path: Path) -> None:
    model = tiny_images.vit(num_hidden_layers=3, num_attention_heads=4)
    with torch.no_grad():
        for block, head in zip(blocks(model.module), (2, 0, 3), strict=True):
            block.require_attention().output.weight[:, head * 8 : head * 8 + 8] = 0
            block.require_feed_forward().output.weight[:, 10:22] = 0
        layer = model.module.vit.layers[1]
        for part in (layer.attention.o_proj, layer.mlp.fc2):
            torch.nn.init.zeros_(part.weight)
            torch.nn.init.zeros_(part.bias)
    expected = logits(model)
    prune(model, heads=0.25, feed_forward=0.25, layers=1)
    config = model.module.config
    assert (config.num_hidden_layers, config.intermediate_size, getattr(config, HEADS_KEY)) == (2, 36, [3, 3])
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.save(tmp_path)
    torch.testing.assert_close(
        logits(TorchModel.load(tmp_path, TASKS[tiny_images.TASK])), logits(model), rtol=0, atol=0
    )


def logits(model: TorchModel) -> torch.Tensor:
    with torch.no_grad():
        return model.module.eval()(pixel_values=PIXELS).logits


def test_vit_channels_are_feed_forward_neurons() -> None:
    model, context = tiny_images.vit(), tiny_images.context(DATA)
    prune(model, context, channels=0.5)
    layers = model.module.vit.layers
    assert [layer.mlp.fc1.out_features for layer in layers] == [24, 24]
    assert [layer.attention.q_proj.out_features for layer in layers] == [32, 32]
    assert set(getattr(model.module.config, CHANNELS_KEY)) == {
        f"vit.layers.{i}.mlp.fc{j}" for i in (0, 1) for j in (1, 2)
    }
    assert "removing its channels changed the others" in context.notes[1]
    with pytest.raises(StageError, match="Layers cannot be removed after channels have been pruned"):
        prune(model, layers=1)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"channels": 0.99, "channel_multiple": 1}, r"Removing 99% of the \d+ channels of \w+ leaves none"),
        (
            {"channels": 0.5, "channel_multiple": 64},
            "wide enough to lose channels by multiples of 64: the widest, excite",
        ),
        ({"channels": 0.05, "channel_multiple": 8}, "By multiples of 8, no channel goes"),
        ({"flops": 0.97}, r"Cutting channels can remove \d\d\.\d% of the multiplications, and not 97\.0%"),
        ({"parameters": 0.999}, r"Cutting channels can remove \d\d\.\d% of the parameters, and not 99\.9%"),
    ],
)
def test_impossible_pruning_is_refused(parameters: dict[str, Any], message: str) -> None:
    model = channel_nets.plain()
    parameters_before = model.parameters()
    with pytest.raises(StageError, match=message):
        prune(model, **parameters)
    assert model.parameters() == parameters_before and not hasattr(model.module.config, CHANNELS_KEY)


def test_net_without_prunable_channels_is_refused() -> None:
    class Fixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.classifier = (
                torch.nn.Conv2d(3, 8, 2),
                torch.nn.GroupNorm(1, 8),
                torch.nn.Linear(8, 2),
            )

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.classifier(self.norm(self.stem(pixels)).mean((2, 3)))

    model = channel_nets.plain()
    model.module.network = Fixed().eval()
    with pytest.raises(StageError, match="No channels of this model can be cut") as caught:
        prune(model, channels=0.5)
    assert "norm (GroupNorm) computes over all of them" in str(caught.value.hint)


@pytest.mark.parametrize(
    "parameters",
    [
        {"channels": 0.5, "flops": 0.5},
        {"flops": 0.5, "parameters": 0.5},
        {"channels": 0.5, "importance_examples": 0},
        {"flops": 1.0},
    ],
)
def test_parameters_that_contradict_each_other_are_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Prune(**parameters)


@pytest.mark.slow
def test_a_pruned_net_is_exported_and_quantized() -> None:
    from compress.formats.onnx.model import OnnxModel
    from compress.formats.onnx.stage import Onnx
    from compress.stages.onnx_int8.stage import OnnxInt8

    context = tiny_images.context(DATA)
    model = prune(channel_nets.plain(), context, flops=0.4)
    exported: OnnxModel = Onnx().run(model, context)
    shapes = {tuple(tensor.dims) for tensor in exported.graph.graph.initializer}
    assert (model.module.network.project.out_channels, model.module.network.expand.out_channels, 1, 1) in shapes
    quantized = OnnxInt8(method="static", embedding_bits=32).run(exported, context)
    integers = [
        tensor for tensor in quantized.graph.graph.initializer if tensor.data_type in (2, 3) and len(tensor.dims) == 4
    ]
    assert len(integers) >= 6, "the convolutions' weights are integers"


@pytest.mark.parametrize(
    ("stage", "without"),
    [
        (Prune(flops=0.5), True),
        (SparsifyGradually(sparsity=0.5), False),
        (Distill(teacher="start"), True),
        (Distill(teacher="start", labels_weight=0.5), False),
        (Finetune(), False),
    ],
)
def test_only_supervised_stages_need_labels(stage: Any, without: bool, tmp_path: Path) -> None:
    assert stage.needs().labels is not without
    data = {"splits": {"train": "sample:objects/train", "test": "sample:imagenet-20/test"}, "without_labels": ["train"]}
    fields = stage.model_dump(exclude_unset=True, exclude={"kind"})
    content = {"name": "r", "task": tiny_images.TASK, "model": "m", "data": data, "stages": [{stage.kind: fields}]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    try:
        read_recipe(tmp_path / "r.yaml")
        problems = ""
    except RecipeError as error:
        problems = str(error)
    assert (f"labels in train, which {stage.kind} trains on" in problems) is not without
