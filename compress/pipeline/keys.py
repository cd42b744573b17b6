"""What the cache knows each stage by, and which of a recipe it has, told without a model or torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from compress.data.dataset import Dataset, load_dataset
from compress.data.samples.fetch import cached_directory
from compress.data.source import HubSplit, find, locate_split, locate_unlabeled
from compress.pipeline.cache import Cache
from compress.recipe.recipe import START, Recipe
from compress.sources.resolve import already_here
from compress.stages.base import Stage, all_references
from compress.tasks.capability import TAKES_ARRAYS
from compress.tasks.registry import get_task
from compress.utils.digests import digest_directory
from compress.utils.environment import package_versions
from compress.utils.progress import SilentProgress
from compress.utils.storage import cache_key
from compress.utils.torch_device import CPU, resolve_device

_VALIDATION = "validation"


@dataclass(frozen=True)
class Keys:
    """The keys of a recipe's stages.

    ``model_digest`` gives the digest of a model's files by its reference, ``folder_digest`` that of another folder.
    ``device`` is what stages compute on: another kind of processor than this one gives other bits.
    """

    recipe: Recipe
    data: Dataset
    model_digest: Callable[[str], str]
    folder_digest: Callable[[str], str]
    device: str = CPU

    def start(self) -> str:
        """SHA-256 over the starting model's files and what decides how its head is made, as hex."""
        head = {"labels": self.data.labels, "seed": self.recipe.seed, "task": self.recipe.task}
        return cache_key({"files": self.model_digest(self.recipe.model), "head": head})

    def stage(self, stage: Stage[Any, Any], input_digest: str, referred: Sequence[str]) -> str:
        """The key of ``stage`` on files of ``input_digest``; ``referred``: digests of what it refers to, in order."""
        named = stage.references().values()
        folders = [self.folder_digest(one.name) for one in named if one.kind != "model"]
        models = [self.model_digest(one.name) for one in named if one.kind == "model"]
        device = self.device.partition(":")[0] if stage.uses_device or stage.trains else CPU
        return cache_key(
            {
                "device": device,
                "folders": folders,
                "models": models,
                "stage": stage.model_dump(mode="json"),
                "version": stage.version,
                "input": input_digest,
                "refers_to": list(referred),
                "data": self._data(stage),
                "max_length": self.recipe.data.max_length,
                "seed": self.recipe.seed,
                "packages": package_versions((*stage.called_packages(), *get_task(self.recipe.task).packages)),
            }
        )

    def _data(self, stage: Stage[Any, Any]) -> str | None:
        needs = stage.needs()
        if not needs.splits and not needs.unlabeled:
            return None
        validation = (_VALIDATION,) if _VALIDATION in self.data.splits else ()
        return self.data.digest(*needs.splits, *validation, unlabeled=needs.unlabeled)


@dataclass(frozen=True)
class CachedStages:
    """Called with a stage's label: whether `compress run` would take the stage from the cache.

    Fetches and writes nothing, and trusts the manifests: while a model or the data of the recipe are not here, no
    stage counts as cached. The first call reads the data, so it raises `DataError` for what a run would refuse.
    """

    recipe: Recipe
    folder: Path
    artifacts: Path

    def __call__(self, label: str) -> bool:
        return label in self._known

    @cached_property
    def _known(self) -> dict[str, str]:
        """Label -> digest of each stage's output in the cache."""
        recipe, cache = self.recipe.resolved(), Cache(self.artifacts / "cache")
        named = all_references(recipe.stages)
        names = [recipe.model, *(one.name for one in named if one.kind == "model")]
        kept = cache.root / "models"
        arrays = TAKES_ARRAYS in get_task(recipe.task).capabilities
        models = {
            name: already_here(str(find(name, self.folder) or name), kept, arrays, recipe.safety_checker)
            for name in names
        }
        folders = {one.name: find(one.name, self.folder) for one in named if one.kind != "model"}
        known = None not in (*models.values(), *folders.values())
        if not known or not cache.root.is_dir() or not _data_is_here(recipe, self.folder):
            return {}
        data = load_dataset(recipe.data, get_task(recipe.task).columns, self.folder, SilentProgress())
        digests = {reference: digest_directory(path) for reference, path in models.items() if path}
        beside = {name: digest_directory(path) for name, path in folders.items() if path}
        device = resolve_device(recipe.device)
        return _walk(recipe, Keys(recipe, data, digests.__getitem__, beside.__getitem__, device), cache)


def _walk(recipe: Recipe, keys: Keys, cache: Cache) -> dict[str, str]:
    """Label -> digest of what is in the cache, up to the first stage that is not."""
    known = {START: keys.start()}
    before = START
    for label, stage in zip(recipe.labels(), recipe.stages, strict=True):
        entry = cache.peek(keys.stage(stage, known[before], [known[other] for other in stage.earlier_outputs()]))
        if entry is None:
            break
        known[label], before = entry.digest, label
    return known


def _data_is_here(recipe: Recipe, folder: Path) -> bool:
    splits = (locate_split(recipe.data, split, folder, cached_directory) for split in recipe.data.splits)
    unlabeled = (locate_unlabeled(reference, folder, cached_directory) for reference in recipe.data.unlabeled)
    return not any(place is None or isinstance(place, HubSplit) for place in (*splits, *unlabeled))
