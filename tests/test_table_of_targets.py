"""The table of targets: what it may hold, and what a target becomes in another format."""

from __future__ import annotations

import typing

import pytest

from compress.errors import InputError
from compress.formats.model_file import Format
from compress.targets import OPENED_BY, PROFILES, AppProfile, find_app_profile, find_profile


def test_every_format_has_a_runtime_and_every_target_a_runtime_for_its_formats() -> None:
    assert set(OPENED_BY) == set(typing.get_args(Format))
    for profile in PROFILES.values():
        for form in profile.allowed:
            assert profile.in_format(form).target.runtime in OPENED_BY[form], (profile.name, form)


def test_the_first_format_is_the_targets_own() -> None:
    for profile in PROFILES.values():
        assert profile.allowed[0] == profile.target.format
        assert profile.in_format(profile.target.format) is profile


def test_another_format_brings_its_runtime_and_keeps_the_rest() -> None:
    desktop = find_profile("desktop")
    openvino = desktop.in_format("openvino")
    assert (openvino.target.runtime, openvino.target.provider) == ("openvino", "CPU")
    assert isinstance(openvino, AppProfile) and openvino.apps["onnx"].package == "PyPI: onnxruntime"
    ort = desktop.in_format("ort").target
    assert (ort.runtime, ort.provider, ort.format) == ("onnxruntime", "CPUExecutionProvider", "ort")


def test_a_name_that_is_not_there_gets_the_nearest() -> None:
    with pytest.raises(InputError, match=r"(?s)no target 'andriod'.*one of cpu, .*did you mean 'android'"):
        find_profile("andriod")
    with pytest.raises(InputError, match=r"(?s)no bundles for the target 'cpu'.*one of browser, android, ios"):
        find_app_profile("cpu")
