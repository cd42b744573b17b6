import subprocess
import sys

import pytest

_FAULTS = """
import resource
import sys

import torch

from compress.stages.training.malloc import keep_freed_memory

if sys.argv[1:] != ["as it is"] and not keep_freed_memory(*map(int, sys.argv[1:])):
    sys.exit("no mallopt")
torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(1 << 24)
sys.stdout.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))
"""


def page_faults(*how: str) -> int:
    ended = subprocess.run([sys.executable, "-c", _FAULTS, *how], capture_output=True, text=True, check=False)
    if "no mallopt" in ended.stderr:
        pytest.skip("the C library has no mallopt")
    return int(ended.stdout)


def test_large_tensors_are_served_from_memory_that_was_freed():
    # 64 MB are 16,384 pages of 4 kB, or 32 of 2 MB.
    assert page_faults("as it is") >= 8 * 32
    assert page_faults() < 32


def test_larger_tensors_than_asked_for_are_given_back():
    assert page_faults(str(1 << 27)) < 32
    assert page_faults(str(1 << 22)) >= 8 * 32


_RESIDENT = """
import sys

import torch

from compress.stages.training.malloc import give_back_freed_memory, keep_freed_memory


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


if not keep_freed_memory(1 << 27):
    sys.exit("no mallopt")
parts = [torch.ones(1 << 24) for _ in range(4)]
last = torch.ones(1 << 10)
full = resident()
del parts
kept = resident()
give_back_freed_memory()
sys.stdout.write(f"{full} {kept} {resident()}")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_is_kept_can_be_given_back():
    ended = subprocess.run([sys.executable, "-c", _RESIDENT], capture_output=True, text=True, check=False)
    if "no mallopt" in ended.stderr:
        pytest.skip("the C library has no mallopt")
    full, kept, left = map(int, ended.stdout.split())
    assert full - kept < 1 << 27
    assert full - left > 7 << 25
