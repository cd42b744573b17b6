"""What a recipe's model would be, without its being trained: stages rehearsed, graphs traced once and resized.

Stages are rehearsed on the baseline without its weights, which takes a moment and gives the widths and every file
beside the graph. Graphs of one structure are traced twice, at other widths, and any other is told from the two
(`compress.formats.onnx.interpolate_size`); what is traced is kept in the cache.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from compress.formats.onnx.model import OnnxModel
from compress.formats.registry import FORMATS
from compress.pipeline.checkpoint_headers import count as count_weights
from compress.pipeline.runner import StageRunner
from compress.plugins.search.outcome import TrialOutcome
from compress.plugins.search.shape_inference import (
    ComposedGraph,
    GraphStructure,
    ModelOutline,
    ShapeInference,
    Stages,
    expected_failures,
    load_structure,
    stages_key,
)
from compress.plugins.search.space import Point, SearchSpace
from compress.plugins.search.trial import target_profile
from compress.recipe.recipe import START
from compress.stages.cost_model import Shape
from compress.stages.protocols import QuantizesEmbeddings, Trains
from compress.stages.registry import STAGES
from compress.tasks.capability import EXPORTED_FROM_CHECKPOINT
from compress.utils.errors import first_line

if TYPE_CHECKING:
    from compress.tasks.task import Examples

_MOST_STRUCTURES, _SHARE = 40, 0.08
"""Structures that are traced in one search at most, and the share of its time after which no more are."""
_MOST_OUTLINES = 2000
"""Models that are rehearsed in one search."""
_FEWEST_RECIPES = 6
"""Fewer are tried as soon as graphs are traced."""
_TIMED_ROWS = 128


@dataclass
class SizeEstimator:
    """Of one search, from the trial on that has made the baseline; ``open_road`` gives a runner with its data."""

    space: SearchSpace
    open_runner: Callable[[], StageRunner]
    unavailable_reason: str = ""
    """Why nothing is foreseen, or some recipes are not."""
    _rehearsal: ShapeInference | None = field(default=None, init=False)
    _places: dict[Point, tuple[ModelOutline, ComposedGraph] | None] = field(default_factory=dict, init=False)
    _traced: list[tuple[str, GraphStructure]] = field(default_factory=list, init=False)
    """Structures, each with the stages from the graph on."""
    _keys: dict[Point, str] = field(default_factory=dict, init=False)
    _outlines: dict[str, ModelOutline | None] = field(default_factory=dict, init=False)
    _encoded: dict[str, Examples] = field(default_factory=dict, init=False)
    _structures: dict[str, list[GraphStructure | None]] = field(default_factory=dict, init=False)
    _alike: dict[tuple[int, int], bool] = field(default_factory=dict, init=False)
    _spent: float = field(default=0.0, init=False)

    def start(self, outcome: TrialOutcome) -> None:
        """Take note of where the first trial has left the baseline."""
        if self.is_ready or not self.max_structures or self._reason():
            return
        recipe, runner = self.space.base, self._road
        if recipe.baseline == START:
            self._rehearsal = ShapeInference(runner, runner.inputs.start)
            return
        key = next((cost.key for cost in outcome.stages if cost.label == recipe.baseline), None)
        entry = None if key is None else runner.cache.peek(key)
        self._rehearsal = None if entry is None else ShapeInference(runner, entry.folder)

    def with_data_of(self, runner: StageRunner) -> SizeEstimator:
        """The same with the rows of another runner, by the graphs that are traced here; it has begun already."""
        other = copy.copy(self)
        other._rehearsal = ShapeInference(runner, self._at_work.folder)
        other._places, other._outlines, other._keys, other._encoded, other._alike = {}, {}, {}, {}, {}
        return other

    @property
    def is_ready(self) -> bool:
        """Whether anything can be foreseen."""
        return self._rehearsal is not None

    def size_bytes(self, point: Point) -> int | None:
        """Bytes of the folder that would be judged; None where they cannot be foreseen."""
        found = self.traced_model(point)
        if found is None:
            return None
        outline, told = found
        return outline.beside_bytes + told.size_bytes(outline.widths)

    def weight_counts(self, point: Point) -> Shape | None:
        """How many weights of each sort there would be, exactly, and bytes beside them; None where nobody knows."""
        if self._rehearsal is None:
            return None
        outline = self._outline(self._divided(point)[0])
        return None if outline is None else count_weights(outline.shapes.items(), {}, outline.beside_bytes)

    def timing_key(self, point: Point) -> str | None:
        """What recipes share whose graphs take the same time: all but how many tokens they know. None: not foreseen."""
        found = self.traced_model(point)
        if found is None:
            return None
        if point not in self._keys:
            from compress.models.widths import TOKENS

            widths = {name: width for name, width in found[0].widths.items() if name != TOKENS}
            graph_stages = stages_key(self._divided(point)[1])
            told = [found[0].kind, graph_stages, sorted(found[0].shapes), widths, self._length(point)]
            self._keys[point] = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:24]
        return self._keys[point]

    def typical_batch(self, point: Point) -> dict[str, np.ndarray] | None:
        """One of the rows that choose, of median length, as the model would be given it."""
        stages = self._divided(point)[0]
        if self._outline(stages) is None:
            return None
        examples = self._examples(stages)
        return dict(examples.batch([int(np.argsort(examples.lengths(), kind="stable")[len(examples) // 2])]))

    def _length(self, point: Point) -> int:
        lengths = np.sort(self._examples(self._divided(point)[0]).lengths())
        return int(lengths[len(lengths) // 2])

    def _examples(self, stages: Stages) -> Examples:
        key = stages_key(stages)
        if key not in self._encoded:
            sketch, context = self._at_work.infer_model(stages), self._at_work.context
            rows = context.data.split(self.space.search.select.split).slice(0, _TIMED_ROWS)
            self._encoded[key] = context.task.encode(rows, sketch.processor, None, context.max_length)
        return self._encoded[key]

    def _reason(self) -> str:
        recipe, profile = self.space.base, target_profile(self.space.base)
        if profile.target.format != "onnx" or profile.downloaded:
            self.unavailable_reason = f"sizes of {profile.target.format} are told by the stages' arithmetic"
        elif self._road.inputs.from_graph or EXPORTED_FROM_CHECKPOINT in self._road.inputs.task.capabilities:
            self.unavailable_reason = "graphs that are not traced are told by the stages' arithmetic"
        elif recipe.trust_remote_code or recipe.module is not None:
            self.unavailable_reason = "code of a recipe or a model is not run but for trials"
        return self.unavailable_reason

    @cached_property
    def max_structures(self) -> int:
        """How many are traced; recipes of others are told by the stages' arithmetic."""
        tried = min(self.space.size, self.space.search.trials or self.space.size)
        return 0 if tried < _FEWEST_RECIPES else _MOST_STRUCTURES

    @cached_property
    def _road(self) -> StageRunner:
        return self.open_runner()

    @property
    def _at_work(self) -> ShapeInference:
        assert self._rehearsal is not None, "begin comes first"
        return self._rehearsal

    def traced_model(self, point: Point) -> tuple[ModelOutline, ComposedGraph] | None:
        """What a recipe leaves before it becomes a graph, and the graph; None where they cannot be foreseen."""
        if self._rehearsal is None:
            return None
        if point not in self._places:
            import torch

            torch_stages, graph_stages = self._divided(point)
            # What is drawn here leaves no trace in what is trained after.
            with torch.random.fork_rng(devices=[]):
                outline = self._outline(torch_stages)
                told = None if outline is None else self._told(outline, torch_stages, graph_stages)
            self._places[point] = None if outline is None or told is None else (outline, told)
        return self._places[point]

    def _told(self, outline: ModelOutline, torch_stages: Stages, graph_stages: Stages) -> ComposedGraph | None:
        """A graph that is traced, now where it is the first, or what is told of it by those with usual tables."""
        usual, wanted = tuple(stage.with_default_embeddings() if isinstance(stage, QuantizesEmbeddings) else stage for stage in graph_stages), stages_key(graph_stages)
        is_traced = any(told == wanted and self._has(one, outline) for told, one in self._traced)
        if stages_key(usual) != wanted and not is_traced:
            own = self._structure_of(outline, torch_stages, usual)
            pair = None if own is None else self._pair(wanted, stages_key(usual), own)
            if own is not None and pair is not None and (found := ComposedGraph(own, pair)).is_at(outline.widths):
                return found
        structure = self._structure_of(outline, torch_stages, graph_stages)
        return None if structure is None else ComposedGraph(structure)

    def _pair(self, wanted: str, usual: str, own: GraphStructure) -> tuple[GraphStructure, GraphStructure] | None:
        """Two of one model, with stages as wanted and with usual tables, which may have other layers than ``own``."""
        for other in (one for told, one in self._traced if told == wanted and one.is_like(own)):
            for third in (one for told, one in self._traced if told == usual and one.kind == other.kind):
                if third.shapes.keys() == other.shapes.keys() and third.is_like(other):
                    return other, third
        return None

    def _structure_of(self, outline: ModelOutline, torch_stages: Stages, graph_stages: Stages) -> GraphStructure | None:
        """The structure that a model is of, traced now where it is the first."""
        told = json.dumps([outline.kind, stages_key(graph_stages), len(outline.shapes)])
        known = self._structures.setdefault(told, [])
        for structure in known:
            if structure is None or self._has(structure, outline):
                return structure
        if sum(map(len, self._structures.values())) >= self.max_structures:
            self.unavailable_reason = "recipes of more structures than are traced are told by the stages' arithmetic"
            return None
        # Of models that differ in widths alone one is exported, whatever is done to its graph.
        alike = (own.stages for _, own in self._traced if own.kind == outline.kind and self._has(own, outline))
        stages = next(alike, torch_stages)
        began = perf_counter()
        try:
            made = self._structure(stages, graph_stages, outline)
        except expected_failures() as error:
            self.unavailable_reason, made = first_line(error), None
        self._spent += perf_counter() - began
        if self._spent > _SHARE * self.space.search.seconds:
            self.max_structures = 1 + sum(map(len, self._structures.values()))
        known.append(made)
        if made is None:
            return None
        self._traced.append((stages_key(graph_stages), made))
        return made

    def _has(self, structure: GraphStructure, outline: ModelOutline) -> bool:
        """Both are kept, so that they are known by their places in memory."""
        key = id(structure), id(outline)
        if key not in self._alike:
            self._alike[key] = structure.has(outline)
        return self._alike[key]

    def _divided(self, point: Point) -> tuple[Stages, Stages]:
        """The stages behind the baseline: those of weights, then those from the one that writes the graph on."""
        recipe, stages = self.space.base, self.space.stages(point)
        first = 0 if recipe.baseline == START else recipe.labels().index(recipe.baseline) + 1
        settled = recipe.model_copy(update={"stages": stages}).resolved().stages[first:]
        count = next((place for place, stage in enumerate(settled) if stage.output_type() is OnnxModel), len(settled))
        graph_stages = settled[count:]
        if not graph_stages:
            profile, kind = target_profile(recipe), FORMATS["onnx"].written_by
            assert kind is not None, "ONNX is written by a stage"
            graph_stages = (STAGES[kind].model_validate({"kind": kind, **profile.options}),)
        return tuple(stage.with_default_training() if isinstance(stage, Trains) else stage for stage in settled[:count]), graph_stages

    def _outline(self, stages: Stages) -> ModelOutline | None:
        key = stages_key(stages)
        if key not in self._outlines:
            if len(self._outlines) >= _MOST_OUTLINES:
                self.unavailable_reason = f"recipes beyond {_MOST_OUTLINES} models are told by the stages' arithmetic"
                return None
            try:
                self._outlines[key] = self._at_work.outline(self._at_work.infer_model(stages))
            except expected_failures() as error:
                self.unavailable_reason = first_line(error)
                self._outlines[key] = None
        return self._outlines[key]

    def _structure(self, torch_stages: Stages, graph_stages: Stages, outline: ModelOutline) -> GraphStructure:
        """Told from two graphs of a recipe: at its own widths and at others, as many of them as can vary."""
        from compress.models.widths import HEADS

        one = self._at_work.cached_graph(torch_stages, graph_stages, ())
        # A fused operator may have another form where heads are missing: then all have as many.
        for chosen in (tuple(outline.widths), tuple(name for name in outline.widths if name != HEADS)):
            try:
                other = self._at_work.cached_graph(torch_stages, graph_stages, chosen)
                return load_structure(one, other, torch_stages, outline.kind)
            except expected_failures() as error:
                self._road.progress.note(f"sizes: {', '.join(chosen)} cannot vary in one graph: {first_line(error)}")
        return load_structure(one, one, torch_stages, outline.kind)
