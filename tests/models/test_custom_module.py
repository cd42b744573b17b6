"""Tests of custom torch modules: built only by code named in the recipe, saved as safetensors, exported to ONNX."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tiny_images
import tiny_places
import torch
from torch import nn

from compress.data.dataset import Dataset
from compress.formats.onnx.export import export_onnx, verify_parity
from compress.formats.onnx.int8.observers import open_session
from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel
from compress.models import config_checks
from compress.models.model import TorchModel
from compress.sources.build_model import ModelOrigin
from compress.stages.onnx_int8.stage import OnnxInt8
from compress.tasks.image_classification import TASK
from compress.tasks.registry import TASKS
from compress.utils.errors import ModelError
from compress.utils.progress import SilentProgress

CODE = """
from torch import nn

def build(classes=2, width=4):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, classes),
    )

number = 3
"""


@pytest.fixture(autouse=True)
def nothing_allowed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(config_checks, "_allowed", {})
    yield


@pytest.fixture
def network() -> nn.Module:
    """Return the module of `CODE` with non-default batch norm statistics."""
    torch.manual_seed(1)
    space: dict[str, Any] = {}
    exec(CODE, space)
    folder_made: nn.Module = space["build"](width=6)
    with torch.no_grad():
        folder_made(torch.randn(8, 3, 16, 16))
    return folder_made.eval()


@pytest.fixture
def folder(tmp_path: Path, network: nn.Module) -> Path:
    """Write a recipe's folder: `net.py`, and in `weights` a state dict and a processor."""
    (tmp_path / "net.py").write_text(CODE)
    (tmp_path / "weights").mkdir()
    torch.save(network.state_dict(), tmp_path / "weights/net.pth")
    tiny_images.processor().save_pretrained(tmp_path / "weights")
    return tmp_path


def make(folder: Path, **changes: Any) -> Path:
    given = {"module": "net.py:build", "random_weights": False, "seed": 0, "arguments": {"width": 6}, **changes}
    return ModelOrigin(recipe_folder=folder, **given).make(folder / "weights", folder / "cache", SilentProgress())


def test_state_dict_becomes_a_folder_with_equal_predictions(folder: Path, network: nn.Module, tmp_path: Path) -> None:
    folder_made = make(folder)
    assert make(folder) == folder_made, "made once"
    config = json.loads((folder_made / "config.json").read_text())
    assert config["compress_module"]["module"] == "net.py:build"
    stored = safetensors.torch.load_file(folder_made / "model.safetensors")
    assert stored.keys() == network.state_dict().keys(), "the module's own names"
    model = TASK.load(folder_made, tiny_images.LABELS, trust_remote_code=False)
    assert model.labels() == tiny_images.LABELS
    pixels = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.module(pixel_values=pixels).logits, network(pixels), rtol=0, atol=0)

    (tmp_path / "saved").mkdir()
    model.save(tmp_path / "saved")
    again = TorchModel.load(tmp_path / "saved", TASKS[tiny_images.TASK])
    assert again.labels() == tiny_images.LABELS
    with torch.no_grad():
        torch.testing.assert_close(again.module(pixel_values=pixels).logits, network(pixels), rtol=0, atol=0)


def test_onnx_export_maps_pixel_values_to_logits(folder: Path) -> None:
    model = TASK.load(make(folder), tiny_images.LABELS, trust_remote_code=False)
    examples = TASK.encode(tiny_images.table(10), model.processor, None, 128)
    graph = export_onnx(model, examples, None, fusions=True).graph
    assert [entry.name for entry in graph.graph.input] == ["pixel_values"]
    assert [entry.name for entry in graph.graph.output] == ["logits"]
    assert verify_parity(graph, model, examples, 1e-3) < 1e-5
    assert {"config.json", "preprocessor_config.json"} <= model.companions().keys()


