"""Stages in rehearsal: what they leave of the baseline but for what only training decides, as weights and as graphs."""

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
from compress.stages.base import Context, Stage
from compress.stages.protocols import inferred_output
from compress.utils.digests import digest_directory
from compress.utils.environment import package_versions
from compress.utils.errors import CompressError, ModelError
from compress.utils.storage import cache_key

if TYPE_CHECKING:
    from compress.formats.onnx.interpolate_size import InterpolatedGraph, LinearRule
    from compress.models.torch_model import TorchModel

VERSION = 1
"""Raised when the same stages would be rehearsed otherwise."""
_MOST_TRACES = 12
"""Graphs with their weights that are kept at hand."""
_FEW_ROWS, _ENCODED = 64, 8
_PACKAGES = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime")
_GRAPH, _TOLD = "graph.onnx", "outline.json"
Stages = tuple[Stage[Any, Any], ...]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ModelOutline:
    """A model before it becomes a graph, without weights: widths, shapes of its weights, and bytes beside them."""

    widths: Mapping[str, int]
    shapes: Shapes
    beside_bytes: int
    kind: str
    """What of its config is no number; the same for models whose graphs differ in widths alone."""


@dataclass(frozen=True)
class GraphStructure:
    """Graphs that differ in widths alone; ``rules`` are those of each axis of a weight that follows one.

    The one that was traced is of the model that ``stages`` make, of a ``kind`` of outline.
    """

    graph: InterpolatedGraph
    shapes: Shapes
    rules: Mapping[tuple[str, int], LinearRule]
    stages: Stages
    kind: str

    def has(self, outline: ModelOutline) -> bool:
        """Whether a model is one of them."""
        try:
            told = {
                name: tuple(
                    self.rules[name, axis].at(outline.widths) if (name, axis) in self.rules else size
                    for axis, size in enumerate(shape)
                )
                for name, shape in self.shapes.items()
            }
        except (KeyError, ModelError):
            return False
        return told == outline.shapes

    def is_like(self, other: GraphStructure) -> bool:
        """Whether weights of one name have the same axes and, where these follow no width, the same sizes."""
        for name in self.shapes.keys() & other.shapes.keys():
            one, two = self.shapes[name], other.shapes[name]
            if len(one) != len(two):
                return False
            for axis, sizes in enumerate(zip(one, two, strict=True)):
                rules = [self.rules.get((name, axis)), other.rules.get((name, axis))]
                if rules[0] != rules[1] or (rules[0] is None and sizes[0] != sizes[1]):
                    return False
        return True


@dataclass(frozen=True)
class ComposedGraph:
    """A graph as what was traced of it and others: ``own``, and what the first of ``difference`` has before the second.

    Those two differ as the graph and ``own`` do, in a part that is the same whatever the layers.
    """

    own: GraphStructure
    difference: tuple[GraphStructure, GraphStructure] | None = None

    def is_at(self, widths: Mapping[str, int]) -> bool:
        """Whether all of them exist at those widths."""
        try:
            return self.size_bytes(widths) > 0
        except (KeyError, ModelError):
            return False

    def size_bytes(self, widths: Mapping[str, int]) -> int:
        """Bytes of its file. Raises `ModelError`."""
        found = self.own.graph.size_bytes(widths)
        if self.difference is not None:
            more, less = (one.graph.size_bytes(widths) for one in self.difference)
            found += more - less
        return found


class UnpredictableStageError(ModelError):
    """Only running a stage tells what it leaves."""

    def __init__(self, stage: Stage[Any, Any]) -> None:
        super().__init__(f"What {stage.kind} leaves only running it tells.")


def expected_failures() -> tuple[type[Exception], ...]:
    """What a rehearsal may fail by; a trial of the same recipe says it to the user."""
    return (CompressError, *library_failures())


