"""What all tests share: their order, fixtures of pages that are looked at in a browser, silence while torch traces."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, open_browser

import compress  # noqa: F401, before any test imports a library that would report to its makers

TIMED = "bench"
"""The folder whose tests time things."""
MAY_BE_ALONE = (TIMED, "formats/onnx/runtimes")
"""Folders that `make test` looks for such tests in: to collect all others again would take half a minute."""
LONGEST = (
    "stages/test_contract.py",
    "recipe_source/test_recipes.py",
    "pipeline/test_interruption.py",
    "formats/executorch/test_executorch.py",
    "samples/test_real_samples.py",
    "nightly/test_night_run.py",
    "formats/onnx/test_fusions.py",
    "cli/test_bad_input.py",
    "pipeline/test_run.py",
    "cli/test_json_output.py",
    "pipeline/test_run_in_formats.py",
    "inspect/test_departures.py",
    "formats/onnx/test_onnx_export.py",
    "devices/test_device_bench.py",
    "quantization/test_gptqmodel_opens_it.py",
)
"""Files that begin first, the longest before the others, so that no worker idles while another ends one of them."""
HERE = Path(__file__).parent
# Workers have it from the process that starts them.
os.environ.setdefault("COMPRESS_TESTS_BEGAN", str(time.time()))
# pytest listens to every logger, so that torch would write down each step of its tracing.
logging.getLogger("torch.__trace").disabled = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is not to run beside other tests, and put the longest files first."""
    places = {name: place for place, name in enumerate(LONGEST)}

    def place_of(item: pytest.Item) -> int:
        return places.get(item.path.relative_to(HERE).as_posix(), len(places))

    items.sort(key=place_of)
    for item in items:
        folder = item.path.relative_to(HERE).parent.as_posix()
        if folder == TIMED:
            item.add_marker(pytest.mark.alone)
        if item.get_closest_marker("alone") and folder not in MAY_BE_ALONE:
            raise pytest.UsageError(f"{item.nodeid} is marked alone, and `make test` looks for such in {MAY_BE_ALONE}")


def pytest_collection_finish() -> None:
    """What is imported by now stays: to look through all of it for garbage is a sixth of the time of an export."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the browser; in CI there must be one."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None and os.environ.get("CI"):
        pytest.fail("no Chromium on PATH, and CI must have one")
    if found is None:
        pytest.skip("no Chromium on PATH")
    return found


@pytest.fixture(scope="module")
def browser(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A tab to look at pages in."""
    with open_browser(chromium, tmp_path_factory.mktemp("pages")) as found:
        yield found
