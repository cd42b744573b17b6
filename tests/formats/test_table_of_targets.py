"""The table of targets: what it may hold, and what a target becomes in another format."""

from __future__ import annotations

import pytest

from compress.formats.registry import FORMATS
from compress.formats.target_profile import AppProfile
from compress.formats.targets import PROFILES, find_app_profile, find_profile, in_format
from compress.utils.errors import InputError


def test_every_target_has_a_runtime_for_its_formats_and_every_format_a_target() -> None:
    for profile in PROFILES.values():
        for form in profile.allowed:
            assert in_format(profile, form).target.runtime in FORMATS[form].runtimes, (profile.name, form)
    assert {profile.target.format for profile in PROFILES.values()} == set(FORMATS)


def test_the_first_format_is_the_targets_own() -> None:
    for profile in PROFILES.values():
        assert profile.allowed[0] == profile.target.format
        assert in_format(profile, profile.target.format) is profile


def test_what_a_format_says_of_other_targets_names_ones_that_exist() -> None:
    for form, spec in FORMATS.items():
        assert spec.taken_by.keys() <= PROFILES.keys(), form
        for name, app in spec.taken_by.items():
            assert form in PROFILES[name].allowed
            assert app is None or PROFILES[name].apps[form] == app  # type: ignore[attr-defined]


def test_a_platform_takes_what_the_formats_say() -> None:
    assert find_profile("android").allowed == ("onnx", "ort", "litert", "executorch")
    assert find_profile("desktop").allowed == ("onnx", "ort", "openvino", "litert", "executorch", "gguf")
    assert list(find_app_profile("desktop").apps) == ["onnx", "ort", "litert", "executorch"]
    assert list(find_app_profile("ios").apps) == ["onnx", "ort", "executorch", "coreml"]
    assert (
        find_app_profile("browser").apps["onnx"].languages == ("node",) and len(find_app_profile("browser").apps) == 1
    )
    assert find_profile("cpu").allowed == ("onnx",) and find_profile("node").allowed == ("onnx", "ort")


def test_another_format_brings_its_runtime_and_keeps_the_rest() -> None:
    desktop = find_profile("desktop")
    openvino = in_format(desktop, "openvino")
    assert (openvino.target.runtime, openvino.target.provider) == ("openvino", "CPU")
    assert isinstance(openvino, AppProfile) and openvino.apps["onnx"].package == "PyPI: onnxruntime"
    ort = in_format(desktop, "ort").target
    assert (ort.runtime, ort.provider, ort.format) == ("onnxruntime", "CPUExecutionProvider", "ort")
    browser = in_format(find_profile("browser"), "ort").target
    assert (browser.runtime, browser.provider) == ("onnxruntime-web", "wasm")


def test_a_name_that_is_not_there_gets_the_nearest() -> None:
    with pytest.raises(InputError, match=r"(?s)no target 'andriod'.*one of cpu, .*did you mean 'android'"):
        find_profile("andriod")
    with pytest.raises(InputError, match=r"(?s)no bundles for the target 'cpu'.*one of browser, android, ios"):
        find_app_profile("cpu")
