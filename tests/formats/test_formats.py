"""Tests of the format registry: built-in formats are the folders of compress/formats, and packages register others."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from compress.formats.integrity import missing_references
from compress.formats.quiet_output import Extent, suppress_output
from compress.formats.registry import BUILT_IN, DEFAULT, FORMATS
from compress.formats.runtime import why_unavailable
from compress.formats.spec import FormatSpec, load
from compress.formats.target_profile import AppProfile
from compress.formats.targets import PROFILES, find_app_profile, find_profile, in_format
from compress.stages.kinds import CORE_STAGES
from compress.stages.registry import STAGES
from compress.utils.errors import InputError

ROOT = Path(__file__).parents[2]
LIST = """
from compress.formats.integrity import missing_references
from compress.formats.registry import FORMATS, PLUGGED
from compress.plugins import plugin_problems
from compress.stages.registry import STAGES
print(list(FORMATS), 'onnx' in STAGES)
for form in PLUGGED: print(*missing_references(form), sep='\\n')
for error in plugin_problems(): print(error)
"""
PLUGIN = """
from typing import ClassVar, Literal
from compress.models.model import TorchModel
from compress.formats.spec import FormatSpec, RuntimeSpec
from compress.stages.base import Stage
from compress.formats.target_profile import Target, TargetProfile

class ToyModel:
    kind: ClassVar[str] = "toy"

class ToyStage(Stage[TorchModel, ToyModel]):
    kind: Literal["toy"] = "toy"
    def run(self, model, context):
        return ToyModel()

class NoRun(Stage[TorchModel, ToyModel]):
    kind: Literal["toy"] = "toy"

class Runtime:
    def open(self): ...
    def build(self): ...

RUNTIME = Runtime()

def own(name="toy", runtime="toy"):
    return TargetProfile(Target(name, runtime, "cpu", "", "toy"))

def spec(**changes):
    fields = dict(
        name="toy", suffix=".toy", stage="toy_plugin:ToyStage", written_by="toy", inspector="toy_plugin:ToyModel",
        runtimes={"toy": RuntimeSpec(runtime="toy_plugin:RUNTIME", provider="cpu")},
    )
    return FormatSpec(**{**fields, **changes})
"""
GOOD = "spec()"
CASES = {
    "name": ("spec(name='onnx')", "compress has one of this name built in"),
    "suffix": ("spec(suffix='.pte')", "there is another suffix .pte"),
    "writer": ("spec(written_by='onnx')", "there is another stage onnx"),
    "no_format": ("spec(written_by='distill')", "there is another stage distill"),
    "target": ("spec(targets=(own(name='desktop'),))", "there is another target desktop"),
    "its_target": ("spec(targets=(own(runtime='onnxruntime'),))", "a runtime that it lacks"),
    "run": ("spec(stage='toy_plugin:NoRun')", "its stage toy_plugin:NoRun lacks run"),
    "stage": ("spec(stage='toy_plugin:Runtime')", "its stage toy_plugin:Runtime is no Stage"),
    "missing": ("spec(stage='toy_plugin:Missing')", "toy_plugin has no Missing"),
    "kind": ("spec(written_by='other')", "its stage is of the kind 'toy'; expected 'other'"),
    "model": ("spec(name='other')", "its stage gives a model of the kind 'toy'; expected 'other'"),
    "runtimes": ("spec(runtimes={})", "it has no runtime"),
    "bits": ("spec(own_bits=True)", "its stage lacks the field precision"),
    "source": ("spec(written_from='nothing')", "it is written from 'nothing'"),
    "field": ("spec(flavour='sweet')", "unexpected keyword argument 'flavour'"),
    "z_second": ("spec(name='toy2', suffix='.toy2', written_by='toy')", "there is another stage toy"),
    "object": ("RUNTIME", "it is a Runtime; expected a FormatSpec"),
    "import": ("1 / 0", "ZeroDivisionError: division by zero"),
}
"""What a module of its own registers, and what is said of it. Entry points are read in the order of their names."""


def lines_of(code: str, place: Path, *path: Path) -> list[str]:
    """Return the lines that a fresh process in ``place`` prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=place, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the output with a package `toy-formats` installed that registers a valid format and all of `CASES`."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / "toy_plugin.py").write_text(PLUGIN)
    entries = ["[compress.formats]"]
    for name, value in [("z_first", GOOD), *((name, value) for name, (value, _) in CASES.items())]:
        (folder / f"toy_{name}.py").write_text(f"from toy_plugin import *\nFORMAT = {value}\n")
        entries.append(f"the-{name} = toy_{name}:FORMAT")
    about = folder / "toy_formats-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-formats\nVersion: 1.2\n")
    (about / "entry_points.txt").write_text("\n".join(entries))
    return lines_of(LIST, folder, ROOT, folder)


