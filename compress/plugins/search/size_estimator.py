"""Sizes of recipes' models without training: shapes are inferred, graphs are traced once and resized.

Shape inference on the baseline without weights takes a moment and gives the widths and every file beside
the graph. Two graphs of a structure are traced, at different widths, and all others of that structure
follow from them (`compress.plugins.search.interpolate_size`). Traced graphs are cached.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from time import perf_counter

from compress.formats.onnx.model import OnnxModel
from compress.formats.registry import FORMATS
from compress.pipeline.recipe_sources import count as count_weights
from compress.pipeline.runner import StageRunner
from compress.plugins.search.outcome import TrialOutcome, target_profile
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
from compress.plugins.search.space import Point, SearchSpace, first_varied
from compress.recipe.recipe import START
from compress.report.run_folder import write_atomically
from compress.stages.cost_model import Shape
from compress.stages.protocols import QuantizesEmbeddings, Trains
from compress.stages.registry import STAGES
from compress.tasks.capability import EXPORTED_FROM_CHECKPOINT
from compress.utils.errors import first_line
from compress.utils.storage import storage_errors

_MOST_STRUCTURES, _SHARE = 40, 0.08
"""Largest number of structures that are traced, and the share of the search's time after which tracing ends."""
_MOST_OUTLINES = 2000
"""Largest number of models whose shapes are inferred."""
SNAPSHOT = "traced.json"
"""File of a search with the number of structures that were traced until the time for it was used up."""
_FEWEST_RECIPES = 6
"""Least number of recipes for which tracing graphs saves time."""


