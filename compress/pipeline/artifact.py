"""Artifacts that commands name: a model folder with its recipe, and the outputs of the run that made it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from compress.data.dataset import Dataset, label_column, load_dataset
from compress.evaluation.evaluate import encode_for_model
from compress.evaluation.loaded_model import LoadedModel
from compress.formats.model_file import format_of, holds, model_files
from compress.formats.registry import FORMATS
from compress.formats.target_profile import AppProfile, Target, TargetProfile
from compress.formats.targets import PROFILES, find_target
from compress.models.config_checks import allow_module
from compress.models.json_file import labels_of_config, read_json
from compress.pipeline.cache import Cache
from compress.pipeline.formats import measurable, unsupported_reason
from compress.pipeline.runner import StageRunner
from compress.recipe.loading import read_recipe
from compress.recipe.recipe import Recipe
from compress.report.run_folder import MODEL, RECIPE, REPORT, TARGETS, finished_runs, model_folder
from compress.results.report import FINAL
from compress.sources.onnx_file import convert_onnx, onnx_file
from compress.sources.resolve import DEFAULT_CACHE
from compress.tasks.capability import TAKES_ARRAYS
from compress.tasks.registry import TASKS, tasks_with
from compress.tasks.task import Examples, Task
from compress.utils.environment import working_threads
from compress.utils.errors import InputError, did_you_mean
from compress.utils.progress import Progress


@dataclass(frozen=True)
class Artifact:
    """Model folder with the recipe that names its task and data."""

    folder: Path
    recipe: Recipe
    recipe_folder: Path

    @property
    def task(self) -> Task:
        """Return the recipe's task, specialized to the model."""
        return TASKS[self.recipe.task].specialize(read_json(self.folder / "config.json"))

    def dataset(self, progress: Progress) -> Dataset:
        """Return the recipe's data."""
        return load_dataset(self.recipe.data, self.task.columns, self.recipe_folder, progress)

    def with_test_rows(self, data: Path) -> Artifact:
        """Return the artifact with the rows of a file or folder as its test split, and with the classes of the model.

        Raises `InputError` if there is no such file.
        """
        if not data.expanduser().exists():
            raise InputError(
                f"There is no file {str(data)!r}.",
                where="--data",
                expected="a file or folder of rows with the columns of the recipe's test split",
            )
        labels = self.recipe.data.labels
        if labels is None and label_column(self.task.columns) is not None:
            config = self.folder / "config.json"
            labels = labels_of_config(read_json(config), config)
        changes = {
            "splits": {"test": str(data.expanduser().resolve())},
            "also": {},
            "unlabeled": (),
            "hold_out": None,
            "labels": labels,
        }
        recipe = self.recipe.model_copy(update={"data": self.recipe.data.model_copy(update=changes)})
        return replace(self, recipe=recipe)

    def open(self, target: str | None = None, threads: int | None = None) -> LoadedModel:
        """Open the model for predictions, by default with the first target of its format.

        A target that the run wrote files for opens those. Raises `InputError` if the target does not open the model.
        """
        written = self.folder.parent / TARGETS / (target or "")
        folder = written if target and self.folder.name == MODEL and written.is_dir() else self.folder
        profile = FORMATS[format_of(folder)].targets[0] if target is None else TargetProfile(find_target(target))
        check_opens(folder, profile.target)
        return LoadedModel(folder, self.task, self.recipe.data.max_length, profile.target, threads or working_threads())

    def examples(self, progress: Progress, folder: Path | None = None) -> Examples:
        """Return the test split, encoded by the processor beside the model or in ``folder``."""
        rows = self.dataset(progress).split("test")
        return encode_for_model(
            folder or self.folder, self.task, rows, self.recipe.data.max_length, self.recipe.evaluation
        )

    def runner(self, scratch: Path, progress: Progress, **benchmark: object) -> StageRunner:
        """Return a runner of the recipe.

        Args:
            scratch: Folder of its cache.
            progress: Progress display.
            **benchmark: Benchmark settings that replace the recipe's, unless they are None.
        """
        changes = {name: value for name, value in benchmark.items() if value is not None}
        settings = self.recipe.benchmark.model_copy(update=changes)
        recipe = self.recipe.model_copy(update={"benchmark": settings})
        return StageRunner(recipe, self.recipe_folder, scratch, progress)