def test_every_folder_with_a_format_is_registered() -> None:
    modules = (ROOT / "compress" / "formats").glob("*/__init__.py")
    folders = [module.parent.name for module in modules if "FORMAT = " in module.read_text()]
    assert set(BUILT_IN) == set(folders) == set(FORMATS)
    assert DEFAULT == "onnx"


def test_reserved_stage_kinds_are_those_of_the_core() -> None:
    of_formats = {spec.written_by for spec in FORMATS.values()}
    of_core = {kind for kind, stage in STAGES.items() if stage.__module__.startswith("compress.stages.")}
    assert of_core - of_formats == set(CORE_STAGES)


@pytest.mark.parametrize("spec", FORMATS.values(), ids=FORMATS)
def test_references_of_each_format_exist_and_its_stage_writes_it(spec: FormatSpec) -> None:
    assert missing_references(spec.name) == []
    assert {profile.target.format for profile in spec.targets} == {spec.name}
    if spec.stage is None:
        assert spec.written_by is None and spec.name == "safetensors"
        return
    stage = load(spec.stage)
    assert STAGES[spec.written_by] is stage and stage.model_fields["kind"].default == spec.written_by
    assert stage.output_type.kind == spec.name
    assert ("precision" in stage.model_fields) == spec.own_bits
    assert not spec.own_bits or "fp32" in stage.model_fields["precision"].annotation.__args__


