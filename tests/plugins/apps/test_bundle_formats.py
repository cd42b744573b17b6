"""Tests of LiteRT, ExecuTorch and Core ML bundles: outputs and interfaces against torch and each runtime's package."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from toy_bundles import RECIPE, changed_json, reseal, set_field, wanted_of
from typer.testing import CliRunner

from compress.cli import app
from compress.formats.coreml.stage import CoreMl
from compress.formats.litert.stage import LiteRt
from compress.models.model import TorchModel
from compress.plugins.apps.build import Bundle, build
from compress.plugins.apps.verify import verify
from compress.utils.errors import BundleError, InputError
from compress.utils.progress import SilentProgress

pytestmark = pytest.mark.slow

# Only located, not imported: an import would take seconds in every worker that collects tests.
if not all(map(find_spec, ("litert_torch", "executorch", "coremltools"))):
    pytest.skip("a package of these formats is not there", allow_module_level=True)
LENGTH = 16
PLATFORM = {"litert": "android", "executorch": "ios", "coreml": "ios"}
FORMATS = tuple(PLATFORM)
TEXT = "the film was lovely and its plot clever"


@dataclass(frozen=True)
class Made:
    """A bundle and the torch model from which it was exported."""

    model: TorchModel
    bundle: Bundle

    @property
    def folder(self) -> Path:
        return self.bundle.folder


def bundled(form: str, folder: Path, program: Path | None) -> Made:
    """Bundle a tiny classifier that is exported in fp32 here, or that was exported to the folder ``program``."""
    model, run = tiny.encoder(num_hidden_layers=1), folder / "run"
    run.mkdir()
    if program is None:
        stage = LiteRt(precision="fp32", lengths=[6, LENGTH]) if form == "litert" else CoreMl()
        (run / "model").mkdir()
        stage.run(model, tiny.context(max_length=LENGTH)).save(run / "model")
    else:
        shutil.copytree(program, run / "model")
    (run / "recipe.yaml").write_text(RECIPE)
    return Made(model, build(wanted_of(run, PLATFORM[form]), folder / "bundle", SilentProgress()))


@pytest.fixture(scope="module")
def all_made(tmp_path_factory: pytest.TempPathFactory, executorch_program: Path) -> dict[str, Made]:
    """Return a dictionary that builds the bundle of each format on first access."""

    class Makes(dict[str, Made]):
        def __missing__(self, form: str) -> Made:
            program = executorch_program if form == "executorch" else None
            return self.setdefault(form, bundled(form, tmp_path_factory.mktemp(form), program))

    return Makes()


@pytest.fixture(params=FORMATS)
def made(request: pytest.FixtureRequest, all_made: dict[str, Made]) -> Made:
    """Return the bundle of one format, which tests must not modify."""
    return all_made[request.param]


def copy_of(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.folder, tmp_path / "copy"))


def shares(logits: torch.Tensor) -> dict[str, float]:
    return dict(zip(tiny.LABELS, logits.softmax(-1).tolist(), strict=True))


def example(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the globals of `run.py`, executed in this process because importing its packages takes seconds."""
    monkeypatch.syspath_prepend(folder / "examples")
    monkeypatch.delitem(sys.modules, "model", raising=False)
    return runpy.run_path(str(folder / "examples" / "run.py"))


def test_self_test_records_outputs_of_the_bundle_runtime(made: Made) -> None:
    form = made.bundle.manifest.format
    test = json.loads((made.folder / "selftest.json").read_text())
    if form == "coreml":
        assert not {"made_with", "tolerance"} & test.keys()
        assert "macOS only" in test["unmeasured"]
        assert all("logits" not in case and case["input_ids"] for case in test["cases"])
        card = (made.folder / "README.md").read_text()
        assert "an iOS app, run by Core ML" in card and "no scores: Core ML runs on macOS only" in card
        return
    assert test["made_with"].startswith(f"{form} ") and "unmeasured" not in test
    for case in test["cases"]:
        logits = made.model.module(input_ids=torch.tensor([case["input_ids"]])).logits[0]
        np.testing.assert_allclose(case["logits"], logits.detach(), atol=1e-4)