@dataclass
class ShapeInference:
    """On the output of the recipe's baseline, which lies in ``folder``."""

    runner: StageRunner
    folder: Path
    _sketches: dict[str, TorchModel] = field(default_factory=dict, init=False)
    _traces: list[str] = field(default_factory=list, init=False)

    @cached_property
    def context(self) -> Context:
        """What stages are given."""
        return self.runner.context("rehearsal")

    @cached_property
    def _scratch(self) -> Path:
        folder = tempfile.mkdtemp(prefix="compress-rehearsal-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return Path(folder)

    def infer_model(self, stages: Stages) -> TorchModel:
        """The output of stages without weights; what more stages begin with is rehearsed once."""
        key = stages_key(stages)
        if key not in self._sketches:
            if not stages:
                model = self._baseline()
                model.module.to("meta")
                self._sketches[key] = model
            else:
                before = self.infer_model(stages[:-1])
                made = inferred_output(stages[-1], _copied(before), self.context)
                if made is None:
                    raise UnpredictableStageError(stages[-1])
                self._sketches[key] = made
        return self._sketches[key]

    def outline(self, sketch: TorchModel) -> ModelOutline:
        """What there is to say of a sketch."""
        from compress.models.widths import model_widths

        # A tokenizer writes down how it was last called.
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

        from compress.models.torch_model import TorchModel

        runner = self.runner
        if runner.recipe.baseline == START:
            torch.manual_seed(runner.recipe.seed)
            return runner.inputs.task.load(self.folder, runner.inputs.data.labels, trust_remote_code=False)
        return TorchModel.load(self.folder, runner.inputs.task)

    def cached_graph(self, torch_stages: Stages, graph_stages: Stages, changed: tuple[str, ...]) -> Path:
        """A folder with the graph that stages leave, without its weights; kept in the cache."""
        from compress.formats.onnx.interpolate_size import truncate_weights

        def make(content: Path) -> Mapping[str, Any]:
            import onnx

            folder = self._traced(torch_stages, graph_stages, changed)
            graph = onnx.load(find_graph(folder))
            truncate_weights(graph)
            (content / _GRAPH).write_bytes(graph.SerializeToString())
            shutil.copyfile(folder / _TOLD, content / _TOLD)
            return {"name": "rehearsal"}

        runner, key = self.runner, self._key(torch_stages, graph_stages, changed)
        return runner.cache.obtain(key, make, runner.progress.note, lambda: None)[0].folder

    def _key(self, torch_stages: Stages, graph_stages: Stages, changed: tuple[str, ...]) -> str:
        runner = self.runner
        return cache_key(
            {
                "kind": "rehearsal",
                "version": VERSION,
                "baseline": self._digest,
                "stages": [[stage.model_dump(mode="json"), stage.version] for stage in (*torch_stages, *graph_stages)],
                "changed": changed,
                "data": self._data,
                "max_length": runner.recipe.data.max_length,
                "packages": package_versions(_PACKAGES),
            }
        )

    def _traced(self, torch_stages: Stages, graph_stages: Stages, changed: tuple[str, ...]) -> Path:
        """A folder, for a while, with the model that stages leave of a recipe whose ``changed`` widths are others."""
        from compress.models.widths import copy_with_other_widths, model_widths

        key = self._key(torch_stages, graph_stages, changed)
        folder = self._scratch / key
        if key in self._traces:
            self._traces.remove(key)
            self._traces.append(key)
            return folder
        *before, last = graph_stages
        model: Any
        if before:
            place = self._traced(torch_stages, tuple(before), changed)
            model, told = OnnxModel.load(place, self.runner.inputs.task), (place / _TOLD).read_text()
        else:
            model = self._baseline()
            for stage in torch_stages:
                model = inferred_output(stage, model, self.context)
            model = copy_with_other_widths(model, changed) if changed else model
            told = json.dumps({"widths": model_widths(model.module), "shapes": _shapes(model)})
        tables = {name: table.slice(0, _FEW_ROWS) for name, table in self.context.data.tables.items()}
        few = replace(self.context, data=replace(self.context.data, tables=tables), notes=[], tables=[])
        found = inferred_output(last, model, few)
        if not isinstance(found, OnnxModel) or found.others:
            raise UnpredictableStageError(last)
        folder.mkdir()
        found.save(folder)
        (folder / _TOLD).write_text(told)
        self._traces.append(key)
        for old in self._traces[:-_MOST_TRACES]:
            shutil.rmtree(self._scratch / old)
        del self._traces[:-_MOST_TRACES]
        return folder

    @cached_property
    def _digest(self) -> str:
        return digest_directory(self.folder)

    @cached_property
    def _data(self) -> str:
        return self.runner.inputs.data.digest("train")


def load_structure(one: Path, other: Path, stages: Stages, kind: str) -> GraphStructure:
    """Of two folders of `ShapeInference.kept`. Raises `ModelError` for graphs that differ in more than widths."""
    import onnx

    from compress.formats.onnx.interpolate_size import InterpolatedGraph, fit_rule

    graphs = [onnx.load(folder / _GRAPH) for folder in (one, other)]
    told, again = (json.loads((folder / _TOLD).read_text()) for folder in (one, other))
    rules = {
        (name, axis): fit_rule(size, again["shapes"][name][axis], told["widths"], again["widths"])
        for name, shape in told["shapes"].items()
        for axis, size in enumerate(shape)
        if size != again["shapes"][name][axis]
    }
    resized = InterpolatedGraph(graphs[0], told["widths"], graphs[1], again["widths"])
    shapes = {name: tuple(shape) for name, shape in told["shapes"].items()}
    return GraphStructure(resized, shapes, rules, stages, kind)


def stages_key(stages: Sequence[Stage[Any, Any]]) -> str:
    """What two lists of stages share that do the same."""
    return json.dumps([stage.model_dump(mode="json") for stage in stages], sort_keys=True)


def _copied(model: TorchModel) -> TorchModel:
    from compress.models.torch_model import TorchModel

    return TorchModel(copy.deepcopy(model.module), copy.copy(model.processor))


def _shapes(model: TorchModel) -> Shapes:
    return {name: tuple(part.shape) for name, part in model.module.named_parameters()}


def _is_numbers(value: object) -> bool:
    """Whether it is a number that may follow a width; true and false don't."""
    if isinstance(value, list | tuple):
        return all(map(_is_numbers, value))
    return isinstance(value, int) and not isinstance(value, bool)
