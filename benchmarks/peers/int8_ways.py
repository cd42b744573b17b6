"""How everyone makes INT8 of the model that a recipe starts from: its float graphs, other people's files and ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Literal

import numpy as np
import onnx
from peers.int8_defaults import nncf_default, onnxruntime_dynamic, onnxruntime_static
from peers.int8_files import FLOAT, OURS, Ways
from peers.int8_speech import decoder_calls, plain_encoder

from compress.formats.onnx.export import export_onnx
from compress.formats.onnx.int8.observers import Feed
from compress.formats.onnx.model import OnnxModel, quantized_name
from compress.formats.onnx.stage import Onnx
from compress.models.model import TorchModel
from compress.pipeline.runner import StageRunner
from compress.stages.base import Context
from compress.stages.onnx_int8.quantizer import calibration_set
from compress.stages.onnx_int8.stage import OnnxInt8
from compress.stages.qat.stage import Qat

SPEECH, PICTURES = "automatic-speech-recognition", "image-classification"
PLAIN = " of the plain export"
_POOL = 4
"""Training rows for each that calibrates: choosing among all of them would prepare them all, for every file anew."""
_RECORDINGS = 32
"""That calibrate, at most: each has 1,500 positions."""
_DECODED = 4
"""Recordings whose decoder calls calibrate a decoder."""
Maker = Callable[[], OnnxModel]
Quantizer = Callable[[onnx.ModelProto, Sequence[Feed]], onnx.ModelProto]


@dataclass
class Contest:
    """A recipe whose stages were run: what takes part, and what everyone calibrates with."""

    runner: StageRunner
    context: Context = field(init=False)

    def __post_init__(self) -> None:
        """Everyone works in the same context, with the same few training rows."""
        rows = self.runner.inputs.data.split("train")
        drawn = np.random.default_rng(self.runner.recipe.seed).permutation(len(rows))
        few = rows.take(np.sort(drawn[: _POOL * self.count]))
        data = replace(self.runner.inputs.data, tables={**self.runner.inputs.data.tables, "train": few})
        self.context = replace(self.runner.context("benchmark"), data=data)

    @property
    def task(self) -> str:
        """The name of the recipe's task."""
        return self.runner.inputs.task.name

    @cached_property
    def stage(self) -> OnnxInt8 | Qat:
        """The recipe's stage that makes integers of activations."""
        return next(stage for stage in self.runner.recipe.stages if isinstance(stage, OnnxInt8 | Qat))

    @property
    def count(self) -> int:
        """Examples that calibrate."""
        examples = self.stage.calibration_examples
        return min(examples, _RECORDINGS) if self.task == SPEECH else examples

    @cached_property
    def torch_model(self) -> TorchModel:
        """What is exported."""
        labels = self.runner.recipe.labels()
        stage_index = labels.index("onnx" if "onnx" in labels else "qat")
        model = self.runner.load(labels[stage_index - 1] if stage_index else "start")
        assert isinstance(model, TorchModel), "torch models are exported"
        return model

    @cached_property
    def exported(self) -> OnnxModel:
        """The float graphs that this project exports; a recipe that trains through integers leaves that to us."""
        if isinstance(self.stage, Qat):
            return Onnx().run(self.torch_model, self.context)
        return self._load("onnx")

    @cached_property
    def plain(self) -> OnnxModel | None:
        """The exporter's own graph, without this project's rewrites; None where that is the same."""
        if self.task == SPEECH:
            graph = plain_encoder(self.torch_model, self.feeds[0])
        else:
            examples = self.context.encode("train", self.torch_model)
            graph = export_onnx(self.torch_model, examples, None, fusions=False).graph
        plain_model = replace(self.exported, graph=graph)
        return None if _operators(plain_model) == _operators(self.exported) else plain_model

    @cached_property
    def feeds(self) -> Sequence[Feed]:
        """The training examples that everyone calibrates with; for speech, of the encoder."""
        return calibration_set(self.exported, self.context, self.count).feeds

    @cached_property
    def decoder_feeds(self) -> Sequence[Feed]:
        """What a decoder is asked while some of those are transcribed."""
        return decoder_calls(self.exported, [self.feeds[index] for index in range(min(_DECODED, len(self.feeds)))])

    def ways(self) -> Ways:
        """Each file's maker, by what the tables call the file."""
        makers: dict[str, Maker] = {FLOAT: lambda: self.exported, OURS: lambda: self._load(-1), **self._variants()}
        makers |= self._peers(self.exported, "")
        if self.plain is not None:
            makers |= {f"fp32{PLAIN}": partial(_same, self.plain), **self._peers(self.plain, PLAIN)}
        return makers

    def _peers(self, model: OnnxModel, suffix: str) -> dict[str, Maker]:
        nncf = partial(nncf_default, transformer="Softmax" in _operators(self.plain or model))
        quantizers: dict[str, Quantizer] = {
            "ONNX Runtime dynamic": lambda graph, _: onnxruntime_dynamic(graph),
            "ONNX Runtime static": onnxruntime_static,
            "NNCF": nncf,
        }
        return {f"{name}{suffix}": partial(self._each, model, way) for name, way in quantizers.items()}

    def _each(self, model: OnnxModel, quantize: Quantizer) -> OnnxModel:
        feeds = [self.feeds, self.decoder_feeds] if model.others else [self.feeds]
        graphs = zip(model.graphs.items(), feeds, strict=True)
        return model.with_graphs({quantized_name(name): quantize(graph, given) for (name, graph), given in graphs})

    def _variants(self) -> dict[str, Maker]:
        """Other ways of ours: the other method, NNCF's statistics, no training through integers."""
        if isinstance(self.stage, Qat):
            return {"ours, untrained static": self._quantized(self._changed("static", embedding_bits=32))}
        if self.task == PICTURES:
            return {}
        other: Literal["dynamic", "static"] = "dynamic" if self.stage.method == "static" else "static"
        changed = self._changed(other)
        if self.task == SPEECH:
            last = self.runner.recipe.stages[-1]
            return {f"ours, {other} encoder": lambda: last.run(changed.run(self.exported, self.context), self.context)}
        nncf = self.stage.model_copy(update={"method": "static", "statistics": "nncf", "calibration_method": "minmax"})
        return {f"ours, {other}": self._quantized(changed), "ours, NNCF's statistics": self._quantized(nncf)}

    def _changed(self, method: Literal["dynamic", "static"], **others: object) -> OnnxInt8:
        previous = (
            {}
            if isinstance(self.stage, Qat)
            else {name: getattr(self.stage, name) for name in ("embedding_bits", "part")}
        )
        ranges = {"calibration_method": "mse"} if method == "static" else {}
        fields = {
            **previous,
            **ranges,
            "method": method,
            "calibration_examples": self.count,
            **others,
        }
        return OnnxInt8.model_validate(fields)

    def _quantized(self, stage: OnnxInt8) -> Maker:
        return lambda: stage.run(self.exported, self.context)

    def _load(self, stage: str | int) -> OnnxModel:
        label = self.runner.recipe.labels()[stage] if isinstance(stage, int) else stage
        model = self.runner.load(label, OnnxModel)
        assert isinstance(model, OnnxModel), f"{label} gives ONNX"
        return model


def _operators(model: OnnxModel) -> list[str]:
    return [node.op_type for node in model.graph.graph.node]


def _same(model: OnnxModel) -> OnnxModel:
    return model