@pytest.mark.parametrize("form", ["litert", "executorch"])
def test_example_predictions_equal_torch(all_made: dict[str, Made], form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = all_made[form]
    answers = example(bundle.folder, monkeypatch)
    for text in (TEXT, "plot", "the " * 40):
        ids = bundle.model.processor(text, truncation=True, max_length=LENGTH, return_tensors="pt")["input_ids"]
        expected = shares(bundle.model.module(input_ids=ids).logits[0])
        assert dict(answers["Classifier"]().classify(text)) == pytest.approx(expected, abs=1e-4)
    assert answers["selftest"](answers["Classifier"]()) < 1e-5


def test_example_uses_the_shortest_graph_that_fits(all_made: dict[str, Made], monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = example(all_made["litert"].folder, monkeypatch)["Classifier"]()
    called: list[int] = []

    def watched(length: int, runner: Any) -> Callable[..., Any]:
        return lambda **feed: (called.append(length), runner(**feed))[1]

    classifier.model.runners = [(length, watched(length, runner)) for length, runner in classifier.model.runners]
    for words in (1, 4, 5, 40):  # plus two special tokens
        classifier.classify("the " * words)
    assert called == [6, 6, LENGTH, LENGTH]


def test_core_ml_manifest_equals_package_interface(all_made: dict[str, Made]) -> None:
    from compress.formats.quiet_output import suppress_output

    bundle = all_made["coreml"]
    manifest = bundle.bundle.manifest
    with suppress_output("prints"):
        import coremltools

        spec = coremltools.models.MLModel(str(bundle.folder / manifest.model), skip_model_load=True).get_spec()
    verify(bundle.folder)  # would fail if opening the package changed one of its files
    assert (spec.specificationVersion, manifest.runtime.minimum_version) == (9, "18.0")
    assert [entry.name for entry in manifest.inputs] == [feature.name for feature in spec.description.input]
    for entry, feature in zip(manifest.inputs, spec.description.input, strict=True):
        ranges = feature.type.multiArrayType.shapeRange.sizeRanges
        assert entry.shape == (1, "sequence_length") and entry.dtype == "int32"
        least, most = ranges[1].lowerBound, ranges[1].upperBound
        assert (manifest.axes["sequence_length"].least, manifest.axes["sequence_length"].most) == (least, most)
    assert [(entry.name, entry.dtype, entry.shape) for entry in manifest.outputs] == [("logits", "float16", (1, 2))]


def test_intact_bundle_passes_and_names_untested_outputs(made: Made) -> None:
    for path in (made.folder, made.bundle.archive):
        verdict = verify(path)
        assert (verdict.cases, verdict.unread) == (10, None)
        if made.bundle.manifest.format == "coreml":
            assert verdict.worst is None and verdict.unanswered == "Core ML runs on macOS only"
        else:
            assert verdict.worst is not None and verdict.worst < 0.1 and verdict.unanswered is None


@pytest.mark.parametrize("form", ["litert", "executorch"])
def test_other_weights_fail_the_self_test(all_made: dict[str, Made], form: str, tmp_path: Path) -> None:
    bundle = all_made[form]
    folder = copy_of(bundle, tmp_path)
    file = folder / bundle.bundle.manifest.model
    weights = bundle.model.module.classifier.weight.detach().numpy().tobytes()
    content = file.read_bytes()
    assert content.count(weights) == 1
    file.write_bytes(content.replace(weights, (-2 * np.frombuffer(weights, np.float32)).tobytes()))
    reseal(folder)
    with pytest.raises(BundleError, match="The self-test fails at case 1"):
        verify(folder)


@pytest.mark.parametrize(
    ("form", "change", "expected"),
    [
        ("litert", set_field("axes.sequence_length.most", 32), r"says axes .*most=32"),
        ("litert", set_field("signatures.0.length", 7), r"says signatures .*length=7"),
        ("litert", set_field("format", "onnx"), "says the format onnx"),
        ("executorch", set_field("axes.batch_size.most", 9), r"says axes .*most=9"),
        ("executorch", set_field("inputs.0.shape.0", 1), r"says inputs input_ids int64 \[1, 'sequence_length'\]"),
        ("coreml", set_field("axes.sequence_length.least", 1), r"says axes .*least=1"),
        ("coreml", set_field("inputs.0.dtype", "int64"), "says inputs input_ids int64"),
        ("coreml", set_field("preprocessing.suffix_ids", []), "self-test fails at case 1, .*: ids"),
        ("coreml", set_field("model", "model/other.mlpackage"), "does not list: model/other.mlpackage"),
    ],
)
def test_false_manifest_is_detected(
    all_made: dict[str, Made], form: str, change: Callable[[dict[str, Any]], None], expected: str, tmp_path: Path
) -> None:
    folder = copy_of(all_made[form], tmp_path)
    reseal(folder, change)
    with pytest.raises(BundleError, match=expected):
        verify(folder)


@pytest.mark.parametrize("form", ["litert", "executorch"])
def test_verification_without_the_runtime(
    all_made: dict[str, Made], form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(all_made[form], tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["bundle-verify", str(folder)])
    assert done.exit_code == 0, done.output
    assert f"pip install 'compress-models[{form}]'" in done.stdout
    assert "10 texts are prepared as they should be; their scores could not be compared" in done.stdout
    assert "the manifest could not be compared with the model" in done.stdout
    run = all_made[form].folder.parent / "run"
    with pytest.raises(InputError, match=rf"(?s)cannot be bundled here.*compress-models\[{form}\]"):
        build(wanted_of(run, PLATFORM[form]), tmp_path / "none", SilentProgress())
    with changed_json(folder / "selftest.json") as test:
        test["cases"][2]["input_ids"][1] += 1
    reseal(folder)
    with pytest.raises(BundleError, match="self-test fails at case 3"):
        verify(folder)


def test_target_without_support_for_the_format_is_refused(all_made: dict[str, Made], tmp_path: Path) -> None:
    run = all_made["coreml"].folder.parent / "run"
    with pytest.raises(InputError, match=r"(?s)for android cannot hold .* in the format coreml.*litert or executorch"):
        build(wanted_of(run, "android"), tmp_path / "none", SilentProgress())
    with pytest.raises(InputError, match=r"biggest, compressed: model/model.mlpackage/"):
        build(wanted_of(run, "ios", most_bytes=1000), tmp_path / "none", SilentProgress())
    assert list(tmp_path.iterdir()) == []


def test_model_exported_for_the_target_is_bundled(all_made: dict[str, Made], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(all_made["executorch"].folder.parent / "run", run)
    shutil.copytree(all_made["litert"].folder.parent / "run" / "model", run / "targets" / "android")
    (run / "targets" / "desktop").mkdir()
    (run / "targets" / "desktop" / "model.xml").write_text("an OpenVINO file, which no bundle takes")
    for artifact, target, form in (
        (run, "android", "litert"),
        (run, "linux-arm64", "executorch"),
        (run, "desktop", "executorch"),
        (run / "targets" / "android", "linux-arm64", "litert"),
    ):
        output = tmp_path / f"{artifact.name}-{target}"
        done = CliRunner().invoke(app, ["bundle", str(artifact), "--target", target, "-o", str(output), "--json"])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["format"] == form
