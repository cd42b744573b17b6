"""Sizes and problems of a recipe's model and data, without reading weights."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet

from compress.data.config import SPLITS, is_sample, sample_split
from compress.data.dataset import Dataset, load_dataset
from compress.data.judged import find_instructions, find_questions, find_rated_pairs
from compress.data.samples.fetch import cached_directory
from compress.data.samples.sample import find_sample
from compress.data.slices import extra_columns
from compress.data.source import Draws, HubSplit, Location, Undivided, find, locate_split, locate_unlabeled
from compress.data.vector_index import find_index, is_index_file
from compress.formats.gguf.model import read_gguf
from compress.formats.onnx.graph_reader import first_integer_operator, read_graph
from compress.formats.onnx.stored_tensors import read_tensors
from compress.formats.quiet_output import quiet_libraries
from compress.models.config_checks import check_config
from compress.models.folder_checks import check_model_folder, refuse_quantized, weight_files
from compress.models.json_file import read_json
from compress.models.lora_adapter import check_adapter
from compress.models.pipeline_folder import image_generation_hook, is_pipeline
from compress.models.safetensors_file import read_header
from compress.pipeline.plan import SourcePlan
from compress.recipe.recipe import Recipe
from compress.sources.onnx_file import companions_of, onnx_file
from compress.sources.resolve import find_model, local_task_variants
from compress.stages.base import all_references
from compress.stages.cost_model import Shape, Text
from compress.tasks.capability import EXPORTED_FROM_CHECKPOINT, TAKES_ARRAYS
from compress.tasks.registry import TASKS
from compress.utils.errors import CompressError, InputError, ModelError, StageError
from compress.utils.progress import Progress, SilentProgress


def content_bytes(path: Path) -> int:
    """Return the bytes of a data file or folder, uncompressed for Parquet."""
    if path.suffix != ".parquet":
        return folder_bytes(path)
    metadata = pyarrow.parquet.read_metadata(path)
    return sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))


def folder_bytes(path: Path) -> int:
    """Return the bytes of all files below a folder, or of a file."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_EMBEDDING = re.compile(r"embed|embd|wte|wpe")
_ATTENTION = re.compile(r"att")


def read_shape(path: Path) -> Shape:
    """Return the shape of a model folder, or of a GGUF or ONNX file. Raises `ModelError` if it is damaged or unsafe."""
    if path.is_dir() and not (path / "config.json").is_file() and len(gguf_files := list(path.glob("*.gguf"))) == 1:
        path = gguf_files[0]
    if (graph := onnx_file(path)) is not None:
        stored = read_tensors(graph, graph.parent)
        return count(((tensor.name, tensor.shape) for tensor in stored if tensor.role == "weight"), {}, 0)
    if path.is_file():
        header = read_gguf(path)
        architecture = str(header.metadata.get("general.architecture", ""))
        sizes = {name: header.metadata.get(f"{architecture}.{key}") for name, key in _GGUF_SIZES.items()}
        return count(((tensor.name, tensor.shape) for tensor in header.tensors), sizes, 0)
    check_model_folder(path)
    files = weight_files(path)
    processor = sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and file not in files)
    tensors = [tensor for file in files for tensor in read_header(file)]
    config = {} if is_pipeline(path) else read_json(path / "config.json")
    return count(((tensor.name, tensor.shape) for tensor in tensors), config, processor)


def random_shape(folder: Path) -> Shape:
    """Return the shape of the model that a folder's config.json describes, whose weights are made at random.

    The config is built without memory for weights, which imports torch. Raises `ModelError`.
    """
    from compress.sources.build_model import random_shapes

    quiet_libraries()
    processor = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    return count(random_shapes(folder), read_json(folder / "config.json"), processor)


_GGUF_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
}


def count(tensors: Iterable[tuple[str, tuple[int, ...]]], config: dict[str, Any], processor_bytes: int) -> Shape:
    """Sort tensors by name into embeddings, attention, other layer weights and the rest, and sum their parameters."""
    sums = dict.fromkeys(("embeddings", "attention", "feed_forward", "other"), 0)
    layers: set[int] = set()
    num_tensors = 0
    for name, shape in tensors:
        num_tensors += 1
        layer = _LAYER.search(name)
        if layer:
            layers.add(int(layer[1]))
        if not layer and len(shape) == 2 and _EMBEDDING.search(name):
            group = "embeddings"
        elif layer:
            group = "attention" if _ATTENTION.search(name) else "feed_forward"
        else:
            group = "other"
        sums[group] += math.prod(shape)
    return Shape(
        **sums,
        layers=len(layers),
        hidden=_size(config, "hidden_size"),
        intermediate=_size(config, "intermediate_size"),
        heads=_size(config, "num_attention_heads"),
        processor_bytes=processor_bytes,
        tensors=num_tensors,
    )


