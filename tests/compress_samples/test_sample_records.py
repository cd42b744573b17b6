"""What this project's own samples say of themselves."""

from __future__ import annotations

from importlib import import_module

import pytest

from compress.data.samples.sample import known_samples
from compress_samples.catalog import SAMPLES


def test_all_are_registered() -> None:
    assert {sample.name for sample in SAMPLES} <= set(known_samples())


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_what_prepares_a_sample_is_there(sample) -> None:
    if sample.preparation:
        module, function = sample.preparation.split(":")
        assert callable(getattr(import_module(module), function))
