"""Sizes and problems of a recipe's model and data, without reading weights or rows."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from compress.data.columns import check_extra
from compress.data.config import is_sample, sample_split
from compress.data.dataset import TEST
from compress.data.files import LABEL, read_class_folder
from compress.data.judged import find_instructions, find_questions, find_rated_pairs
from compress.data.samples.fetch import cached_directory
from compress.data.samples.sample import find_sample
from compress.data.slices import extra_columns
from compress.data.source import (
    INPUTS,
    Draws,
    HubSplit,
    Location,
    array_files,
    find,
    locate_split,
    locate_unlabeled,
    read,
)
from compress.formats.gguf.model import read_gguf
from compress.formats.onnx.graph_reader import first_integer_operator, read_graph
from compress.formats.onnx.stored_tensors import read_tensors
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
from compress.utils.errors import CompressError, DataError, InputError, ModelError, StageError
from compress.utils.progress import Progress, SilentProgress

_HEAD_BYTES = 1 << 16


def read_size(path: Path) -> tuple[Text, tuple[str, ...]]:
    """Return rows and bytes of a data file or class folder, and its column names if known. Raises `DataError`."""
    if path.is_dir() and (files := array_files(path)):
        return Text(len(files), folder_bytes(path)), (INPUTS,)
    if path.is_dir():
        rows = read_class_folder(path, (LABEL,))
        return Text(len(rows.columns[LABEL]), folder_bytes(path)), rows.names
    try:
        text, columns = _parquet_size(path) if path.suffix == ".parquet" else _text_size(path)
    except OSError as error:
        raise DataError(f"{path.name} cannot be read: {error.strerror or error}.", where=str(path)) from error
    if text.rows < 1:
        problem = "has columns and no rows" if columns else "is empty"
        raise DataError(f"{path.name} {problem}.", where=str(path), expected="at least one row")
    return text, columns


def _text_size(path: Path) -> tuple[Text, tuple[str, ...]]:
    """Estimate the rows of a text file from its first lines."""
    size = path.stat().st_size
    with path.open("rb") as file:
        # Up to the end of a line, since one document may be longer than the head.
        head = file.read(_HEAD_BYTES) + file.readline()
    text = head.decode("utf-8-sig", errors="replace")
    if path.suffix == ".json":
        rows_in_head = text.count("}")
    else:
        rows_in_head = text.count("\n") if size > len(head) else len(text.splitlines())
    columns: tuple[str, ...] = ()
    if path.suffix == ".csv":
        columns = tuple(next(csv.reader(io.StringIO(text)), ()))
    elif path.suffix == ".jsonl":
        with suppress(ValueError):  # reported when the rows are read
            first = json.loads(text.split("\n", 1)[0])
            columns = tuple(first) if isinstance(first, dict) else ()
    rows = round(rows_in_head * size / max(len(head), 1)) - bool(columns and path.suffix == ".csv")
    return Text(rows, size), columns


def _parquet_size(path: Path) -> tuple[Text, tuple[str, ...]]:
    """Return rows, uncompressed bytes and columns of a Parquet file from its metadata."""
    import pyarrow as pa
    import pyarrow.parquet

    if path.stat().st_size == 0:
        return Text(0, 0), ()
    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path.name} is not a complete Parquet file: {error}", where=str(path)) from error
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    uncompressed = sum(group.total_byte_size for group in groups)
    return Text(metadata.num_rows, uncompressed), tuple(metadata.schema.to_arrow_schema().names)


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
    """Model and data of a recipe as they are on this machine, with all ``problems`` found."""

    def __init__(self, recipe: Recipe, recipe_folder: Path) -> None:
        self.recipe = recipe
        self.folder = recipe_folder
        self.problems: list[CompressError] = []
        self.rows: list[SourcePlan] = []
        self.texts: dict[str, Text] = {}
        self.downloads: dict[str, int] = {}
        self.task = local_task_variants(TASKS[recipe.task], recipe.model, recipe_folder)[0]
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
            with self.noting():
                self._split(split, reference)
        for reference in recipe.data.unlabeled:
            with self.noting():
                location = locate_unlabeled(reference, self.folder, cached_directory)
                self._describe(f"unlabeled {reference}", reference, location, (), reference)
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
            if recipe.evaluation.instructions:
                find_instructions(recipe.evaluation.instructions, self.folder)
        return shape

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Record an error of the input or of a stage as a problem and continue."""
        try:
            yield
        except (InputError, StageError) as error:
            self.problems.append(error)

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
        with self.noting():
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
        path = find(reference, self.folder)
        try:
            return path or find_model(reference)
        except ModelError:
            # A Hugging Face id that was never downloaded; anything else is neither a path nor an id.
            if not _HUB_ID.match(reference) or Path(reference).suffix in (".gguf", ".onnx", ".safetensors", ".bin"):
                raise
            return None

    def _split(self, split: str, reference: str) -> None:
        """Describe a split of the data."""
        source = self.recipe.data.source
        sample = sample_split(reference)
        source = sample[0] if sample else source
        shown = reference if source is None or sample else f"{source} ({reference})"
        location = locate_split(self.recipe.data, split, self.folder, cached_directory)
        self._describe(f"split {split}", shown, location, self.recipe.data.columns.values(), source)
        if split == TEST and isinstance(location, Path):
            # Raise `DataError` for a slice whose column the test split does not have.
            task = (column.name for column in self.task.columns)
            extra = extra_columns(self.recipe.slices or (), task)
            if extra:
                check_extra(read(location, ()), extra)

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