def test_removing_a_format_folder_removes_only_that_format(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "compress", tmp_path / "compress", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(tmp_path / "compress" / "formats" / "litert")
    code = f"""
import compress.cli, compress.recipe.loading
from compress.formats.registry import FORMATS
from compress.formats.targets import PROFILES
from compress.stages.registry import STAGES
assert compress.__file__.startswith({str(tmp_path)!r}), compress.__file__
print(list(FORMATS), 'litert' in STAGES, PROFILES['android'].allowed)
"""
    (line,) = lines_of(code, tmp_path, tmp_path)
    assert line == f"{[form for form in FORMATS if form != 'litert']} False ('onnx', 'ort', 'executorch')"


@pytest.mark.parametrize("form", ["coreml", "executorch", "litert", "openvino", "ort"])
def test_nothing_outside_its_folder_imports_a_format(form: str) -> None:
    importing = re.compile(rf"(from|import) compress\.formats\.{form}\b")
    own = {ROOT / "compress" / "formats" / form, ROOT / "compress" / "plugins" / "apps" / "formats"}
    others = [path for path in (ROOT / "compress").rglob("*.py") if not own & {*path.parents}]
    assert [str(path) for path in others if importing.search(path.read_text(encoding="utf-8"))] == []


def test_plugin_format_is_listed_after_built_in_formats(listed: list[str]) -> None:
    first, *faults = listed[:3]
    assert first == f"{[*FORMATS, 'toy']} True"
    assert faults == [
        "its inspector toy_plugin:ToyModel is no ModelInspector",
        "its runtime toy toy_plugin:RUNTIME lacks unavailable",
    ]


@pytest.mark.parametrize("case", CASES)
def test_unusable_plugin_format_is_named_with_its_package(listed: list[str], case: str) -> None:
    name = "onnx" if case == "name" else f"the-{case}"
    begin = f"The format {name!r} of the package toy-formats 1.2 is left out: "
    (message,) = (line for line in listed if line.startswith(begin))
    assert CASES[case][1] in message
    assert len(listed) == 3 + len(CASES)


def test_every_target_has_runtimes_and_every_format_a_target() -> None:
    for profile in PROFILES.values():
        assert profile.allowed[0] == profile.target.format
        assert in_format(profile, profile.target.format) is profile
        for form in profile.allowed:
            assert in_format(profile, form).target.runtime in FORMATS[form].runtimes, (profile.name, form)
    assert {profile.target.format for profile in PROFILES.values()} == set(FORMATS)


def test_targets_named_by_formats_exist() -> None:
    for form, spec in FORMATS.items():
        assert spec.taken_by.keys() <= PROFILES.keys(), form
        for name, app in spec.taken_by.items():
            assert form in PROFILES[name].allowed
            assert app is None or PROFILES[name].apps[form] == app  # type: ignore[attr-defined]


def test_changing_the_format_of_a_target_changes_its_runtime() -> None:
    desktop = find_profile("desktop")
    openvino = in_format(desktop, "openvino")
    assert (openvino.target.runtime, openvino.target.provider) == ("openvino", "CPU")
    assert isinstance(openvino, AppProfile) and openvino.apps["onnx"].package == "PyPI: onnxruntime"
    ort = in_format(desktop, "ort").target
    assert (ort.runtime, ort.provider, ort.format) == ("onnxruntime", "CPUExecutionProvider", "ort")
    browser = in_format(find_profile("browser"), "ort").target
    assert (browser.runtime, browser.provider) == ("onnxruntime-web", "wasm")


def test_unknown_target_name_gets_a_suggestion() -> None:
    with pytest.raises(InputError, match=r"(?s)no target 'andriod'.*one of cpu, .*did you mean 'android'"):
        find_profile("andriod")
    with pytest.raises(InputError, match=r"(?s)no bundles for the target 'cpu'.*one of browser, android, ios"):
        find_app_profile("cpu")


@pytest.mark.parametrize("target", ["executorch", "litert", "openvino"])
def test_a_target_without_its_package_names_the_extra(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert f"compress-models[{target}]" in str(why_unavailable(find_profile(target).target))


PROGRAM = """
import json, sys
from compress.formats.quiet_output import quiet_libraries
quiet_libraries()
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel
AutoModel.from_pretrained, AutoTokenizer.from_pretrained
early = "torchao" in sys.modules
from compress.formats.quiet_output import suppress_output
with suppress_output("logs"):
    from torchao.prototype.safetensors import safetensors_support
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers.quantizers import quantizer_torchao
model = BertModel(BertConfig(
    vocab_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=32
))
quantize_(model, Int8WeightOnlyConfig())
expected = safetensors_support.flatten_tensor_state_dict(model.state_dict())
found = quantizer_torchao.flatten_tensor_state_dict(model.state_dict())
print(json.dumps({
    "early": early,
    "file": getattr(safetensors_support, "__file__", None),
    "names": [sorted(expected[0]), sorted(found[0])],
    "metadata": [expected[1], found[1]],
}))
"""


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.slow
def test_torchao_is_imported_lazily_and_silently_and_still_saves() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    assert not answer["early"], "transformers imported it"
    assert answer["file"], "the stand-in hides the real module"
    assert answer["names"][0] == answer["names"][1]
    assert any("int_data" in name or "qdata" in name for name in answer["names"][1]), "not quantized"
    assert answer["metadata"][0] == answer["metadata"][1]


@pytest.mark.parametrize("extent", ["logs", "prints", "process"])
def test_suppressed_output_is_recorded_and_state_restored(
    extent: Extent, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    level_before = logging.root.manager.disable
    with warnings.catch_warnings(record=True) as caught, contextlib.suppress(ValueError):
        warnings.simplefilter("always")
        with suppress_output(extent) as written:
            logging.getLogger("other").warning("logged")
            logging.getLogger("other").error("an error")
            warnings.warn("warned", stacklevel=1)
            sys.stdout.write("to stdout")
            sys.stderr.write("to stderr")
            os.write(2, b"below Python\n")
            output = written()
            raise ValueError("all is undone after a failure as well")
    assert [log_record.getMessage() for log_record in caplog.records if log_record.name == "other"] == ["an error"]
    printed, errors = capfd.readouterr()
    warnings_kept = extent != "logs"
    assert [str(warning.message) for warning in caught] == ([] if warnings_kept else ["warned"])
    assert ("to stdout" in printed, "to stderr" in errors) == (not warnings_kept, not warnings_kept)
    assert ("to stderr" in output) == warnings_kept
    assert ("below Python" in errors, "below Python" in output) == (extent != "process", extent == "process")
    assert logging.root.manager.disable == level_before
    os.write(2, b"again\n")
    assert capfd.readouterr().err == "again\n"
