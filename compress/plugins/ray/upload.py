"""Orders for workers, and the files and rows that a machine lacks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from compress.data.dataset import Dataset
from compress.data.media import with_contents
from compress.pipeline.runner import StageRunner
from compress.plugins.ray.cluster import Cluster
from compress.plugins.ray.jobs import WorkItem
from compress.plugins.ray.task import WorkOrder, pack
from compress.stages.base import all_references
from compress.utils.storage import digest_directory


class Uploader:
    """Sender of orders and files. ``shared`` is the driver's own folder, which workers on its machine use as well."""

    def __init__(self, cluster: Cluster, shared: str) -> None:
        self.cluster, self.shared = cluster, shared
        self._sent: dict[str, Any] = {}
        """References to objects in the cluster's object store, by digest."""
        self._data: tuple[Dataset, str] | None = None
        self._digests: dict[Path, str] = {}

    def order(self, item: WorkItem, runner: StageRunner) -> WorkOrder:
        """Return the order of a work item; ``runner`` is the driver's, with the stages that are finished."""
        job, recipe = item.dag_job.job, runner.recipe
        labels, references = job.labels(), all_references(recipe.stages)
        earlier = zip(labels, item.inputs(), strict=False)
        function = (
            job.measure if item.is_timing else job.evaluate_baseline if item.is_baseline_evaluation else job.evaluate
        )
        models = [recipe.model, *(reference.name for reference in references if reference.kind == "model")]
        folders = [reference.name for reference in references if reference.kind != "model"]
        baseline_entries = () if item.baseline_item is None else item.baseline_item.entries
        return WorkOrder(
            recipe=recipe,
            label=item.label,
            function=None if item.label is not None else function,
            earlier=tuple((label, entry.key, entry.record) for label, entry in earlier),
            needs=frozenset(labels if item.label is None else runner.input_labels(item.label)),
            baseline_entries=tuple((entry.key, entry.record) for entry in baseline_entries),
            is_baseline_evaluation=item.is_baseline_evaluation,
            models={name: self._named(runner.inputs.resolve(name)) for name in models},
            folders={name: self._named(runner.inputs.locate(name)) for name in folders},
            data=self._data_digest(runner),
            threads=self.cluster.threads,
            host=self.cluster.here.host,
            shared=self.shared,
        )

    def references(self, item: WorkItem, order: WorkOrder, missing: Iterable[str]) -> dict[str, list[Any]]:
        """Return references to the missing objects, and to others that were sent before and that the order needs."""
        for digest in missing:
            if digest not in self._sent:
                self._sent[digest] = self.cluster.ray.put(self._content(digest, item))
        # In lists, so that a machine fetches what it lacks and nothing else.
        return {digest: [self._sent[digest]] for digest in order.digests() if digest in self._sent}

    def forget_entries(self) -> None:
        """Remove all objects from the store except the recipe's sources."""
        sources = {*self._digests.values(), "" if self._data is None else self._data[1]}
        self._sent = {digest: item for digest, item in self._sent.items() if digest in sources}

    def _named(self, folder: Path) -> tuple[str, str]:
        """Return the digest and the path of a folder."""
        path = folder.resolve()
        if path not in self._digests:
            self._digests[path] = digest_directory(path)
        return self._digests[path], str(path)

    def _data_digest(self, runner: StageRunner) -> str:
        data = runner.inputs.data
        if self._data is None or self._data[0] is not data:
            # Extra columns are part of the rows but not of the data's own digest.
            extra = json.dumps({split: sorted(names) for split, names in data.extra.items()})
            self._data = data, f"{data.digest(*data.splits, unlabeled=True)}-{extra}"
        return self._data[1]

    def _content(self, digest: str, item: WorkItem) -> Any:
        """Return the object with a digest: a packed folder, or the data with the bytes of its files."""
        for entry in item.available_entries():
            if entry.key == digest:
                return pack(entry.folder)
        if self._data is not None and self._data[1] == digest:
            data = self._data[0]
            tables = {split: with_contents(table) for split, table in data.tables.items()}
            unlabeled = None if data.unlabeled is None else with_contents(data.unlabeled)
            return replace(data, tables=tables, unlabeled=unlabeled)
        return pack(next(folder for folder, folder_digest in self._digests.items() if folder_digest == digest))
