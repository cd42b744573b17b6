"""What a recipe's model would be, without its being trained: stages rehearsed, graphs traced once and resized.

Stages are rehearsed on the baseline without its weights, which takes a moment and gives the widths and every file
beside the graph. Graphs of one structure are traced twice, at other widths, and any other is told from the two
(`compress.formats.onnx.resized`); what is traced is kept in the cache.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.cache import cache_key
from compress.environment import package_versions
from compress.errors import CompressError, ModelError, first_line
from compress.formats.onnx.model import OnnxModel, find_graph
from compress.formats.registry import FORMATS
from compress.pipeline.road import Road
from compress.recipe.recipe import START
from compress.search.outcome import Outcome
from compress.search.space import Point, Space
from compress.search.trial import target_profile
from compress.stage.stage import Context, Stage
from compress.stages import STAGES
from compress.tasks.capability import IS_WRITTEN

if TYPE_CHECKING:
    import onnx

    from compress.checkpoints.torch_model import TorchModel
    from compress.formats.onnx.resized import ResizedGraph, Rule
    from compress.tasks.task import Examples

VERSION = 1
"""Raised when the same stages would be rehearsed otherwise."""
_MOST_STRUCTURES = 24
"""Structures that are traced in one search, some seconds each; recipes of others are told by the stages' arithmetic."""
_FEWEST_RECIPES = 6
"""Spaces of fewer are tried as soon as graphs are traced."""
_FEW_ROWS, _ENCODED, _TIMED_ROWS = 64, 8, 128
_PACKAGES = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime")
_GRAPH, _TOLD = "graph", "outline.json"
_Stages = tuple[Stage[Any, Any], ...]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Outline:
    """A model before it becomes a graph, without weights: widths, shapes of its weights, and bytes beside them."""

    widths: Mapping[str, int]
    shapes: Shapes
    beside_bytes: int
    kind: str
    """What of its config is no number; the same for models whose graphs differ in widths alone."""


@dataclass(frozen=True)
class Structure:
    """Graphs that differ in widths alone; ``rules`` are those of each axis of a weight that follows one."""

    graph: ResizedGraph
    shapes: Shapes
    rules: Mapping[tuple[str, int], Rule]

    def has(self, outline: Outline) -> bool:
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