@dataclass
class SizeEstimator:
    """Estimator of sizes, available once the first trial has produced the baseline.

    ``open_runner`` returns a runner with its data.
    """

    space: SearchSpace
    open_runner: Callable[[], StageRunner]
    unavailable_reason: str = ""
    """Reason why some sizes are not predicted from graphs."""
    _inference: ShapeInference | None = field(default=None, init=False)
    _places: dict[Point, tuple[ModelOutline, ComposedGraph] | None] = field(default_factory=dict, init=False)
    _traced: list[tuple[str, GraphStructure]] = field(default_factory=list, init=False)
    """Traced structures, each with the stages from the graph on."""
    _outlines: dict[str, ModelOutline | None] = field(default_factory=dict, init=False)
    _structures: dict[str, list[GraphStructure | None]] = field(default_factory=dict, init=False)
    _alike: dict[tuple[int, int], bool] = field(default_factory=dict, init=False)
    _spent: float = field(default=0.0, init=False)
    _snapshot: Path | None = field(default=None, init=False)

    def start(self, outcome: TrialOutcome) -> None:
        """Find the baseline that the first trial has made."""
        if self.is_ready or not self.max_structures or self._reason():
            return
        recipe, runner = self.space.base, self._runner
        if recipe.baseline == START:
            self._inference = ShapeInference(runner, runner.inputs.start)
            return
        key = next((cost.key for cost in outcome.stages if cost.label == recipe.baseline), None)
        entry = None if key is None else runner.cache.peek(key)
        self._inference = None if entry is None else ShapeInference(runner, entry.folder)

    def use_snapshot(self, folder: Path) -> None:
        """Trace no more structures than the process of this search whose time for tracing was used up.

        A resumed search has to predict what the interrupted one predicted.
        """
        self._snapshot = folder / SNAPSHOT
        if self._snapshot.is_file():
            self.max_structures = json.loads(self._snapshot.read_text(encoding="utf-8"))["structures"]

    def with_data_of(self, runner: StageRunner) -> SizeEstimator:
        """Return an estimator for the rows of another runner that uses the same traced graphs."""
        other = copy.copy(self)
        other._inference = ShapeInference(runner, self._started_inference.folder)
        other._places, other._outlines, other._alike = {}, {}, {}
        return other

    @property
    def is_ready(self) -> bool:
        """Return whether sizes can be predicted."""
        return self._inference is not None

    def size_bytes(self, point: Point) -> int | None:
        """Return the bytes of the shipped folder; None where they cannot be predicted."""
        traced = self.traced_model(point)
        if traced is None:
            return None
        outline, graph = traced
        return outline.beside_bytes + graph.size_bytes(outline.widths)

    def weight_counts(self, point: Point) -> Shape | None:
        """Return the exact number of weights of each sort, and bytes beside them; None where it is unknown."""
        if self._inference is None:
            return None
        outline = self._outline(self._divided(point)[0])
        return None if outline is None else count_weights(outline.shapes.items(), {}, outline.beside_bytes)

    def _reason(self) -> str:
        recipe, profile = self.space.base, target_profile(self.space.base)
        if profile.target.format != "onnx" or profile.downloaded:
            self.unavailable_reason = f"sizes of {profile.target.format} are predicted by the stages' arithmetic"
        elif self._runner.inputs.from_graph or EXPORTED_FROM_CHECKPOINT in self._runner.inputs.task.capabilities:
            self.unavailable_reason = "graphs that are not traced are predicted by the stages' arithmetic"
        elif recipe.trust_remote_code or recipe.module is not None:
            self.unavailable_reason = "code of a recipe or a model runs in trials only"
        return self.unavailable_reason

    @cached_property
    def max_structures(self) -> int:
        """Largest number of structures that are traced; other recipes are predicted by the stages' arithmetic."""
        tried = min(self.space.size, self.space.search.trials or self.space.size)
        return 0 if tried < _FEWEST_RECIPES else _MOST_STRUCTURES

    @cached_property
    def _runner(self) -> StageRunner:
        return self.open_runner()

    @property
    def _started_inference(self) -> ShapeInference:
        assert self._inference is not None, "start comes first"
        return self._inference

    def traced_model(self, point: Point) -> tuple[ModelOutline, ComposedGraph] | None:
        """Return the outline of a recipe's model and its graph; None where they cannot be predicted."""
        if self._inference is None:
            return None
        if point not in self._places:
            import torch

            torch_stages, graph_stages = self._divided(point)
            # Random numbers that are used here must not change later training.
            with torch.random.fork_rng(devices=[]):
                outline = self._outline(torch_stages)
                graph = None if outline is None else self._compose_graph(outline, torch_stages, graph_stages)
            self._places[point] = None if outline is None or graph is None else (outline, graph)
        return self._places[point]

    def _compose_graph(self, outline: ModelOutline, torch_stages: Stages, graph_stages: Stages) -> ComposedGraph | None:
        """Return a traced graph, traced now if it is the first, or one composed of graphs with usual embedding tables.

        Args:
            outline: Model before the export.
            torch_stages: Stages before the export.
            graph_stages: Stages from the export on.
        """
        usual = tuple(
            stage.with_default_embeddings() if isinstance(stage, QuantizesEmbeddings) else stage
            for stage in graph_stages
        )
        stages = stages_key(graph_stages)
        is_traced = any(traced == stages and self._has(structure, outline) for traced, structure in self._traced)
        # Embedding options change one part of the graph. Add the difference that they make in another traced model.
        if stages_key(usual) != stages and not is_traced:
            base = self._structure_of(outline, torch_stages, usual)
            pair = None if base is None else self._pair(stages, stages_key(usual), base)
            if base is not None and pair is not None and (composed := ComposedGraph(base, pair)).is_at(outline.widths):
                return composed
        structure = self._structure_of(outline, torch_stages, graph_stages)
        return None if structure is None else ComposedGraph(structure)

    def _pair(self, stages: str, usual: str, base: GraphStructure) -> tuple[GraphStructure, GraphStructure] | None:
        """Return two structures of one model, with these stages and with usual tables; they may have other layers."""
        with_stages = [structure for traced, structure in self._traced if traced == stages and structure.is_like(base)]
        with_usual = [structure for traced, structure in self._traced if traced == usual]
        for other, third in itertools.product(with_stages, with_usual):
            same_weights = third.kind == other.kind and third.shapes.keys() == other.shapes.keys()
            if same_weights and third.is_like(other):
                return other, third
        return None

    def _structure_of(self, outline: ModelOutline, torch_stages: Stages, graph_stages: Stages) -> GraphStructure | None:
        """Return the structure that a model belongs to, traced now if it is the first."""
        # Only models of one kind, with the same graph stages and number of weights, can share a structure.
        key = json.dumps([outline.kind, stages_key(graph_stages), len(outline.shapes)])
        structures = self._structures.setdefault(key, [])
        for structure in structures:
            if structure is None or self._has(structure, outline):
                return structure
        if sum(map(len, self._structures.values())) >= self.max_structures:
            self.unavailable_reason = "beyond the traced structures, sizes are predicted by the stages' arithmetic"
            return None
        # Models that differ only in widths or graph stages share one export, which is the expensive part.
        same_kind = (structure for _, structure in self._traced if structure.kind == outline.kind)
        stages = next((structure.stages for structure in same_kind if self._has(structure, outline)), torch_stages)
        start_time = perf_counter()
        try:
            traced = self._structure(stages, graph_stages, outline)
        except expected_failures() as error:
            self.unavailable_reason, traced = first_line(error), None
        self._spent += perf_counter() - start_time
        # The time for tracing is used up: allow no further structures.
        if self._spent > _SHARE * self.space.search.seconds:
            self.max_structures = 1 + sum(map(len, self._structures.values()))
            if self._snapshot is not None:
                with storage_errors(self._snapshot):
                    write_atomically(self._snapshot, json.dumps({"structures": self.max_structures}))
        structures.append(traced)
        if traced is not None:
            self._traced.append((stages_key(graph_stages), traced))
        return traced

    def _has(self, structure: GraphStructure, outline: ModelOutline) -> bool:
        """Return whether a structure has a model. Both stay in memory, so that their identities are keys."""
        key = id(structure), id(outline)
        if key not in self._alike:
            self._alike[key] = structure.has(outline)
        return self._alike[key]

    def _divided(self, point: Point) -> tuple[Stages, Stages]:
        """Return the stages after the baseline: those before the export, then the export and those after it."""
        recipe = self.space.base
        resolved = self.space.unchecked_recipe(point).resolved().stages[first_varied(recipe) :]
        count = next((index for index, stage in enumerate(resolved) if stage.output_type is OnnxModel), len(resolved))
        graph_stages = resolved[count:]
        if not graph_stages:
            profile, kind = target_profile(recipe), FORMATS["onnx"].written_by
            assert kind is not None, "ONNX is written by a stage"
            # A recipe without an export is exported for its target at the end.
            graph_stages = (STAGES[kind].model_validate({"kind": kind, **profile.options}),)
        torch_stages = resolved[:count]
        return tuple(s.with_default_training() if isinstance(s, Trains) else s for s in torch_stages), graph_stages

    def _outline(self, stages: Stages) -> ModelOutline | None:
        key = stages_key(stages)
        if key not in self._outlines:
            if len(self._outlines) >= _MOST_OUTLINES:
                self.unavailable_reason = f"beyond {_MOST_OUTLINES} models, the stages' arithmetic predicts sizes"
                return None
            try:
                self._outlines[key] = self._started_inference.outline(self._started_inference.infer_model(stages))
            except expected_failures() as error:
                self.unavailable_reason = first_line(error)
                self._outlines[key] = None
        return self._outlines[key]

    def _structure(self, torch_stages: Stages, graph_stages: Stages, outline: ModelOutline) -> GraphStructure:
        """Trace two graphs of a recipe, at its own widths and at others, with as many changed widths as possible."""
        from compress.models.prune_dry_run import HEADS

        own_graph = self._started_inference.cached_graph(torch_stages, graph_stages, ())
        # A fused operator may have another form if heads are missing. Then the number of heads stays fixed.
        for chosen in (tuple(outline.widths), tuple(name for name in outline.widths if name != HEADS)):
            try:
                changed_graph = self._started_inference.cached_graph(torch_stages, graph_stages, chosen)
                return load_structure(own_graph, changed_graph, torch_stages, outline.kind)
            except expected_failures() as error:
                self._runner.progress.note(f"sizes: {', '.join(chosen)} cannot vary in one graph: {first_line(error)}")
        return load_structure(own_graph, own_graph, torch_stages, outline.kind)