def find_artifact(path: Path, recipe: Path | None) -> Artifact:
    """Return the artifact at a path: a run's folder, its `model` folder, a recipe's name (its latest run) or a model.

    Without a recipe the path may be an ONNX graph from elsewhere, which gets random inputs. Raises `InputError` if
    there is no model that a runtime opens, or no recipe for it.
    """
    folder = model_folder(path)
    # A graph without a folder of its own is converted into one.
    graph = onnx_file(path) if folder is None and recipe is None else None
    if graph is not None:
        task = TASKS[tasks_with(frozenset({TAKES_ARRAYS}))[0]]
        fields = {"name": "graph", "task": task.name, "model": str(graph), "data": task.data, "stages": ["ort"]}
        model = convert_onnx(graph, DEFAULT_CACHE, arrays=True)
        return Artifact(model, Recipe.model_validate(fields), graph.parent)
    if folder is None:
        raise InputError(
            f"There is no model in {str(path)!r}.{did_you_mean(str(path), names := finished_runs())}",
            expected="a run's folder, a folder with config.json and one .onnx file, or a recipe that was run",
            hint=f"recipes with a run in this folder: {', '.join(names)}" if names else None,
        )
    # Files for a target lie one folder deeper than the model of the run.
    source = recipe or (folder.parent.parent if folder.parent.name == TARGETS else folder.parent) / RECIPE
    if not source.is_file():
        raise InputError(
            "There is no recipe with the task and data of this model.",
            where=str(folder),
            hint="name a recipe with --recipe, in Python with recipe=; its task, data and benchmark sections are used",
        )
    loaded = read_recipe(source)
    if recipe is None:
        # Whoever sends a run may have written its recipe, which therefore permits no code.
        loaded = loaded.model_copy(update={"module": None, "module_arguments": {}, "trust_remote_code": False})
    # Raise an error for a folder without model files now, and not after the data is read.
    model_files(folder)
    if loaded.module is not None:
        allow_module(loaded.module, source.parent, loaded.module_arguments)
    return Artifact(folder, loaded, source.parent)


def check_opens(folder: Path, target: Target) -> None:
    """Raise `InputError` if ``folder`` contains no file that the runtime of ``target`` opens."""
    # A runtime may open more formats than the one that the target stands for.
    readable = {
        form: spec for form, spec in FORMATS.items() if form == target.format or target.runtime in spec.runtimes
    }
    if not any(holds(folder, form) for form in readable):
        form, endings = format_of(folder), " or ".join(spec.suffix for spec in readable.values())
        suitable = [name for name, other in PROFILES.items() if other.target.format == form]
        raise InputError(
            f"{target.name} does not open {form.upper()}, the format of the folder.",
            where=str(folder),
            expected=f"a folder with config.json and one file ending in {endings}",
            hint=f"name a --target that does: {', '.join(suitable)}",
        )


def has_recipe(path: Path) -> bool:
    """Return whether a recipe lies in a run's folder, or beside its model's folder or a file in that."""
    return any((folder / RECIPE).is_file() for folder in (path, path.parent, path / "latest"))


def written_for(artifact: Artifact, profile: AppProfile) -> Path:
    """Return the file that the run wrote for a target if an app opens it, else the model itself."""
    folder = artifact.folder.parent / TARGETS / profile.name
    fits = artifact.folder.name == MODEL and folder.is_dir() and format_of(folder) in profile.apps
    return folder if fits else artifact.folder


def run_of(model: Path) -> Path | None:
    """Return the folder of the finished run that ``model`` is, or is in."""
    folders = (model, model.parent, model / "latest")
    run = next((folder for folder in folders if (folder / REPORT).is_file()), None)
    return None if run is None else run.resolve()


def outputs_of(run: Path) -> dict[str, Path]:
    """Return the folder of each stage's output that is still in the cache, by label."""
    stages = read_json(run / REPORT).get("stages", [])
    # A run's folder is ARTIFACTS/runs/NAME/TIME.
    cache_folder = run.parents[2] / "cache"
    if not cache_folder.is_dir():
        return {}
    cache = Cache(cache_folder)
    entries = {stage["name"]: cache.peek(stage["key"]) for stage in stages}
    return {name: entry.folder for name, entry in entries.items() if entry is not None}


def final_for(run: Path, recipe: Recipe, target: Target, progress: Progress) -> Path:
    """Return the run's final model in the format of ``target``, from the cache or written there now.

    Args:
        run: Folder of the run.
        recipe: The run's recipe.
        target: The target.
        progress: Progress display.

    Raises:
        InputError: If the cache no longer has the stages' outputs, or the model cannot be written in that format.
    """
    only_final = recipe.benchmark.model_copy(update={"every_stage": False})
    runner = StageRunner(recipe.model_copy(update={"benchmark": only_final}), run, run.parents[2], progress)
    # Ask before any stage output is loaded.
    reason = unsupported_reason(recipe, runner.inputs.start, target, runner.inputs.from_graph)
    if reason is not None:
        raise InputError(f"The run's model is not available for {target.name}: {reason}", where=str(run))
    for label in runner.recipe.labels():
        # A missing output would be trained anew.
        if runner.cache.peek(runner.stage_key(label)) is None:
            raise InputError(
                f"The output of {label} is no longer in the run's cache, or other versions of packages made it.",
                where=str(runner.artifacts),
                hint="run the recipe again, or name the file itself instead of the run",
            )
        runner.run_stage(label)
    options = next((profile.options for profile in recipe.profiles() if profile.name == target.name), {})
    return measurable(runner, target.format, options)[FINAL]