@dataclass
class Foresight:
    """Of one search, from the trial on that has made the baseline; ``open_road`` gives a road with its data."""

    space: Space
    open_road: Callable[[], Road]
    why_not: str = ""
    """Why nothing is foreseen, or some recipes are not."""
    _folder: Path | None = field(default=None, init=False)
    _sketches: dict[str, TorchModel] = field(default_factory=dict, init=False)
    _outlines: dict[str, Outline | None] = field(default_factory=dict, init=False)
    _encoded: dict[str, Examples] = field(default_factory=dict, init=False)
    _structures: dict[str, list[Structure | None]] = field(default_factory=dict, init=False)

    def begin(self, outcome: Outcome) -> None:
        """Take note of where the first trial has left the baseline."""
        if self._folder is not None or self.space.size < _FEWEST_RECIPES or self._reason():
            return
        recipe, road = self.space.base, self._road
        if recipe.baseline == START:
            self._folder = road.start
            return
        key = next((cost.key for cost in outcome.stages if cost.label == recipe.baseline), None)
        entry = None if key is None else road.cache.peek(key)
        self._folder = None if entry is None else entry.folder

    @property
    def begun(self) -> bool:
        """Whether anything can be foreseen."""
        return self._folder is not None

    def size_bytes(self, point: Point) -> int | None:
        """Bytes of the folder that would be judged; None where they cannot be foreseen."""
        found = self._found(point)
        if found is None:
            return None
        outline, structure = found
        return outline.beside_bytes + structure.graph.size_bytes(outline.widths)

    def graph(self, point: Point) -> onnx.ModelProto | None:
        """The graph that would be timed, with weights of no meaning; None where it cannot be foreseen."""
        found = self._found(point)
        return None if found is None else found[1].graph.at(found[0].widths)

    def timed_as(self, point: Point) -> str | None:
        """What recipes share whose graphs take the same time: all but how many tokens they know. None: not foreseen."""
        found = self._found(point)
        if found is None:
            return None
        widths = {name: width for name, width in found[0].widths.items() if name != "tokens"}
        graph_stages = [stage.key_fields() for stage in self._divided(point)[1]]
        told = [found[0].kind, graph_stages, sorted(found[1].shapes), widths, self._length(point)]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:24]

    def usual_batch(self, point: Point) -> dict[str, np.ndarray] | None:
        """One of the rows that choose, of median length, as the model would be given it."""
        stages = self._divided(point)[0]
        if self._outline(stages) is None:
            return None
        examples = self._examples(stages)
        return dict(examples.batch([int(np.argsort(examples.lengths(), kind="stable")[len(examples) // 2])]))

    def _length(self, point: Point) -> int:
        lengths = np.sort(self._examples(self._divided(point)[0]).lengths())
        return int(lengths[len(lengths) // 2])

    def _examples(self, stages: _Stages) -> Examples:
        key = _told(stages)
        if key not in self._encoded:
            sketch = self._sketch(stages)
            assert sketch is not None, "it has an outline"
            rows = self._context.data.split(self.space.search.select.split).slice(0, _TIMED_ROWS)
            self._encoded[key] = self._context.task.encode(rows, sketch.processor, None, self._context.max_length)
        return self._encoded[key]

    def _reason(self) -> str:
        recipe, profile = self.space.base, target_profile(self.space.base)
        if profile.target.format != "onnx" or profile.downloaded:
            self.why_not = f"sizes of {profile.target.format} are told by the stages' arithmetic"
        elif self._road.from_graph or IS_WRITTEN in self._road.task.capabilities:
            self.why_not = "graphs that are not traced are told by the stages' arithmetic"
        elif recipe.trust_remote_code or recipe.module is not None:
            self.why_not = "code of a recipe or a model is not run but for trials"
        return self.why_not

    @cached_property
    def _road(self) -> Road:
        return self.open_road()

    @cached_property
    def _context(self) -> Context:
        return self._road.context("foresight")

    def _found(self, point: Point) -> tuple[Outline, Structure] | None:
        if self._folder is None:
            return None
        torch_stages, graph_stages = self._divided(point)
        outline = self._outline(torch_stages)
        if outline is None:
            return None
        told = [outline.kind, [stage.key_fields() for stage in graph_stages], len(outline.shapes)]
        known = self._structures.setdefault(json.dumps(told), [])
        for structure in known:
            if structure is None or structure.has(outline):
                return None if structure is None else (outline, structure)
        if sum(map(len, self._structures.values())) >= _MOST_STRUCTURES:
            self.why_not = "recipes of more structures than are traced are told by the stages' arithmetic"
            return None
        try:
            made = self._structure(torch_stages, graph_stages, outline.widths)
        except CompressError as error:
            self.why_not, made = first_line(error), None
        known.append(made)
        return None if made is None else (outline, made)

    def _divided(self, point: Point) -> tuple[_Stages, _Stages]:
        """The stages behind the baseline: those of weights, then those from the one that writes the graph on."""
        recipe, stages = self.space.base, self.space.stages(point)
        first = 0 if recipe.baseline == START else recipe.labels().index(recipe.baseline) + 1
        settled = recipe.model_copy(update={"stages": stages}).settled().stages[first:]
        count = next((place for place, stage in enumerate(settled) if stage.gives() is OnnxModel), len(settled))
        graph_stages = settled[count:]
        if not graph_stages:
            profile, kind = target_profile(recipe), FORMATS["onnx"].written_by
            assert kind is not None, "ONNX is written by a stage"
            graph_stages = (STAGES[kind].model_validate({"kind": kind, **profile.options}),)
        return settled[:count], graph_stages

    def _outline(self, stages: _Stages) -> Outline | None:
        key = _told(stages)
        if key not in self._outlines:
            try:
                sketch = self._sketch(stages)
                self._outlines[key] = None if sketch is None else self._outlined(sketch)
            except CompressError as error:
                self.why_not = first_line(error)
                self._outlines[key] = None
        return self._outlines[key]

    def _sketch(self, stages: _Stages) -> TorchModel | None:
        """The output of stages without weights; what more stages begin with is rehearsed once."""
        key = _told(stages)
        if key not in self._sketches:
            if not stages:
                model = self._baseline()
                model.module.to("meta")  # type: ignore[arg-type]
                self._sketches[key] = model
            else:
                before = self._sketch(stages[:-1])
                made = None if before is None else stages[-1].rehearse(_copied(before), self._context)
                if made is None:
                    self.why_not = f"what {stages[-1].kind} leaves only running it tells"
                    return None
                self._sketches[key] = made
        return self._sketches[key]

    def _outlined(self, sketch: TorchModel) -> Outline:
        from compress.architectures.widths import widths_of

        # A tokenizer writes down how it was last called.
        rows = self._context.data.split("train").slice(0, _ENCODED)
        self._context.task.encode(rows, sketch.processor, None, self._context.max_length)
        config = sketch.module.config.to_dict()
        kind = {name: value for name, value in config.items() if not _is_numbers(value)}
        return Outline(
            widths=widths_of(sketch.module),
            shapes=_shapes(sketch),
            beside_bytes=sum(map(len, sketch.companions().values())),
            kind=json.dumps([kind, sorted(config)], sort_keys=True, default=str),
        )

    def _baseline(self) -> TorchModel:
        import torch

        from compress.checkpoints.torch_model import TorchModel

        assert self._folder is not None, "begin comes first"
        road = self._road
        if self.space.base.baseline == START:
            torch.manual_seed(self.space.base.seed)
            return road.task.load(self._folder, road.data.labels, trust_remote_code=False)
        return TorchModel.load(self._folder, road.task)

    def _structure(self, torch_stages: _Stages, graph_stages: _Stages, widths: Mapping[str, int]) -> Structure:
        """Told from two graphs of a recipe: at its own widths and at others, as many of them as can vary."""
        from compress.architectures.widths import HEADS

        one = self._traced(torch_stages, graph_stages, ())
        # A fused operator may have another form where heads are missing: then all have as many.
        for chosen in (tuple(widths), tuple(name for name in widths if name != HEADS)):
            try:
                return read_structure(one, self._traced(torch_stages, graph_stages, chosen))
            except CompressError as error:
                self._road.progress.note(f"sizes: {', '.join(chosen)} cannot vary in one graph: {first_line(error)}")
        return read_structure(one, one)

    def _traced(self, torch_stages: _Stages, graph_stages: _Stages, changed: tuple[str, ...]) -> Path:
        """A folder with what stages leave of a recipe whose ``changed`` widths are others; traced once for good."""
        road, stages = self._road, (*torch_stages, *graph_stages)
        key = cache_key(
            {
                "kind": "rehearsal",
                "version": VERSION,
                "baseline": self._digest,
                "stages": [[stage.key_fields(), stage.version] for stage in stages],
                "changed": changed,
                "data": road.data.digest("train"),
                "max_length": road.recipe.data.max_length,
                "packages": package_versions(_PACKAGES),
            }
        )

        def make(content: Path) -> Mapping[str, Any]:
            self._trace(torch_stages, graph_stages, changed, content)
            return {"name": "rehearsal"}

        return road.cache.obtain(key, make, road.progress.note, lambda: None)[0].folder

    def _trace(self, torch_stages: _Stages, graph_stages: _Stages, changed: tuple[str, ...], folder: Path) -> None:
        from compress.architectures.widths import widths_of, with_other_widths

        *before, last = graph_stages
        model: Any
        if before:
            place = self._traced(torch_stages, tuple(before), changed)
            model = OnnxModel.load(place / _GRAPH, self._road.task)
            told = (place / _TOLD).read_text()
        else:
            model = self._baseline()
            for stage in torch_stages:
                model = stage.rehearse(model, self._context)
            model = with_other_widths(model, changed) if changed else model
            told = json.dumps({"widths": widths_of(model.module), "shapes": _shapes(model)})
        tables = {name: table.slice(0, _FEW_ROWS) for name, table in self._context.data.tables.items()}
        few = replace(self._context, data=replace(self._context.data, tables=tables), remarks=[], tables=[])
        found = last.rehearse(model, few)
        if not isinstance(found, OnnxModel) or found.others:
            raise ModelError(f"What {last.kind} leaves only running it tells.")
        (folder / _GRAPH).mkdir()
        found.save(folder / _GRAPH)
        (folder / _TOLD).write_text(told)

    @cached_property
    def _digest(self) -> str:
        from compress.digests import digest_directory

        assert self._folder is not None, "begin comes first"
        return digest_directory(self._folder)


def read_structure(one: Path, other: Path) -> Structure:
    """Of two folders that `Foresight` traced. Raises `ModelError` for graphs that differ in more than widths."""
    import onnx

    from compress.formats.onnx.resized import ResizedGraph, rule_of

    graphs = [onnx.load(find_graph(folder / _GRAPH)) for folder in (one, other)]
    told, again = (json.loads((folder / _TOLD).read_text()) for folder in (one, other))
    rules = {
        (name, axis): rule_of(size, again["shapes"][name][axis], told["widths"], again["widths"])
        for name, shape in told["shapes"].items()
        for axis, size in enumerate(shape)
        if size != again["shapes"][name][axis]
    }
    resized = ResizedGraph(graphs[0], told["widths"], graphs[1], again["widths"])
    return Structure(resized, {name: tuple(shape) for name, shape in told["shapes"].items()}, rules)


def _told(stages: Sequence[Stage[Any, Any]]) -> str:
    return json.dumps([stage.key_fields() for stage in stages], sort_keys=True)


def _copied(model: TorchModel) -> TorchModel:
    from compress.checkpoints.torch_model import TorchModel

    return TorchModel(copy.deepcopy(model.module), copy.copy(model.processor))


def _shapes(model: TorchModel) -> Shapes:
    return {name: tuple(part.shape) for name, part in model.module.named_parameters()}


def _is_numbers(value: object) -> bool:
    """Whether it is a number that may follow a width; true and false don't."""
    if isinstance(value, list | tuple):
        return all(map(_is_numbers, value))
    return isinstance(value, int) and not isinstance(value, bool)
