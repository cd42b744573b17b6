"""Shape inference: the model that stages would produce, without weights, and its graph without training."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.formats.onnx.model import OnnxModel, find_graph
from compress.pipeline.runner import StageRunner, library_failures
from compress.recipe.recipe import START
from compress.stages.base import AnyStage, Context
from compress.stages.protocols import inferred_output
from compress.utils.environment import package_versions
from compress.utils.errors import CompressError, ModelError
from compress.utils.storage import cache_key, digest_directory

if TYPE_CHECKING:
    from compress.models.model import TorchModel
    from compress.plugins.search.interpolate_size import InterpolatedGraph, LinearRule

VERSION = 1
"""Version of the inferred graphs; a new one makes cached graphs invalid."""
_MOST_TRACES = 12
"""Largest number of graphs with weights that are stored temporarily."""
_FEW_ROWS, _ENCODED = 64, 8
_PACKAGES = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime")
_GRAPH, _OUTLINE = "graph.onnx", "outline.json"
Stages = tuple[AnyStage, ...]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ModelOutline:
    """Model before its export, without weights.

    Attributes:
        widths: Width of each dimension that can vary.
        shapes: Shape of each weight.
        beside_bytes: Bytes of files beside the graph.
        kind: Entries of the config that are no numbers.
    """

    widths: Mapping[str, int]
    shapes: Shapes
    beside_bytes: int
    kind: str
    """Entries of the config that are no numbers. Models that share them differ in widths only."""


@dataclass(frozen=True)
class GraphStructure:
    """Family of graphs that differ in widths only.

    Attributes:
        graph: Traced graph, which can be resized.
        shapes: Shapes of the traced model's weights.
        rules: Rule of each axis of a weight that follows a width.
        stages: Stages that make the traced model.
        kind: Kind of its outline.
    """

    graph: InterpolatedGraph
    shapes: Shapes
    rules: Mapping[tuple[str, int], LinearRule]
    stages: Stages
    kind: str

    def has(self, outline: ModelOutline) -> bool:
        """Return whether a model belongs to the family."""
        try:
            # Compute the weight shapes at the model's widths and compare them with its own.
            shapes = {
                name: tuple(axis if isinstance(axis, int) else axis.at(outline.widths) for axis in self.axes(name))
                for name in self.shapes
            }
        except (KeyError, ModelError):
            return False
        return shapes == outline.shapes

    def is_like(self, other: GraphStructure) -> bool:
        """Return whether weights of the same name have the same axes and, apart from widths, the same sizes."""
        return all(self.axes(name) == other.axes(name) for name in self.shapes.keys() & other.shapes.keys())

    def axes(self, name: str) -> list[LinearRule | int]:
        """Return the rule of each axis of a weight, or its size where it follows no width."""
        return [self.rules.get((name, axis), size) for axis, size in enumerate(self.shapes[name])]


@dataclass(frozen=True)
class ComposedGraph:
    """Graph that is predicted from traced ones.

    It is ``own``, plus the first graph of ``difference``, minus the second. The two differ as the graph and ``own`` do,
    in a part that does not depend on the layers.
    """

    own: GraphStructure
    difference: tuple[GraphStructure, GraphStructure] | None = None

    def is_at(self, widths: Mapping[str, int]) -> bool:
        """Return whether all of its graphs exist at these widths."""
        try:
            return self.size_bytes(widths) > 0
        except (KeyError, ModelError):
            return False

    def size_bytes(self, widths: Mapping[str, int]) -> int:
        """Return the bytes of the file. Raises `ModelError`."""
        size = self.own.graph.size_bytes(widths)
        if self.difference is None:
            return size
        more, less = (structure.graph.size_bytes(widths) for structure in self.difference)
        return size + more - less


class UnpredictableStageError(ModelError):
    """Error of a stage whose output depends on its execution."""

    def __init__(self, stage: AnyStage) -> None:
        super().__init__(f"The output of {stage.kind} is known only after running it.")


def expected_failures() -> tuple[type[Exception], ...]:
    """Return the errors that shape inference may cause; a trial of the same recipe reports them to the user."""
    return (CompressError, *library_failures())


@dataclass
class ShapeInference:
    """Shape inference from the output of the recipe's baseline, which is in ``folder``."""

    runner: StageRunner
    folder: Path
    _sketches: dict[str, TorchModel] = field(default_factory=dict, init=False)
    _traces: list[str] = field(default_factory=list, init=False)

    @cached_property
    def context(self) -> Context:
        """Context that stages get."""
        return self.runner.context("rehearsal")

    @cached_property
    def _scratch(self) -> Path:
        folder = tempfile.mkdtemp(prefix="compress-rehearsal-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return Path(folder)

    def infer_model(self, stages: Stages) -> TorchModel:
        """Return the output of stages without weights; a common prefix of stages is inferred once."""
        key = stages_key(stages)
        if key in self._sketches:
            return self._sketches[key]
        inferred: TorchModel | None
        if not stages:
            inferred = self._baseline()
            # On the meta device a model has shapes and no weights.
            inferred.module.to("meta")
        else:
            # Stages change a model in place, and other recipes need the previous one.
            previous = self.infer_model(stages[:-1])
            copied = type(previous)(copy.deepcopy(previous.module), copy.copy(previous.processor))
            inferred = inferred_output(stages[-1], copied, self.context)
            if inferred is None:
                raise UnpredictableStageError(stages[-1])
        self._sketches[key] = inferred
        return inferred

    def outline(self, sketch: TorchModel) -> ModelOutline:
        """Return the outline of an inferred model."""
        from compress.models.prune_dry_run import model_widths

        # A tokenizer stores the settings of its last call in its files, so call it as a run does.
        rows = self.context.data.split("train").slice(0, _ENCODED)
        self.context.task.encode(rows, sketch.processor, None, self.context.max_length)
        config = sketch.module.config.to_dict()
        kind = {name: value for name, value in config.items() if not _is_numbers(value)}
        return ModelOutline(
            widths=model_widths(sketch.module),
            shapes=_shapes(sketch),
            beside_bytes=sum(map(len, sketch.companions().values())),
            kind=json.dumps([kind, sorted(config)], sort_keys=True, default=str),
        )

    def _baseline(self) -> TorchModel:
        import torch

        from compress.models.model import TorchModel

        runner = self.runner
        if runner.recipe.baseline == START:
            torch.manual_seed(runner.recipe.seed)
            return runner.inputs.task.load(self.folder, runner.inputs.data.labels, trust_remote_code=False)
        return TorchModel.load(self.folder, runner.inputs.task)

    def cached_graph(self, torch_stages: Stages, graph_stages: Stages, changed: tuple[str, ...]) -> Path:
        """Return a folder with the graph that stages produce, without its weights; it is cached.

        Args:
            torch_stages: Stages before the export.
            graph_stages: Stages from the export on.
            changed: Widths that are changed, to learn how the graph depends on them.
        """
        from compress.plugins.search.interpolate_size import truncate_weights

        def make(content: Path) -> Mapping[str, object]:
            import onnx

            folder = self._traced(torch_stages, graph_stages, changed)
            graph = onnx.load(find_graph(folder))
            # Only shapes matter, so the cache stores no weights.
            truncate_weights(graph)
            (content / _GRAPH).write_bytes(graph.SerializeToString())
            shutil.copyfile(folder / _OUTLINE, content / _OUTLINE)
            return {"name": "rehearsal"}

        runner, key = self.runner, self._key(torch_stages, graph_stages, changed)
        return runner.cache.obtain(key, make, runner.progress.note, lambda: None)[0].folder

    def _key(self, torch_stages: Stages, graph_stages: Stages, changed: tuple[str, ...]) -> str:
        runner = self.runner
        return cache_key(
            {
                "kind": "rehearsal",
                "version": VERSION,
                **self._input_digests,
                "stages": [[stage.model_dump(mode="json"), stage.version] for stage in (*torch_stages, *graph_stages)],
                "changed": changed,
                "max_length": runner.recipe.data.max_length,
                "packages": package_versions(_PACKAGES),
            }
        )

    def _traced(self, torch_stages: Stages, graph_stages: Stages, changed: tuple[str, ...]) -> Path:
        """Return a temporary folder with the model that stages produce, with ``changed`` widths."""
        from compress.models.prune_dry_run import copy_with_other_widths, model_widths

        key = self._key(torch_stages, graph_stages, changed)
        folder = self._scratch / key
        if key in self._traces:
            self._traces.remove(key)
            self._traces.append(key)
            return folder
        # Trace the stages one after another, each from the stored output of the previous one.
        *earlier_stages, last = graph_stages
        model: Any
        if earlier_stages:
            previous_folder = self._traced(torch_stages, tuple(earlier_stages), changed)
            model = OnnxModel.load(previous_folder, self.runner.inputs.task)
            outline = (previous_folder / _OUTLINE).read_text()
        else:
            model = self._baseline()
            for stage in torch_stages:
                model = inferred_output(stage, model, self.context)
            model = copy_with_other_widths(model, changed) if changed else model
            outline = json.dumps({"widths": model_widths(model.module), "shapes": _shapes(model)})
        # Calibration on a few rows gives the same graph in less time.
        tables = {name: table.slice(0, _FEW_ROWS) for name, table in self.context.data.tables.items()}
        small_context = replace(self.context, data=replace(self.context.data, tables=tables), notes=[], tables=[])
        output = inferred_output(last, model, small_context)
        if not isinstance(output, OnnxModel) or output.others:
            raise UnpredictableStageError(last)
        folder.mkdir()
        output.save(folder)
        (folder / _OUTLINE).write_text(outline)
        self._traces.append(key)
        # Drop the least recently used traces, whose weights take disk space.
        for old in self._traces[:-_MOST_TRACES]:
            shutil.rmtree(self._scratch / old)
        del self._traces[:-_MOST_TRACES]
        return folder

    @cached_property
    def _input_digests(self) -> dict[str, str]:
        return {"baseline": digest_directory(self.folder), "data": self.runner.inputs.data.digest("train")}


def load_structure(first: Path, second: Path, stages: Stages, kind: str) -> GraphStructure:
    """Return the structure of two cached graphs. Raises `ModelError` for graphs that differ in more than widths.

    Args:
        first: Folder of the graph with its own widths.
        second: Folder of the graph with other widths.
        stages: Stages that make the model.
        kind: Kind of its outline.
    """
    import onnx

    from compress.plugins.search.interpolate_size import InterpolatedGraph, fit_rule

    graphs = [onnx.load(folder / _GRAPH) for folder in (first, second)]
    outline, other_outline = (json.loads((folder / _OUTLINE).read_text()) for folder in (first, second))
    # An axis whose size differs follows a width. Two points determine its linear rule.
    rules = {
        (name, axis): fit_rule(size, other_outline["shapes"][name][axis], outline["widths"], other_outline["widths"])
        for name, shape in outline["shapes"].items()
        for axis, size in enumerate(shape)
        if size != other_outline["shapes"][name][axis]
    }
    resized = InterpolatedGraph(graphs[0], outline["widths"], graphs[1], other_outline["widths"])
    shapes = {name: tuple(shape) for name, shape in outline["shapes"].items()}
    return GraphStructure(resized, shapes, rules, stages, kind)


def stages_key(stages: Sequence[AnyStage]) -> str:
    """Return a text that is equal for lists of stages that do the same."""
    return json.dumps([stage.model_dump(mode="json") for stage in stages], sort_keys=True)


def _shapes(model: TorchModel) -> Shapes:
    return {name: tuple(part.shape) for name, part in model.module.named_parameters()}


def _is_numbers(value: object) -> bool:
    """Return whether a value is a number, or a list of numbers, that may follow a width."""
    if isinstance(value, list | tuple):
        return all(map(_is_numbers, value))
    return isinstance(value, int) and not isinstance(value, bool)
