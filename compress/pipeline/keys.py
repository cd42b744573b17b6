"""What the cache knows each stage by: everything that decides its output, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from compress.cache import cache_key
from compress.data.dataset import Dataset
from compress.environment import package_versions
from compress.recipe.recipe import Recipe
from compress.stage.stage import Stage

START = "start"
_VALIDATION = "validation"


@dataclass(frozen=True)
class Keys:
    """The keys of a recipe's stages.

    ``model_digest`` gives the digest of a model's files by its reference, ``folder_digest`` that of another folder.
    """

    recipe: Recipe
    data: Dataset
    model_digest: Callable[[str], str]
    folder_digest: Callable[[str], str]

    def start(self) -> str:
        """SHA-256 over the starting model's files and what decides how its head is made, as hex."""
        head = {"labels": self.data.labels, "seed": self.recipe.seed, "task": self.recipe.task}
        return cache_key({"files": self.model_digest(self.recipe.model), "head": head})

    def stage(self, stage: Stage[Any, Any], input_digest: str, referred: Sequence[str]) -> str:
        """The key of ``stage`` on files of ``input_digest``; ``referred``: digests of what it refers to, in order."""
        named = stage.paths().values()
        folders = [self.folder_digest(one.name) for one in named if one.kind != "model"]
        models = [self.model_digest(one.name) for one in named if one.kind == "model"]
        return cache_key(
            {
                **({"folders": folders} if folders else {}),
                **({"models": models[1:]} if models[1:] else {}),
                "stage": stage.key_fields(),
                "version": stage.version,
                "input": input_digest,
                "refers_to": list(referred),
                "student": models[0] if models else None,
                "data": self._data(stage),
                "max_length": self.recipe.data.max_length,
                "seed": self.recipe.seed,
                "packages": package_versions(stage.calls()),
            }
        )

    def _data(self, stage: Stage[Any, Any]) -> str | None:
        needs = stage.needs()
        if not needs.splits and not needs.unlabeled:
            return None
        validation = (_VALIDATION,) if _VALIDATION in self.data.splits else ()
        return self.data.digest(*needs.splits, *validation, unlabeled=needs.unlabeled)
