"""Properties of this machine that affect measurements; nothing here identifies the machine or its user."""

from __future__ import annotations

import functools
import math
import os
import platform
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any, NamedTuple

from compress import DISTRIBUTION

PACKAGES = (
    "accelerate",
    DISTRIBUTION,
    "datasets",
    "nncf",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxscript",
    "optimum",
    "pyarrow",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "xllamacpp",
)
FEATURES = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
_VNNI, _DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "amx_int8"}, {"asimddp", "i8mm"}
MISSING = "missing"
_ROOT = Path("/")
_UNLIMITED = 1 << 60
"""Memory limit above which cgroup version 1 means that there is no limit."""


def environment() -> dict[str, Any]:
    """Return a fingerprint of the machine: processor, features, granted cores and memory, kernel, package versions."""
    return {
        "processor": processor(),
        "processor_class": processor_class(),
        "features": list(features()),
        "cores": os.cpu_count() or 1,
        "cores_granted": len(granted_cores()),
        "cores_quota": cores_quota(),
        "governor": governor(),
        "memory_bytes": memory_bytes(),
        "memory_limit_bytes": memory_limit_bytes(),
        "platform": f"{platform.system()} {platform.machine()}",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: installed for name, installed in package_versions(PACKAGES).items() if installed != MISSING},
    }


def user_cache() -> Path:
    """Return the folder `compress` in the user's cache folder."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    cache_home = Path(configured) if Path(configured).is_absolute() else Path.home() / ".cache"
    return cache_home / "compress"


def processor(root: Path = _ROOT) -> str:
    """Return the processor's name, or the architecture if the system shows no name."""
    fields = _cpu_fields(root)
    if "model name" in fields:
        return fields["model name"]
    # ARM kernels list numbers in place of a name.
    if "CPU part" in fields:
        return f"{platform.machine()} implementer {fields.get('CPU implementer')} part {fields['CPU part']}"
    return platform.processor() or platform.machine()


def features(root: Path = _ROOT) -> tuple[str, ...]:
    """Return those of `FEATURES` that the processor has; empty if the system does not list them."""
    fields = _cpu_fields(root)
    # The field is called flags on x86 and Features on ARM.
    present = set(fields.get("flags", fields.get("Features", "")).split())
    return tuple(name for name in FEATURES if name in present)


def processor_class(root: Path = _ROOT) -> str:
    """Return the class of 8-bit arithmetic: `x86-vnni`, `x86-avx2`, `arm64-dotprod` or `arm64`; else the architecture.

    An x86 processor that does not list VNNI counts as one without it.
    """
    machine, present = platform.machine().lower(), set(features(root))
    if machine in ("x86_64", "amd64"):
        return "x86-vnni" if present & _VNNI else "x86-avx2"
    if machine in ("aarch64", "arm64"):
        return "arm64-dotprod" if present & _DOT_PRODUCTS or platform.system() == "Darwin" else "arm64"
    return machine


