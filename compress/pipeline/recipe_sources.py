"""Sizes and problems of a recipe's model and data, without reading weights or rows."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress.data.arrays import Draws
from compress.data.columns import check_extra
from compress.data.config import is_sample, sample_split
from compress.data.dataset import TEST
from compress.data.instructions import find_instructions
from compress.data.judged import find_questions, find_rated_pairs
from compress.data.samples.fetch import cached_directory
from compress.data.samples.sample import find_sample
from compress.data.slices import extra_columns
from compress.data.source import HubSplit, Location, find, locate_split, locate_unlabeled, read
from compress.formats.onnx.graph_reader import first_integer_operator, read_graph
from compress.models.config_checks import check_config
from compress.models.folder_checks import refuse_quantized
from compress.models.image_generation import image_generation_hook
from compress.models.lora_adapter import check_adapter
from compress.models.pipeline_folder import is_pipeline
from compress.pipeline.checkpoint_headers import folder_bytes, read_shape, read_size
from compress.pipeline.plan import SourcePlan
from compress.recipe.recipe import Recipe
from compress.sources.onnx_file import companions_of, onnx_file
from compress.sources.resolve import find_model, local_task_variants
from compress.stages.base import Reference, all_references
from compress.stages.cost_model import Shape, Text
from compress.tasks.capability import EXPORTED_FROM_CHECKPOINT, TAKES_ARRAYS
from compress.tasks.registry import get_task
from compress.utils.errors import CompressError, DataError, InputError, ModelError
from compress.utils.progress import Progress, SilentProgress

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w./-]+)?$")


class Sources:
    """Model and data of a recipe as they are on this machine, with all ``problems`` found."""

    def __init__(self, recipe: Recipe, recipe_folder: Path) -> None:
        self.recipe = recipe
        self.folder = recipe_folder
        self.problems: list[CompressError] = []
        self.rows: list[SourcePlan] = []
        self.texts: dict[str, Text] = {}
        self.downloads: dict[str, int] = {}
        self.task = local_task_variants(get_task(recipe.task), recipe.model, recipe_folder)[0]
        """The kind of task that the model is for; the first, where it is not here to tell."""
        self.start: Path | None = None
        """The folder of the starting model, where it is here."""

    def find_all(self) -> Shape | None:
        """Describe the model and every data source; return the starting model's shape if it is local."""
        recipe = self.recipe
        is_built = recipe.module is not None or recipe.random_weights
        shape = None if is_built else self.model(recipe.model, "model")
        if is_built:
            self._made_model(recipe.model, "model", recipe.module, recipe.random_weights)
        elif shape is not None:
            self.start = self._model_path(recipe.model)
        for split, reference in recipe.data.splits.items():
            with self._noting():
                self._split(split, reference)
        for reference in recipe.data.unlabeled:
            with self._noting():
                location = locate_unlabeled(reference, self.folder, cached_directory)
                self._describe(f"unlabeled {reference}", reference, location, (), reference)
        for stage_reference in dict.fromkeys(all_references(recipe.stages)):
            if stage_reference.kind != "model":
                with self._noting():
                    self._folder(stage_reference)
        if recipe.evaluation.judge is not None:
            self.model(recipe.evaluation.judge, "evaluation.judge")
        with self._noting():
            self._judged("questions", recipe.evaluation.questions, find_questions)
            self._judged("similarity", recipe.evaluation.similarity, find_rated_pairs)
            if recipe.evaluation.instructions:
                find_instructions(recipe.evaluation.instructions, self.folder)
        return shape

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Record an `InputError` as a problem and continue."""
        try:
            yield
        except InputError as error:
            self.problems.append(error)

    def _here(self, role: str, reference: str, path: Path, **more: Any) -> None:
        """Add the row of a local file or folder."""
        size = folder_bytes(path)
        self.rows.append(
            SourcePlan(role=role, reference=reference, status="here", path=str(path), size_bytes=size, **more)
        )

    def _judged(self, role: str, reference: str | None, read: Callable[[str, Path, Progress], Any]) -> None:
        """Read evaluation data if it is local. Raises `InputError`."""
        if reference is None:
            return
        if is_sample(reference) and cached_directory(reference.removeprefix("sample:")) is None:
            self._unknown(role, reference)
        else:
            read(reference, self.folder, SilentProgress())

    def model(self, reference: str, role: str) -> Shape | None:
        """Describe a model and return its shape if it is local."""
        with self._noting():
            path = self._model_path(reference)
            if path is None:
                self._unknown(role, reference)
                return None
            try:
                shape = read_shape(path)
                graph = onnx_file(path)
                if graph is not None:
                    self._check_graph(graph)
                elif (path / "config.json").is_file():
                    check_config(path, self.recipe.trust_remote_code)
                if is_pipeline(path):
                    image_generation_hook("check_safety_checker")(path, self.recipe.safety_checker)
                elif graph is None and EXPORTED_FROM_CHECKPOINT not in self.task.capabilities and path.is_dir():
                    refuse_quantized(path)
            except OSError as error:
                what = f"The model cannot be read: {error.strerror or error}."
                raise ModelError(what, where=error.filename or reference) from error
            self._here(role, reference, path, parameters=round(shape.parameters))
            return shape
        return None

    def _check_graph(self, file: Path) -> None:
        """Raise `InputError` for a graph that the recipe's stages cannot process."""
        if TAKES_ARRAYS not in get_task(self.recipe.task).capabilities:
            companions_of(file)
        stage = next((candidate for candidate in self.recipe.stages if candidate.output_spec().integer_graph), None)
        operator = first_integer_operator(read_graph(file)) if stage else None
        if stage and operator:
            raise ModelError(
                f"The graph is quantized already: it has the operator {operator}.",
                where=str(file),
                expected=f"a float graph, which {stage.kind} takes",
                hint="start from the float model; quantizing twice loses accuracy for nothing",
            )

    def named_model(self, reference: str, random_weights: bool) -> Shape | None:
        """Describe a model that a stage names and return its shape if its weights are local."""
        if not random_weights:
            return self.model(reference, "student")
        self._made_model(reference, "student", None, random_weights=True)
        return None

    def _made_model(self, reference: str, role: str, module: str | None, random_weights: bool) -> None:
        """Describe a model that is built from code or a config. Its shape is unknown until the code has run.

        Args:
            reference: The config's or code's folder.
            role: Role of the model in the recipe.
            module: Function that builds it.
            random_weights: True if its weights are random.
        """
        with self._noting():
            path = self._model_path(reference)
            if module is not None:
                check_module(module, self.folder)
            if path is None:
                self._unknown(role, reference)
                return
            origin = "random weights" if random_weights else "its weights"
            self._here(role, reference, path, note=f"made by {module or 'its config'}, with {origin}")

    def _model_path(self, reference: str) -> Path | None:
        """Return the path of a model, or None if it must be downloaded. Raises `ModelError` or `SampleError`."""
        if is_sample(reference):
            sample = find_sample(reference)
            if sample.kind != "model":
                raise InputError(f"{reference} is data, not a model.", hint="`compress samples` lists the models")
            return cached_directory(sample.name)
        return find(reference, self.folder) or _in_hub_cache(reference)

    def _split(self, split: str, reference: str) -> None:
        """Describe a split of the data."""
        source = self.recipe.data.source
        sample = sample_split(reference)
        source = sample[0] if sample else source
        shown = reference if source is None or sample else f"{source} ({reference})"
        location = locate_split(self.recipe.data, split, self.folder, cached_directory)
        self._describe(f"split {split}", shown, location, self.recipe.data.columns.values(), source)
        if split == TEST and isinstance(location, Path):
            self._check_slices(location)

    def _check_slices(self, place: Path) -> None:
        """Raise `DataError` for a slice whose column the test split does not have."""
        task = (column.name for column in self.task.columns)
        extra = extra_columns(self.recipe.slices or (), task)
        if extra:
            check_extra(read(place, ()), extra)

    def _folder(self, reference: Reference) -> None:
        """Describe a folder that a stage names, and check an adapter."""
        name, path = reference.name, find(reference.name, self.folder)
        if path is None:
            raise InputError(f"There is no folder {name!r}.", where=str(self.folder), hint="check the path")
        if reference.kind == "adapter":
            check_adapter(path)
        self._here(reference.kind, name, path)

    def _describe(
        self, role: str, shown: str, place: Location | None, columns: Iterable[str], source: str | None
    ) -> None:
        """Add the row of a data source and check its columns.

        Args:
            role: Role of the data, such as `split test`.
            shown: Reference as shown to the user.
            place: Location of the data, or None if it must be downloaded.
            columns: Columns that the recipe names.
            source: Reference of the source.
        """
        if place is None or isinstance(place, HubSplit):
            self._unknown(role, shown, source)
            return
        if isinstance(place, Draws):
            self.rows.append(SourcePlan(role=role, reference=shown, status="here", path=None, rows=place.count))
            return
        text, names = read_size(place)
        missing = [column for column in columns if names and column not in names]
        if missing:
            raise DataError(
                f"{place.name} has no column {missing[0]!r}.",
                where=f"{place}, named in data.columns",
                expected=f"one of its columns: {', '.join(names)}",
            )
        self.texts[role] = text
        self._here(role, shown, place, rows=text.rows)

    def _unknown(self, role: str, shown: str, source: str | None = None) -> None:
        """Add the row of a source that must be downloaded."""
        reference = source or shown
        note = "no local path; fetched from the Hugging Face Hub when the run begins"
        if is_sample(reference):
            sample = find_sample(reference)
            self.downloads[sample.name] = sample.download_bytes
            note = f"{sample.download_bytes / 1e6:.0f} MB: compress samples fetch {sample.name}"
        self.rows.append(SourcePlan(role=role, reference=shown, status="unknown until fetched", path=None, note=note))


def _in_hub_cache(reference: str) -> Path | None:
    """Return an earlier download of a Hugging Face id. Raises `ModelError` for neither a path nor an id."""
    try:
        return find_model(reference)
    except ModelError:
        if not _HUB_ID.match(reference) or Path(reference).suffix in (
            ".gguf",
            ".onnx",
            ".safetensors",
            ".bin",
        ):
            raise
        return None


def check_module(reference: str, folder: Path) -> None:
    """Check that the code of a custom module exists, without running it. Raises `ModelError`."""
    module = reference.partition(":")[0]
    if module.endswith(".py"):
        exists = (folder / module).is_file()
    else:
        exists = importlib.util.find_spec(module.partition(".")[0]) is not None
    if not exists:
        raise ModelError(
            f"The code that makes the model, {reference}, is not here.",
            where="module",
            expected="a function of an installed package, or of a file beside the recipe",
        )
