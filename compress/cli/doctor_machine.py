"""Checks of `compress doctor` on this machine and installation."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compress import plugins
from compress.cli.output import Finding
from compress.formats import runtime
from compress.formats.integrity import missing_references
from compress.formats.registry import PLUGGED
from compress.formats.targets import TARGETS
from compress.stages import registry as stages  # noqa: F401, which records the stages of plug-ins that cannot be used
from compress.utils import environment
from compress.utils.errors import install_command
from compress.utils.torch_device import CPU, describe_device, device_fault, has_fast_bf16, resolve_device

Environment = Mapping[str, Any]
"""Result of `compress.utils.environment.environment`."""
_LITTLE_DISK_BYTES = 5_000_000_000
_LITTLE_MEMORY_BYTES = 4_000_000_000


def machine_findings(machine: Environment) -> list[Finding]:
    """Return the findings on this machine and installation; ``machine`` is its `environment`."""
    return [
        *_installation(),
        *_plugins(),
        *_targets(),
        *device_findings(),
        *_processor(machine),
        *_memory_and_disk(machine),
    ]


def _installation() -> Iterator[Finding]:
    """Yield findings on required packages and extras."""
    if not environment.is_installed():
        yield Finding("warning", "compress runs from its folder and is not installed", "pip install -e .")
    required = [package for package in environment.packages() if package.extra is None]
    missing = [package for package in required if not package.is_satisfied]
    for package in missing:
        have = f"{package.installed} is installed" if package.installed else "it is missing"
        yield Finding(
            "problem",
            f"{package.name} {package.specifier} is needed, {have}",
            f"pip install '{package.name}{package.specifier}'",
        )
    if not missing:
        yield Finding("ok", f"all {len(required)} required packages are installed in supported versions")
    for extra in dict.fromkeys(package.extra for package in environment.packages() if package.extra):
        missing_of_extra = [
            package.name for package in environment.packages() if package.extra == extra and not package.is_satisfied
        ]
        state = f"not installed (lacks {', '.join(missing_of_extra)})" if missing_of_extra else "installed"
        advice = install_command(extra) if missing_of_extra else None
        yield Finding("absent" if missing_of_extra else "ok", f"extra {extra}: {state}", advice)


def _plugins() -> Iterator[Finding]:
    """List the plug-ins, everything of them that cannot be used, and the findings of their own checks."""
    # Import everything, so that each object that cannot be used is recorded as a problem.
    plugins.load_all()
    for spec in plugins.installed_plugins().values():
        yield Finding("ok", f"plug-in {spec.name}: {spec.summary}")
    for form in PLUGGED:
        if faults := missing_references(form):
            yield Finding("warning", f"the format {form} of a plugin: {'; '.join(faults)}", "fix or uninstall it")
        else:
            yield Finding("ok", f"the format {form} of a plugin: all of its references exist")
    for extension in plugins.find_extensions("doctor_checks").values():
        check = plugins.load_extension(extension, lambda value: value)
        yield from check() if check is not None else ()
    for problem in plugins.plugin_problems():
        yield Finding("warning", str(problem), "fix or uninstall the plug-in")


def _targets() -> Iterator[Finding]:
    """Yield the availability of each target."""
    for target in TARGETS.values():
        reason = runtime.why_unavailable(target)
        if reason is None:
            yield Finding("ok", f"target {target.name}: available")
        elif target.name == "cpu":
            yield Finding("problem", f"target cpu: {reason}", "pip install --force-reinstall onnxruntime")
        else:
            yield Finding("absent", f"target {target.name}: unavailable, {reason}; recipes skip it")
    # Both packages install the same module, and the later one wins.
    versions = {package.name: package.installed for package in environment.packages()}
    if versions.get("onnxruntime-gpu") and runtime.why_unavailable(TARGETS["gpu"]):
        yield Finding(
            "warning",
            "onnxruntime-gpu is installed and yet has no working CUDA provider",
            "onnxruntime may have overwritten its files: pip install --force-reinstall --no-deps "
            "onnxruntime-gpu; then check the driver",
        )


def device_findings() -> Iterator[Finding]:
    """Yield the device that `device: auto` selects."""
    device = resolve_device("auto")
    reason = f", {device_fault('cuda')}" if device == CPU else ""
    yield Finding("ok", f"stages compute on {describe_device(device)}{reason}")


def _processor(machine: Environment) -> Iterator[Finding]:
    """Yield findings on cores, instruction sets and frequency."""
    granted, features = machine["cores_granted"], machine["features"]
    yield Finding(
        "ok", f"{machine['processor']}, {granted} cores granted ({', '.join(features) or 'features unknown'})"
    )
    quota = machine["cores_quota"]
    if quota is not None and quota < granted:
        yield Finding(
            "warning",
            f"a cgroup limits CPU time to {quota:g} cores; timings will be throttled",
            f"set benchmark.threads to at most {max(1, int(quota))}, or raise the limit",
        )
    if "avx2" in features and not environment.has_int8_dot_product():
        yield Finding(
            "warning",
            "the processor lacks VNNI: 8-bit products may saturate and int8 gains little speed",
            "`reduce_range: auto` of the stage onnx_int8 keeps weights from saturating",
        )
    if features and not environment.has_bf16():
        yield Finding("ok", "no bf16 arithmetic: training runs in fp32")
    elif features:
        comparison, precision = ("faster", "bf16") if has_fast_bf16() else ("no faster", "fp32")
        products = f"matrix products in bf16 are {comparison} than in fp32"
        yield Finding("ok", f"{products}: `precision: fastest` trains in {precision}")
    if machine["governor"] not in (None, "performance"):
        yield Finding(
            "warning",
            f"the frequency governor is {machine['governor']!r}: timings will vary",
            "cpupower frequency-set -g performance",
        )
    # Other work makes timings longer.
    load = os.getloadavg()[0]
    if load > granted:
        yield Finding("warning", f"the load is {load:.1f} on {granted} cores", "stop other programs before timing")


def _memory_and_disk(machine: Environment) -> Iterator[Finding]:
    """Yield findings on memory and on free disk space."""
    sizes = [size for size in (machine["memory_bytes"], machine["memory_limit_bytes"]) if size is not None]
    text = f"{min(sizes, default=0) / 1e9:.1f} GB of memory"
    if sizes and min(sizes) < _LITTLE_MEMORY_BYTES:
        yield Finding("warning", f"{text} is little", "train small models, or lower batch_size")
    elif sizes:
        yield Finding("ok", text)
    free = shutil.disk_usage(Path.cwd()).free
    text = f"{free / 1e9:.1f} GB free on the disk of the current folder"
    if not os.access(Path.cwd(), os.W_OK):
        yield Finding("problem", "the current folder cannot be written to", "run from a folder that you can write to")
    elif free < _LITTLE_DISK_BYTES:
        yield Finding("warning", f"{text}, which is little", "`compress cache prune`, or free some space")
    else:
        yield Finding("ok", text)