def _size(config: dict[str, Any], name: str) -> int:
    """Return a positive size of the config, or 0."""
    value = config.get(name)
    return value if isinstance(value, int) and value > 0 else 0


_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w./-]+)?$")


class Sources:
    """Model and data of a recipe as they are on this machine, with all ``problems`` found.

    ``progress`` receives notes about rows that are left out. Nothing is downloaded.
    """

    def __init__(self, recipe: Recipe, recipe_folder: Path, progress: Progress | None = None) -> None:
        self.recipe = recipe
        self.folder = recipe_folder
        self.progress = progress or SilentProgress()
        self.problems: list[CompressError] = []
        self.rows: list[SourcePlan] = []
        self.texts: dict[str, Text] = {}
        self.downloads: dict[str, int] = {}
        self.task = local_task_variants(TASKS[recipe.task], recipe.model, recipe_folder)[0]
        """The kind of task that the model is for; the first, where it is not here to tell."""
        self.start: Path | None = None
        """The folder of the starting model, where it is here."""
        self.data: Dataset | None = None
        """Data that is local, or None if it has problems."""

    def find_start(self) -> Shape | None:
        """Describe the starting model; return its shape if it is local."""
        recipe = self.recipe
        if recipe.module is not None or recipe.random_weights:
            return self._made_model(recipe.model, "model", recipe.module, recipe.random_weights)
        shape = self.model(recipe.model, "model")
        self.start = None if shape is None else self._model_path(recipe.model)
        return shape

    def find_data(self) -> None:
        """Read and describe the local data."""
        recipe = self.recipe
        with self.noting():
            extra = extra_columns(recipe.slices or (), (column.name for column in self.task.columns))
            self.data = load_dataset(
                recipe.data, self.task.columns, self.folder, self.progress, extra=extra, fetch=False, decode_images=True
            )
            self._describe_data(self.data)

    def find_all(self) -> Shape | None:
        """Describe the model and every data source; return the starting model's shape if it is local."""
        recipe, shape = self.recipe, self.find_start()
        self.find_data()
        folders = [reference for reference in all_references(recipe.stages) if reference.kind != "model"]
        for kind, name in dict.fromkeys((reference.kind, reference.name) for reference in folders):
            with self.noting():
                path = find(name, self.folder)
                if path is None:
                    raise InputError(f"There is no folder {name!r}.", where=str(self.folder), hint="check the path")
                if kind == "adapter":
                    check_adapter(path)
                self._here(kind, name, path)
        if recipe.evaluation.judge is not None:
            self.model(recipe.evaluation.judge, "evaluation.judge")
        with self.noting():
            self._judged("questions", recipe.evaluation.questions, find_questions)
            self._judged("similarity", recipe.evaluation.similarity, find_rated_pairs)
            if is_index_file(recipe.evaluation.index):
                find_index(recipe.evaluation.index, self.folder)
            if recipe.evaluation.instructions:
                find_instructions(recipe.evaluation.instructions, self.folder)
        return shape

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Record an error of the input or of a stage as a problem and continue."""
        try:
            yield
        except (InputError, StageError) as error:
            self.problems += error.errors or (error,)

    def _here(self, role: str, reference: str, path: Path, **more: object) -> None:
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
        with self.noting():
            path = self._model_path(reference)
            if path is None:
                self._unknown(role, reference)
                return None
            try:
                shape = read_shape(path)
                graph = onnx_file(path)
                if graph is not None:
                    # Raise `InputError` for a graph that the recipe's stages cannot process.
                    if TAKES_ARRAYS not in TASKS[self.recipe.task].capabilities:
                        companions_of(graph)
                    stage = next(
                        (candidate for candidate in self.recipe.stages if candidate.output_spec().integer_graph), None
                    )
                    operator = first_integer_operator(read_graph(graph)) if stage else None
                    if stage and operator:
                        raise ModelError(
                            f"The graph is quantized already: it has the operator {operator}.",
                            where=str(graph),
                            expected=f"a float graph, which {stage.kind} takes",
                            hint="start from the float model; quantizing twice only loses accuracy",
                        )
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

    def named_model(self, reference: str, random_weights: bool) -> Shape | None:
        """Describe a model that a stage names and return its shape if its weights are local."""
        if not random_weights:
            return self.model(reference, "student")
        return self._made_model(reference, "student", None, random_weights=True)

    def _made_model(self, reference: str, role: str, module: str | None, random_weights: bool) -> Shape | None:
        """Describe a model that is built from code or a config, and return the shape that its config tells.

        The shape of a model that code builds is unknown until the code has run.

        Args:
            reference: The config's or code's folder.
            role: Role of the model in the recipe.
            module: Function that builds it.
            random_weights: True if its weights are random.
        """
        with self.noting():
            path = self._model_path(reference)
            if module is not None:
                check_module(module, self.folder)
            if path is None:
                self._unknown(role, reference)
                return None
            origin = "random weights" if random_weights else "its weights"
            if module is None:
                check_config(path, self.recipe.trust_remote_code)
            shape = random_shape(path) if module is None else None
            parameters = None if shape is None else round(shape.parameters)
            note = f"made by {module or 'its config'}, with {origin}"
            self._here(role, reference, path, parameters=parameters, note=note)
            return shape
        return None

    def _model_path(self, reference: str) -> Path | None:
        """Return the path of a model, or None if it must be downloaded. Raises `ModelError` or `SampleError`."""
        if is_sample(reference):
            sample = find_sample(reference)
            if sample.kind != "model":
                raise InputError(f"{reference} is data, not a model.", hint="`compress samples` lists the models")
            return cached_directory(sample.name)
        path = find(reference, self.folder)
        try:
            return path or find_model(reference)
        except ModelError:
            # A Hugging Face id that was never downloaded; anything else is neither a path nor an id.
            if not _HUB_ID.match(reference) or Path(reference).suffix in (".gguf", ".onnx", ".safetensors", ".bin"):
                raise
            return None

    def _describe_data(self, data: Dataset) -> None:
        """Add the row of every split and of unlabeled text."""
        config = self.recipe.data
        for split, reference in config.splits.items():
            sample = sample_split(reference)
            source = sample[0] if sample else config.source
            shown = reference if source is None or sample else f"{source} ({reference})"
            location = locate_split(config, split, self.folder, cached_directory)
            self._describe(f"split {split}", shown, location, source, data.rows_read)
        for reference in config.unlabeled:
            path = locate_unlabeled(reference, self.folder, cached_directory)
            self._describe(f"unlabeled {reference}", reference, path, reference, data.rows_read)

    def _describe(
        self, role: str, shown: str, location: Location | None, source: str | None, rows_read: Mapping[str, int]
    ) -> None:
        """Add the row of a data source.

        Args:
            role: Role of the data, such as `split test`.
            shown: Reference as shown to the user.
            location: Location of the data, or None if it must be downloaded.
            source: Reference of the source.
            rows_read: Number of rows by role.
        """
        if location is None or isinstance(location, HubSplit):
            self._unknown(role, shown, source)
        elif isinstance(location, Draws):
            self.rows.append(SourcePlan(role=role, reference=shown, status="here", path=None, rows=location.count))
        elif isinstance(location, Undivided):
            # Every split is a part of the one file.
            total = sum(count for other, count in rows_read.items() if other.removeprefix("split ") in SPLITS)
            num_bytes = round(content_bytes(location.path) * rows_read[role] / total)
            self.texts[role] = Text(rows_read[role], num_bytes)
            self._here(role, shown, location.path, rows=rows_read[role], note="split automatically")
        else:
            self.texts[role] = Text(rows_read[role], content_bytes(location))
            self._here(role, shown, location, rows=rows_read[role])

    def _unknown(self, role: str, shown: str, source: str | None = None) -> None:
        """Add the row of a source that must be downloaded."""
        reference = source or shown
        note = "no local path; fetched from the Hugging Face Hub when the run begins"
        if is_sample(reference):
            sample = find_sample(reference)
            self.downloads[sample.name] = sample.download_bytes
            note = f"{sample.download_bytes / 1e6:.0f} MB: compress samples fetch {sample.name}"
        self.rows.append(SourcePlan(role=role, reference=shown, status="unknown until fetched", path=None, note=note))


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
