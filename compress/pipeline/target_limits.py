"""Sizes of artifacts, and a target's own limits on shipped bytes and memory."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import NamedTuple

from compress.formats.registry import RUNTIMES
from compress.formats.runtime import Ships, get_runtime
from compress.formats.target_profile import Target, TargetProfile
from compress.inspection.budget import budget_of, size_advice
from compress.inspection.tensors import read_model
from compress.models.pipeline_folder import part_folders
from compress.recipe.recipe import Limit
from compress.results.report import FINAL, LimitResult, Measurement
from compress.utils.storage import size_bytes

SHIPPED, MEMORY = "shipped_bytes", "peak_memory_bytes"
_MEGABYTE = 1e6
_NAMED = 3


class Shipped(NamedTuple):
    """Bytes that an app ships: model files by name, and the runtime, or None if it is not installed here."""

    model: Mapping[str, int]
    runtime: int | None

    @property
    def total(self) -> int:
        """Return the sum of all known bytes."""
        return sum(self.model.values()) + (self.runtime or 0)


def shipped(profile: TargetProfile, folder: Path) -> Shipped:
    """Return the bytes that a target ships for the model in ``folder``, compressed if the target is downloaded."""
    model = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    count = _deflated if profile.downloaded else lambda path: path.stat().st_size
    runtime = _runtime_files(profile)
    return Shipped(
        {name: count(path) for name, path in model.items()},
        None if runtime is None else sum(count(path) for path in runtime),
    )


def size_rows(folder: Path, label: str, target: Target) -> list[Measurement]:
    """Return size in bytes, parameters and bits per parameter of a model, and the bytes of each part of a pipeline."""
    budget = budget_of(folder)
    values = {
        "size_bytes": ("bytes", size_bytes(folder)),
        "parameters": ("parameters", budget.parameters),
        "bits_per_parameter": ("bits", 8 * budget.tensor_bytes / max(budget.parameters, 1)),
        **{f"size_bytes_{part}": ("bytes", size_bytes(folder / part)) for part in part_folders(folder)},
    }
    return [
        Measurement(model=label, metric=metric, target=target.name, value=value, unit=unit)
        for metric, (unit, value) in values.items()
    ]


def target_limits(profiles: Sequence[TargetProfile], rows: Sequence[Measurement]) -> list[Limit]:
    """Return the limits of the targets themselves, which are checked like the recipe's."""
    limits = []
    for profile in profiles:
        if profile.max_bytes is not None:
            limits.append(Limit(metric=SHIPPED, target=profile.name, at_most=profile.max_bytes))
        if profile.max_memory_bytes is not None:
            # The metric name of the peak memory at batch 1. A language model's contains the prompt length.
            named = [row.metric for row in rows if (row.model, row.target) == (FINAL, profile.name)]
            metric = next((name for name in named if name.startswith(MEMORY) and "_batch_" not in name), MEMORY)
            limits.append(Limit(metric=metric, target=profile.name, at_most=profile.max_memory_bytes))
    return limits


def explained(
    result: LimitResult, profiles: Sequence[TargetProfile], finals: Mapping[str, Path], sizes: Mapping[str, Shipped]
) -> LimitResult:
    """Return the result of a size limit with the counted parts and, if it is missed, the largest parts and advice.

    Args:
        result: Result of a limit.
        profiles: Targets of the recipe.
        finals: Folder of the final model by target.
        sizes: Shipped bytes by target.
    """
    profile = next((candidate for candidate in profiles if candidate.name == result.target), None)
    if result.metric != SHIPPED or profile is None or result.target not in sizes:
        return result
    counted, max_bytes = sizes[result.target], profile.max_bytes or 0
    words = ["compressed"] if profile.downloaded else []
    if counted.runtime is None:
        words.append("without the runtime, which is not installed here")
    if not result.passed:
        tensors = read_model(finals[result.target]).tensors
        parts = {**counted.model, **({"the runtime": counted.runtime} if counted.runtime else {})}
        largest = sorted(parts, key=lambda name: -parts[name])[:_NAMED]
        words.append(f"biggest: {', '.join(f'{name} {parts[name] / _MEGABYTE:.2f} MB' for name in largest)}")
        if tensors:
            tensor = max(tensors, key=lambda tensor: tensor.bytes)
            words.append(f"the largest tensor, {tensor.name}, {tensor.bytes / _MEGABYTE:.2f} MB as stored")
        stored = {tensor.name: (tensor.dtype, tensor.shape, tensor.bytes) for tensor in tensors}
        words += size_advice(stored, sum(counted.model.values()), counted.runtime or 0, max_bytes)
    return result.model_copy(update={"reason": "; ".join(words) or None})


def _runtime_files(profile: TargetProfile) -> list[Path] | None:
    """Return the files of the target's runtime, or None if the installed runtime is not the target's own."""
    if profile.instead_of is not None or profile.device is not None:
        return None
    runtime = get_runtime(profile.target.runtime)
    if isinstance(runtime, Ships):
        return list(runtime.shipped_files())
    package = RUNTIMES[profile.target.runtime].package
    try:
        listed = files(package) if package else None
    except PackageNotFoundError:
        return None
    paths = [Path(str(file.locate())) for file in listed or ()]
    return [path for path in paths if path.is_file()] or None


def _deflated(path: Path) -> int:
    """Return the bytes of a file after deflate compression, as in a zip file or a gzip response."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    size = 0
    with path.open("rb") as opened:
        while block := opened.read(1 << 20):
            size += len(squeeze.compress(block))
    return size + len(squeeze.flush())
