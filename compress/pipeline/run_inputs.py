"""Everything that a run reads: its models, data, folders and evaluation files, each resolved and checked once."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from compress.data.dataset import Dataset, load_dataset
from compress.data.judged import Instruction, Question, RatedPairs, find_instructions, find_questions, find_rated_pairs
from compress.data.slices import Slice, extra_columns
from compress.data.source import find
from compress.data.vector_index import VectorIndex, find_index, is_index_file
from compress.models.config_checks import allow_repository_code
from compress.models.folder_checks import check_weights_finite
from compress.models.json_file import read_json
from compress.recipe.recipe import Recipe
from compress.sources.build_model import ModelOrigin
from compress.sources.onnx_file import onnx_file
from compress.sources.resolve import find_model, resolve_model
from compress.stages.base import all_references
from compress.stages.training.processes import num_processes, own_device
from compress.tasks.capability import TAKES_ARRAYS
from compress.tasks.registry import TASKS
from compress.tasks.task import Task
from compress.utils.errors import InputError
from compress.utils.progress import Progress
from compress.utils.torch_device import resolve_device


@dataclass
class RunInputs:
    """Inputs of one recipe, read when they are first used.

    ``models_cache`` is the folder below which built and converted models are stored.
    """

    recipe: Recipe
    recipe_folder: Path
    models_cache: Path
    progress: Progress
    models: dict[str, Path] = field(default_factory=dict)
    """Resolved model folders by reference."""
    local_folders: dict[str, Path] = field(default_factory=dict)
    """Local copies of folders that the recipe names, where a job brought them from another machine."""

    @cached_property
    def task(self) -> Task:
        """Return the recipe's task, specialized for its model's type."""
        task = TASKS[self.recipe.task]
        return task if len(task.variants()) == 1 else task.specialize(read_json(self.start / "config.json"))

    @cached_property
    def data(self) -> Dataset:
        """Return the recipe's data, with the columns that slices read."""
        columns = self.task.columns
        extra = extra_columns(self.slices, (column.name for column in columns))
        return load_dataset(self.recipe.data, columns, self.recipe_folder, self.progress, extra)

    @cached_property
    def questions(self) -> list[Question]:
        """Return the multiple-choice questions, empty if the recipe names no file."""
        reference = self.recipe.evaluation.questions
        return [] if reference is None else find_questions(reference, self.recipe_folder, self.progress)

    @cached_property
    def instructions(self) -> list[Instruction]:
        """Return the instructions for chat models, empty if the recipe names none."""
        reference = self.recipe.evaluation.instructions
        return [] if reference is None else find_instructions(reference, self.recipe_folder)

    @cached_property
    def rated_pairs(self) -> list[RatedPairs]:
        """Return the pairs with human similarity scores, empty if the recipe names none."""
        reference = self.recipe.evaluation.similarity
        return [] if reference is None else find_rated_pairs(reference, self.recipe_folder, self.progress)

    @cached_property
    def vector_index(self) -> VectorIndex | None:
        """Return the vectors of an existing index, or None if the recipe names no file."""
        reference = self.recipe.evaluation.index
        return find_index(reference, self.recipe_folder) if is_index_file(reference) else None

    @cached_property
    def judge(self) -> Path | None:
        """Return the folder of the classifier that judges generated images, or None if the recipe names none."""
        reference = self.recipe.evaluation.judge
        return None if reference is None else self.resolve(reference)

    @property
    def slices(self) -> tuple[Slice, ...]:
        """Return the recipe's slices, or the task's if the recipe names none."""
        return self.task.slices if self.recipe.slices is None else self.recipe.slices

    @cached_property
    def start(self) -> Path:
        """Return the folder of the starting model."""
        return self.resolve(self.recipe.model)

    @cached_property
    def given(self) -> Path:
        """Return the file or folder of the starting model as the user gave it, before any conversion."""
        return find_model(str(find(self.recipe.model, self.recipe_folder) or self.recipe.model), self.progress)

    @cached_property
    def from_graph(self) -> bool:
        """Return True if the starting model is an ONNX file."""
        return onnx_file(self.start) is not None

    @cached_property
    def device(self) -> str:
        """Return the torch device of the stages. Raises `InputError` if the recipe's device is not available."""
        device = resolve_device(self.recipe.device)
        return own_device(device) if num_processes() > 1 else device

    def resolve(self, reference: str) -> Path:
        """Return the checked local folder of a model that the recipe names; fetch or build the model if needed.

        Raises `ModelError` for a missing, damaged or unsafe model, and `SampleError` for a sample that cannot be
        fetched.
        """
        if reference in self.models:
            return self.models[reference]
        recipe, path = self.recipe, str(find(reference, self.recipe_folder) or reference)
        # A model that is built from code or with random weights is built first.
        module, arguments, random_weights = recipe.module, recipe.module_arguments, recipe.random_weights
        if reference != recipe.model:
            module, arguments = None, {}
            random_weights = any(
                other.random_weights and other.name == reference for other in all_references(recipe.stages)
            )
        if module is not None or random_weights:
            origin = ModelOrigin(module, random_weights, recipe.seed, self.recipe_folder, arguments)
            path = str(origin.make(find_model(path, self.progress), self.models_cache, self.progress))
        folder = resolve_model(
            path,
            trust_remote_code=recipe.trust_remote_code,
            cache=self.models_cache,
            progress=self.progress,
            arrays=TAKES_ARRAYS in TASKS[recipe.task].capabilities,
            checker=recipe.safety_checker,
        )
        if recipe.trust_remote_code:
            allow_repository_code(folder)
        if onnx_file(folder) is None:
            check_weights_finite(folder)
        self.models[reference] = folder
        return folder

    def locate(self, reference: str) -> Path:
        """Return a folder that the recipe names, absolute or beside the recipe. Raises `InputError`."""
        folder = self.local_folders.get(reference) or find(reference, self.recipe_folder)
        if folder is None or not folder.is_dir():
            raise InputError(f"There is no folder {reference!r}.", where=str(self.recipe_folder), hint="check the path")
        return folder
