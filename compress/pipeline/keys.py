"""Cache keys of stages, and a forecast of which stages of a recipe are cached, without a model or torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from compress.data.dataset import Dataset, load_dataset
from compress.data.source import find
from compress.pipeline.cache import Cache
from compress.recipe.recipe import START, Recipe
from compress.sources.resolve import find_resolved
from compress.stages.base import AnyStage, all_references
from compress.stages.protocols import Trains
from compress.tasks.capability import TAKES_ARRAYS
from compress.tasks.registry import TASKS
from compress.utils.environment import package_versions
from compress.utils.progress import SilentProgress
from compress.utils.storage import cache_key, digest_directory
from compress.utils.torch_device import CPU, resolve_device

_VALIDATION = "validation"


@dataclass(frozen=True)
class Keys:
    """Cache keys of a recipe's stages.

    ``model_digest`` returns the digest of a model's files by reference, ``folder_digest`` that of another folder.
    ``device`` is part of the key of stages that use it: another kind of device computes other bits.
    """

    recipe: Recipe
    data: Dataset
    model_digest: Callable[[str], str]
    folder_digest: Callable[[str], str]
    device: str = CPU

    def start(self) -> str:
        """Return the digest of the starting model: its files, and everything that decides its head."""
        head = {"labels": self.data.labels, "seed": self.recipe.seed, "task": self.recipe.task}
        return cache_key({"files": self.model_digest(self.recipe.model), "head": head})

    def stage(self, stage: AnyStage, input_digest: str, referred: Sequence[str]) -> str:
        """Return the key of a stage.

        Args:
            stage: The stage.
            input_digest: Digest of its input's files.
            referred: Digests of the other outputs that it reads, in order.
        """
        references = stage.references().values()
        folders = [self.folder_digest(reference.name) for reference in references if reference.kind != "model"]
        models = [self.model_digest(reference.name) for reference in references if reference.kind == "model"]
        # Only the kind of device counts, not its number: two equal devices compute the same bits.
        device = self.device.partition(":")[0] if stage.uses_device or isinstance(stage, Trains) else CPU
        # Stages that train may read the validation split for early stopping, whether or not they name it.
        needs, validation = stage.needs(), (_VALIDATION,) if _VALIDATION in self.data.splits else ()
        reads_data = needs.splits or needs.unlabeled
        return cache_key(
            {
                "device": device,
                "folders": folders,
                "models": models,
                "stage": stage.model_dump(mode="json"),
                "version": stage.version,
                "input": input_digest,
                "refers_to": list(referred),
                "data": self.data.digest(*needs.splits, *validation, unlabeled=needs.unlabeled) if reads_data else None,
                "max_length": self.recipe.data.max_length,
                "seed": self.recipe.seed,
                "packages": package_versions((*stage.called_packages(), *TASKS[self.recipe.task].packages)),
            }
        )


@dataclass
class CachedStages:
    """Forecast of which stages `compress run` would take from the cache, called with a stage's label.

    Nothing is downloaded or written, and manifests are trusted. If a model or the data is not local, no stage counts as
    cached. The first call reads the data if it gets none, and raises `DataError` for data that a run would refuse.
    """

    recipe: Recipe
    folder: Path
    artifacts: Path
    _digests: dict[str, str] | None = field(default=None, init=False)

    def __call__(self, label: str, data: Dataset | None = None) -> bool:
        """Return True if the stage's output is in the cache. ``data`` is the recipe's data that is local."""
        if self._digests is None:
            self._digests = self._find_digests(data)
        return label in self._digests

    def _find_digests(self, data: Dataset | None) -> dict[str, str]:
        """Return the digest of each cached stage's output by label."""
        recipe, cache = self.recipe.resolved(), Cache(self.artifacts / "cache")
        references = all_references(recipe.stages)
        names = [recipe.model, *(reference.name for reference in references if reference.kind == "model")]
        models_cache, task = cache.root / "models", TASKS[recipe.task]
        arrays = TAKES_ARRAYS in task.capabilities
        models = {
            name: find_resolved(str(find(name, self.folder) or name), models_cache, arrays, recipe.safety_checker)
            for name in names
        }
        others = [reference.name for reference in references if reference.kind != "model"]
        folders = {name: find(name, self.folder) for name in others}
        # Without all inputs the keys cannot be computed, and nothing may be downloaded for a forecast.
        if None in (*models.values(), *folders.values()) or not cache.root.is_dir():
            return {}
        data = data or load_dataset(recipe.data, task.columns, self.folder, SilentProgress(), fetch=False)
        if len(data.rows_read) < len(recipe.data.splits) + len(set(recipe.data.unlabeled)):
            return {}
        digests, folder_digests = (
            {name: digest_directory(path) for name, path in paths.items() if path} for paths in (models, folders)
        )
        keys = Keys(recipe, data, digests.__getitem__, folder_digests.__getitem__, resolve_device(recipe.device))
        return cached_digests(recipe, keys, cache)


def cached_digests(recipe: Recipe, keys: Keys, cache: Cache) -> dict[str, str]:
    """Return the digests of cached outputs by label, up to the first stage that is not cached."""
    digests = {START: keys.start()}
    input_label = START
    for label, stage in zip(recipe.labels(), recipe.stages, strict=True):
        entry = cache.peek(keys.stage(stage, digests[input_label], [digests[name] for name in stage.earlier_outputs()]))
        if entry is None:
            break
        digests[label], input_label = entry.digest, label
    return digests
