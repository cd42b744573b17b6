"""The worst known file of a megabyte for each reader takes bounded memory and time, and never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest
from crafted import Crafted, crafted_files

from compress.models.quantization_config import layer_settings
from compress.utils.errors import BundleError, DataError, ModelError
from compress.utils.read_limits import LIMITS, ReadLimitError, parse_json, refuse_expansion

MAX_BYTES, MAX_SECONDS = 500_000_000, 5.0
CHILD = """
import json, sys, time
from pathlib import Path
{imports}
from compress.utils.errors import CompressError

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

for name in sys.argv[1:]:
    file, problem = Path(name), ""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins at the memory of now
    before, began = resident("VmRSS"), time.process_time()
    try:
        {call}
    except CompressError as error:
        problem = str(error)
    seconds = time.process_time() - began
    print(json.dumps([file.name, resident("VmHWM") - before, seconds, problem]), flush=True)
"""
GROUPS = {(imports, call): list(files) for (imports, call), files in groupby(crafted_files(), lambda file: file[2:])}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are reset by Linux")
@pytest.mark.parametrize("files", GROUPS.values(), ids=[files[0].name.rpartition(".")[2] for files in GROUPS.values()])
def test_worst_files_of_a_megabyte_take_bounded_memory_and_time(files: list[Crafted], tmp_path: Path) -> None:
    for file in files:
        (tmp_path / file.name).write_bytes(file.write())
    code = CHILD.format(imports=files[0].imports, call=files[0].call)
    paths = [tmp_path / file.name for file in files]
    done = subprocess.run([sys.executable, "-P", "-c", code, *paths], capture_output=True, text=True, timeout=300)
    measured = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(measured) == len(files), done.stderr
    for name, peak_bytes, seconds, problem in measured:
        assert peak_bytes < MAX_BYTES and seconds < MAX_SECONDS, f"{name}: {peak_bytes:,} bytes, {seconds} s, {problem}"
        assert "\n  expected:" in problem or "\n  hint:" in problem or not problem or "problem" in problem, problem


def test_one_error_stands_for_every_reader() -> None:
    for kind in (ModelError, DataError, BundleError):
        with pytest.raises(kind, match="A file of 10 bytes would expand to 100,000,001 bytes"):
            refuse_expansion(LIMITS.expanded_bytes + 1, 10, "A file", "a.bin")
    refuse_expansion(LIMITS.expanded_bytes, 10, "A file", "a.bin")
    refuse_expansion(200 * LIMITS.expanded_bytes, 2 * LIMITS.expanded_bytes, "A file", "a.bin")


NESTED = "(a|aa)+$"
NAME = "a" * 40 + "!"


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": [f"re:{NESTED}"]}}},
        {"quant_method": "gptq", "bits": 4, "dynamic": {f"+:{NESTED}": {"bits": 8}}},
    ],
)
def test_pattern_of_a_config_that_does_not_end_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(ReadLimitError, match=r"The pattern '\(a\|aa\)\+\$' takes too long for the layer"):
        layer_settings(config, NAME)
    assert layer_settings(config, "other")["bits"] in (None, 4)


def test_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(ModelError, match=r"The pattern '\(' is no regular expression"):
        layer_settings({"quant_method": "gptq", "dynamic": {"(": {"bits": 8}}}, "a")


@pytest.mark.parametrize(("open_", "close"), [("[", "]"), ('{"a":', "}")])
def test_json_is_bounded_in_depth_and_not_in_length(open_: str, close: str) -> None:
    for depth in (1, LIMITS.json_depth):
        text = open_ * depth + "1" + close * depth
        assert parse_json(text) == parse_json(text.encode()) == json.loads(text)
    with pytest.raises(ValueError, match="nested more than 200 deep"):
        parse_json(open_ * (LIMITS.json_depth + 1) + "1" + close * (LIMITS.json_depth + 1))
    many = json.dumps([{"a": [1, {}]}] * 1000)
    assert parse_json(many) == json.loads(many)
