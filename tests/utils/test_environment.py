from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest

from compress.utils import environment as subject

X86 = """processor\t: 0
model name\t: Example Processor 9000
flags\t\t: fpu sse2 avx2 avx512f avx512_vnni amx_int8

processor\t: 1
model name\t: Another
flags\t\t: fpu
"""
ARM = """processor\t: 0
Features\t: fp asimd asimddp i8mm bf16
CPU implementer\t: 0x41
CPU part\t: 0xd4f
"""


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_first_processor_is_read(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/cpuinfo": X86})
    assert subject.processor(root) == "Example Processor 9000"
    assert subject.features(root) == ("avx2", "avx512f", "avx512_vnni", "amx_int8")


def test_arm_processor_is_read(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/cpuinfo": ARM})
    assert subject.processor(root).endswith("implementer 0x41 part 0xd4f")
    assert subject.features(root) == ("asimd", "asimddp", "i8mm", "bf16")


@pytest.mark.parametrize(
    ("machine", "flags", "kind"),
    [
        ("x86_64", "avx2 avx512f avx512_vnni", "x86-vnni"),
        ("x86_64", "avx2 avx_vnni", "x86-vnni"),
        ("AMD64", "avx2 avx512f", "x86-avx2"),  # AVX-512 of before Cascade Lake adds in 16 bits too
        ("x86_64", "", "x86-avx2"),
        ("aarch64", "asimd asimddp", "arm64-dotprod"),
        ("aarch64", "asimd", "arm64"),
        ("riscv64", "", "riscv64"),
    ],
)
def test_processor_class(machine: str, flags: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    assert subject.processor_class(write(tmp_path, {"proc/cpuinfo": f"flags\t: {flags}\n"})) == kind


def test_fields_are_unknown_without_proc(tmp_path: Path) -> None:
    assert subject.features(tmp_path) == ()
    assert subject.cores_quota(tmp_path) is None
    assert subject.memory_limit_bytes(tmp_path) is None
    assert subject.throttling(tmp_path) == (0, 0.0)
    assert subject.governor(tmp_path) is None


def test_tightest_cgroup_v2_limit_applies(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/jobs/nightly"
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/jobs/nightly\n",
            f"{group}/cpu.max": "300000 100000\n",
            f"{group}/cpu.stat": "usage_usec 9\nnr_throttled 3\nthrottled_usec 1500000\n",
            f"{group}/memory.max": "4000000000\n",
            "sys/fs/cgroup/jobs/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/jobs/memory.max": "9000000000\n",
            "sys/fs/cgroup/cpu.max": "max 100000\n",
        },
    )
    assert subject.cores_quota(root) == 1.5
    assert subject.memory_limit_bytes(root) == 4_000_000_000
    assert subject.throttling(root) == (3, 1.5)


def test_cgroup_v1_limits_are_read(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/box\n2:cpu,cpuacct:/box\n0::/\n",
            "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/box/cpu.stat": "nr_throttled 2\nthrottled_time 250000000\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert subject.cores_quota(root) == 0.5
    assert subject.memory_limit_bytes(root) is None
    assert subject.throttling(root) == (2, 0.25)


def test_cgroup_path_of_the_host_falls_back_to_the_mount(tmp_path: Path) -> None:
    """In a container /proc/self/cgroup may name the host's path, while the mount shows only the inside."""
    root = write(tmp_path, {"proc/self/cgroup": "0::/docker/0123\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"})
    assert subject.cores_quota(root) == 2.0


def test_pinned_cores_avoid_siblings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "granted_cores", lambda: (0, 1, 2, 3))
    pairs = {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    root = write(tmp_path, {topology.format(core): pair for core, pair in pairs.items()})
    assert subject.spread_cores(2, root) == (0, 2)
    assert subject.spread_cores(3, root) == (0, 1, 2)
    assert subject.spread_cores(9, root) == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("present", "bf16", "dot"),
    [
        (("avx2",), False, False),
        (("avx2", "avx512_vnni"), False, True),
        (("avx512_bf16",), True, False),
        (("asimddp", "bf16"), True, True),
        (("amx_int8",), False, True),
    ],
)
def test_cpu_features_determine_bf16_and_int8_dot_product(
    present: tuple[str, ...], bf16: bool, dot: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "features", lambda: present)
    assert subject.has_bf16() is bf16
    assert subject.has_int8_dot_product() is dot


def test_this_machine_agrees_with_psutil_and_metadata() -> None:
    fingerprint = subject.environment()
    assert fingerprint["memory_bytes"] == psutil.virtual_memory().total
    assert fingerprint["cores"] == psutil.cpu_count()
    assert fingerprint["cores_granted"] == len(psutil.Process().cpu_affinity())
    assert fingerprint["packages"]["onnxruntime"] == version("onnxruntime")


@pytest.mark.parametrize(
    ("told", "quota", "threads"),
    [("3", None, 3), ("", None, 8), ("none", None, 8), ("0", 2.5, 3), ("", 0.5, 1), ("", 16.0, 8)],
)
def test_threads_of_untimed_work(told: str, quota: float | None, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", told)
    monkeypatch.setattr(subject, "granted_cores", lambda: tuple(range(8)))
    monkeypatch.setattr(subject, "cores_quota", lambda: quota)
    assert subject.working_threads() == threads


def test_fingerprint_contains_no_user_host_or_path() -> None:
    text = json.dumps(subject.environment())
    private = {platform.node(), os.environ.get("HOSTNAME"), str(Path.cwd()), str(Path.home())} - {None, "", "/"}
    assert not [name for name in private if len(name or "") > 3 and str(name) in text]