def has_bf16() -> bool:
    """Return True if the processor multiplies bfloat16 in hardware, and False if that is unknown."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(features()))


def has_int8_dot_product() -> bool:
    """Return True if one instruction sums 8-bit products in 32 bits, so that they cannot saturate."""
    return bool((_VNNI | _DOT_PRODUCTS) & set(features()))


def granted_cores() -> tuple[int, ...]:
    """Return the numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def spread_cores(count: int, root: Path = _ROOT) -> tuple[int, ...]:
    """Return ``count`` of the granted cores, or all; physical cores are used once before any is used twice."""
    first: list[int] = []
    siblings_of_first: list[int] = []
    seen: set[str] = set()
    # The first core of each physical one comes before all siblings.
    for core in granted_cores():
        siblings = _text(root / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list") or str(core)
        (siblings_of_first if siblings in seen else first).append(core)
        seen.add(siblings)
    return tuple(sorted((first + siblings_of_first)[:count]))


def cores_quota(root: Path = _ROOT) -> float | None:
    """Return the number of cores' worth of time that the tightest control group grants, or ``None`` without a limit."""
    quotas = []
    for folder in _cgroups("cpu", root):
        # Version 2 stores quota and period in one file, version 1 in two.
        if (folder / "cpu.max").exists():
            quota, period = (_text(folder / "cpu.max") or "max 100000").split()
        else:
            quota = _text(folder / "cpu.cfs_quota_us") or "-1"
            period = _text(folder / "cpu.cfs_period_us") or "100000"
        if quota not in ("max", "-1"):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def working_threads() -> int:
    """Return the number of threads for work that is not timed: `OMP_NUM_THREADS`, else one per granted core."""
    configured = os.environ.get("OMP_NUM_THREADS", "")
    if configured.isdecimal() and int(configured) > 0:
        return int(configured)
    # More threads than the quota would be throttled.
    quota = cores_quota()
    return max(1, min(len(granted_cores()), len(granted_cores()) if quota is None else math.ceil(quota)))


class Throttling(NamedTuple):
    """Number and total duration of pauses of this process's control groups after they used up their quota."""

    times: int
    seconds: float


def throttling(root: Path = _ROOT) -> Throttling:
    """Return counters since the control groups were created; two calls bracket an interval."""
    times, seconds = 0, 0.0
    for folder in _cgroups("cpu", root):
        counters = dict(line.split() for line in (_text(folder / "cpu.stat") or "").splitlines())
        times += int(counters.get("nr_throttled", 0))
        # Version 2 counts microseconds, version 1 nanoseconds.
        seconds += int(counters.get("throttled_usec", 0)) / 1e6 + int(counters.get("throttled_time", 0)) / 1e9
    return Throttling(times, seconds)


def memory_bytes(root: Path = _ROOT) -> int | None:
    """Return the size of physical memory."""
    for line in (_text(root / "proc/meminfo") or "").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    if "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def memory_limit_bytes(root: Path = _ROOT) -> int | None:
    """Return the tightest memory limit of the control groups, or ``None`` without a limit."""
    limits = []
    for folder in _cgroups("memory", root):
        text = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes") or "max"
        if text != "max" and int(text) < _UNLIMITED:
            limits.append(int(text))
    return min(limits, default=None)


def governor(root: Path = _ROOT) -> str | None:
    """Return the frequency governor of the first granted core, if the kernel shows one."""
    core = granted_cores()[0]
    return _text(root / f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_governor")


def package_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Return the installed versions of distributions; a missing one has the version `missing`."""
    return {name: _version(name) or MISSING for name in names}


@functools.cache
def _cpu_fields(root: Path) -> dict[str, str]:
    """Return the first processor's fields of /proc/cpuinfo; empty if there is no such file."""
    fields: dict[str, str] = {}
    for line in (_text(root / "proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields


def _cgroups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of this process's control groups (versions 1 and 2), from the innermost to the root."""
    base = root / "sys/fs/cgroup"
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        # Version 1 has one hierarchy per controller.
        if controllers and controller not in controllers.split(","):
            continue
        mount = base / controllers if controllers else base
        # Version 1 mounts `cpu,cpuacct` under one of these names.
        if controllers and not mount.is_dir():
            mount = base / controller
        inner = mount / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder.is_dir() and (folder == mount or mount in folder.parents):
                yield folder


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


_PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


@dataclass(frozen=True)
class RequiredPackage:
    """A requirement and its installed version, if any. ``extra`` is ``None`` for packages that are always required."""

    name: str
    specifier: str
    installed: str | None
    extra: str | None = None

    @property
    def is_satisfied(self) -> bool:
        """Return True if an installed version matches the specifier."""
        from packaging.specifiers import SpecifierSet

        return self.installed is not None and SpecifierSet(self.specifier).contains(self.installed, prereleases=True)


def is_installed() -> bool:
    """Return True if this package is installed, rather than imported from the current folder."""
    return _version(DISTRIBUTION) is not None


def has_package(name: str) -> bool:
    """Return True if a distribution of that name is installed."""
    return _version(name) is not None


def extra_containing(package: str) -> str | None:
    """Return the extra that installs ``package``; ``None`` if it is always installed or no extra has it."""
    # Imported late: processes that time a model import this module and nothing heavy.
    from packaging.utils import canonicalize_name

    canonical_name = canonicalize_name(package)
    return next(
        (requirement.extra for requirement in packages() if canonicalize_name(requirement.name) == canonical_name), None
    )


def packages() -> list[RequiredPackage]:
    """Return every requirement that applies to this platform, also those of extras, in the project file's order.

    A requirement that an extra inherits from another extra is listed with the other one.
    """
    from packaging.requirements import Requirement

    required = []
    for text in _requirements():
        requirement = Requirement(text)
        # An extra that includes other extras refers to the package itself.
        if requirement.name == DISTRIBUTION:
            continue
        # The marker `extra == "gpu"` names the extra.
        marker = str(requirement.marker or "")
        extra = marker.split("extra == ")[1].split()[0].strip("\"')") if "extra" in marker else None
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra or ""}):
            specifiers = str(requirement.specifier)
            required.append(RequiredPackage(requirement.name, specifiers, _version(requirement.name), extra))
    return required


def _requirements() -> list[str]:
    """Return requirements in the form of package metadata, read from the project file if it is present."""
    # An installed package has metadata instead of a project file.
    if not _PYPROJECT.exists():
        return distribution(DISTRIBUTION).requires or []
    project = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8"))["project"]
    texts: list[str] = list(project["dependencies"])
    for extra, names in project.get("optional-dependencies", {}).items():
        for name in names:
            text, _, marker = name.partition(";")
            # Write markers in the form that package metadata uses.
            condition = f"({marker.strip()}) and " if marker else ""
            texts.append(f"{text.strip()}; {condition}extra == '{extra}'")
    return texts


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