def test_only_code_named_in_the_recipe_is_run(folder: Path) -> None:
    folder_made = make(folder)
    config_checks._allowed.clear()
    with pytest.raises(ModelError, match=r"asks for the code 'net\.py:build', which no recipe that you named gives"):
        TASK.load(folder_made, None, trust_remote_code=False)
    # A foreign folder can't have other code run by naming it.
    make(folder)
    config = json.loads((folder_made / "config.json").read_text())
    config["compress_module"] = {"module": "os:mkdir", "arguments": {"path": str(folder / "broken in")}}
    (folder_made / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="'os:mkdir', which no recipe that you named gives"):
        TASK.load(folder_made, None, trust_remote_code=False)
    assert not (folder / "broken in").exists()
    # Nor can it have the recipe's code run with arguments of its own.
    config["compress_module"] = {"module": "net.py:build", "arguments": {"width": 6, "classes": 10**9}}
    (folder_made / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="asks for other arguments of the code 'net"):
        TASK.load(folder_made, None, trust_remote_code=False)


def test_callables_that_build_no_module_are_not_called(folder: Path) -> None:
    command = {"args": f"touch {folder / 'broken in'}", "shell": True}
    for reference, arguments in [
        ("subprocess:check_output", command),
        ("os:mkdir", {"path": str(folder / "broken in")}),
    ]:
        with pytest.raises(ModelError, match="is not known to build a torch module"):
            make(folder, module=reference, arguments=arguments)
    assert not (folder / "broken in").exists()


def test_weights_that_would_run_code_are_refused(folder: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (folder / "broken in",))

    torch.save({"0.weight": Harm()}, folder / "weights/net.pth")
    with pytest.raises(ModelError, match="cannot be read as weights"):
        make(folder)
    assert not (folder / "broken in").exists()
    assert not list((folder / "cache").glob("made-*")), "nothing half-written"


def test_cache_key_depends_on_code_arguments_and_weights(folder: Path) -> None:
    folder_made = {make(folder)}
    (folder / "net.py").write_text(CODE + "\n")
    folder_made.add(make(folder))
    folder_made.add(make(folder, random_weights=True))
    folder_made.add(make(folder, random_weights=True, seed=1))
    state = torch.load(folder / "weights/net.pth", weights_only=True)
    torch.save({name: value + 1 for name, value in state.items()}, folder / "weights/net.pth")
    folder_made.add(make(folder))
    assert len(folder_made) == 5


def test_random_weights_follow_the_seed(folder: Path) -> None:
    def weights(place: Path) -> np.ndarray:
        return safetensors.torch.load_file(place / "model.safetensors")["0.weight"].numpy()

    first, second = make(folder, random_weights=True), make(folder, random_weights=True, seed=1)
    again = ModelOrigin("net.py:build", True, 0, folder, {"width": 6}).make(
        folder / "weights", folder / "elsewhere", SilentProgress()
    )
    np.testing.assert_array_equal(weights(first), weights(again))
    assert np.abs(weights(first) - weights(second)).max() > 0


def test_transformers_model_is_built_from_its_config(tmp_path: Path) -> None:
    model = tiny_images.vit()
    model.module.config.save_pretrained(tmp_path / "vit")
    model.processor.save_pretrained(tmp_path / "vit")
    folder_made = ModelOrigin(None, True, 0, tmp_path).make(tmp_path / "vit", tmp_path / "cache", SilentProgress())
    loaded = TASK.load(folder_made, ("a", "b", "c"), trust_remote_code=False)
    assert loaded.labels() == ("a", "b", "c")
    assert loaded.module.config.hidden_size == model.module.config.hidden_size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"module": "gone.py:build"}, "There is no file 'gone.py' beside the recipe"),
        ({"module": "net.py:bild"}, "net.py:bild cannot be imported"),
        ({"module": "no_such_package.net:build"}, "no_such_package.net:build cannot be imported"),
        ({"module": "net.py:number"}, "fails: 'int' object is not callable"),
        ({"module": "net.py:nn.ModuleList.__len__", "arguments": {}}, "missing 1 required positional argument"),
        ({"arguments": {"depth": 3}}, "unexpected keyword argument 'depth'"),
        ({"arguments": {"width": 5}}, "The weights are not those of the module"),
    ],
)
def test_errors_name_their_cause(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make(folder, **changes)
    assert not list((folder / "cache").glob("made-*"))


def test_two_weight_files_are_refused(folder: Path) -> None:
    (folder / "weights/more.pt").write_bytes((folder / "weights/net.pth").read_bytes())
    with pytest.raises(ModelError, match="holds 2 files of weights"):
        make(folder)
    graph_of_kind = ModelOrigin("net.py:build", False, 0, folder, {"width": 6})
    assert graph_of_kind.make(folder / "weights/net.pth", folder / "cache", SilentProgress()).is_dir(), (
        "the file may be named"
    )


def test_missing_processor_is_reported(folder: Path) -> None:
    (folder / "weights/preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match="The folder has no preprocessing config"):
        make(folder)


PLACES = """
import torch
from torch import nn

class Embed(nn.Module):
    def __init__(self, pooled=True):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3))
        self.pooled = pooled

    def forward(self, pixels):
        found = self.net(pixels)
        return found.mean((2, 3)) if self.pooled else found

class Segment(nn.Module):
    def __init__(self, classes=3, named=False):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 16, 4, stride=4), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.head, self.named = nn.Conv2d(16, classes, 1), named

    def forward(self, pixels):
        found = self.head(self.net(pixels))
        return {"out": found} if self.named else found

class Detect(nn.Module):
    def __init__(self, classes=2, queries=4, named=False):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 16, 8, stride=8), nn.ReLU(), nn.Flatten(), nn.Linear(256, 64), nn.ReLU())
        self.kinds, self.places = nn.Linear(64, queries * (classes + 1)), nn.Linear(64, queries * 4)
        self.queries, self.named = queries, named

    def forward(self, pixels):
        found = self.net(pixels)
        kinds = self.kinds(found).unflatten(1, (self.queries, -1))
        places = self.places(found).unflatten(1, (self.queries, -1)).sigmoid()
        return {"pred_logits": kinds, "pred_boxes": places} if self.named else (kinds, places)
"""
PREPARED = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_pad": False, "size": {"height": 32, "width": 32}}
NETWORKS: dict[str, tuple[str, str]] = {
    "image-feature-extraction": ("Embed", "ViTImageProcessor"),
    "image-segmentation": ("Segment", "SegformerImageProcessor"),
    "object-detection": ("Detect", "YolosImageProcessor"),
}


def made_for(task: str, folder: Path, **arguments: Any) -> TorchModel:
    """Return a module of `PLACES` with random weights, loaded for ``task``."""
    name, processor = NETWORKS[task]
    (folder / "weights").mkdir(exist_ok=True)
    (folder / "nets.py").write_text(PLACES)
    content = json.dumps({"image_processor_type": processor, **PREPARED})
    (folder / "weights/preprocessor_config.json").write_text(content)
    origin = ModelOrigin(f"nets.py:{name}", True, 0, folder, arguments)
    folder_made = origin.make(folder / "weights", folder / "cache", SilentProgress())
    labels = {"image-segmentation": tiny_places.LABELS, "object-detection": tiny_places.LABELS[1:]}.get(task)
    return TASKS[task].load(folder_made, labels, trust_remote_code=False)


def rows(task: str) -> Any:
    return (
        tiny_images.table(8) if task == "image-feature-extraction" else tiny_places.table(task, tiny_places.scenes(8))
    )


@pytest.mark.parametrize("task", NETWORKS)
def test_modules_of_other_tasks_are_exported_and_quantized(task: str, tmp_path: Path) -> None:
    model, known = made_for(task, tmp_path), TASKS[task]
    labels = None if task == "image-feature-extraction" else model.labels()
    examples = known.encode(rows(task), model.processor, labels, 128)
    graph = export_onnx(model, examples, None, fusions=True).graph
    assert {entry.name for entry in graph.graph.output} == set(examples.outputs)
    assert verify_parity(graph, model, examples, 1e-3) < 1e-4
    data = Dataset(known.columns, {"train": rows(task)}, labels)
    context = dataclasses.replace(tiny_images.context(), task=known, data=data)
    int8 = OnnxInt8(method="static").run(OnnxModel(graph, FLOAT_GRAPH, model.companions()), context).graph
    assert int8.ByteSize() < 0.7 * graph.ByteSize()
    pixels = {"pixel_values": np.stack([examples.inputs[row]["pixel_values"] for row in range(8)])}
    for expected, outputs in zip(
        *(open_session(graph_of_kind).run(None, pixels) for graph_of_kind in (graph, int8)), strict=True
    ):
        assert np.sqrt(np.square(outputs - expected).mean()) < 0.1 * expected.std()


def test_a_segmenters_loss_is_that_of_segformer(tmp_path: Path) -> None:
    model, theirs = made_for("image-segmentation", tmp_path), tiny_places.segformer()[0]
    named = made_for("image-segmentation", tmp_path, named=True)
    known = TASKS["image-segmentation"]
    examples = known.encode(rows("image-segmentation"), model.processor, tiny_places.LABELS, 128)
    labels = torch.from_numpy(examples.labels).long()
    pixels = torch.from_numpy(np.stack([examples.inputs[row]["pixel_values"] for row in range(8)]))
    outputs = model.module(pixel_values=pixels, labels=labels)
    torch.testing.assert_close(named.module(pixel_values=pixels).logits, outputs.logits, rtol=0, atol=0)
    theirs.decode_head.forward = lambda states, **_: outputs.logits
    torch.testing.assert_close(known.loss(outputs, labels), theirs(pixel_values=pixels, labels=labels).loss)


def test_a_detectors_loss_is_that_of_detr(tmp_path: Path) -> None:
    model, known = made_for("object-detection", tmp_path, queries=5), TASKS["object-detection"]
    named = made_for("object-detection", tmp_path, queries=5, named=True)
    theirs = tiny_places.detr()[0]
    examples = known.encode(rows("object-detection"), model.processor, tiny_places.LABELS[1:], 128)
    targets = known.targets(torch.from_numpy(examples.labels))["labels"]
    pixels = torch.from_numpy(np.stack([examples.inputs[row]["pixel_values"] for row in range(8)]))
    outputs = model.module(pixel_values=pixels, labels=targets)
    torch.testing.assert_close(named.module(pixel_values=pixels).pred_boxes, outputs.pred_boxes, rtol=0, atol=0)
    expected, *_ = theirs.loss_function(outputs.logits, targets, theirs.device, outputs.pred_boxes, theirs.config)
    torch.testing.assert_close(outputs.loss, expected)
    outputs.loss.backward()
    assert model.module.network.places.weight.grad.abs().sum() > 0


def test_feature_map_is_averaged(tmp_path: Path) -> None:
    model = made_for("image-feature-extraction", tmp_path)
    mapped = made_for("image-feature-extraction", tmp_path, pooled=False)
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(
        mapped.module(pixel_values=pixels).pooler_output, model.module(pixel_values=pixels).pooler_output
    )


@pytest.mark.parametrize(
    ("task", "other", "says"),
    [
        ("image-segmentation", "Detect", "gives a tuple that is no map of classes"),
        ("object-detection", "Segment", "gives a Tensor that has no classes and boxes"),
        ("image-feature-extraction", "Detect", "gives a tuple that is no embedding"),
    ],
)
def test_outputs_of_another_task_are_refused(
    task: str, other: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NETWORKS, task, (other, NETWORKS[task][1]))
    model = made_for(task, tmp_path)
    with pytest.raises(ModelError, match=says):
        model.module(pixel_values=torch.randn(1, 3, 32, 32))
