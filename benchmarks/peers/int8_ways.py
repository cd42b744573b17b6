"""INT8 models by several quantizers, made from the float graphs of a recipe's model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Literal

import numpy as np
import onnx
from peers.int8_defaults import nncf_default, onnxruntime_dynamic, onnxruntime_static
from peers.int8_files import FLOAT, OURS, Makers
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

SPEECH, IMAGES = "automatic-speech-recognition", "image-classification"
PLAIN = " of the plain export"
_POOL = 4
"""Training rows per calibration example: the calibration set is chosen among these, since encoding all is slow."""
_RECORDINGS = 32
"""Largest number of calibration recordings; each has 1,500 positions."""
_DECODED = 4
"""Recordings whose decoder calls are calibration data of the decoder."""
Maker = Callable[[], OnnxModel]
Quantizer = Callable[[onnx.ModelProto, Sequence[Feed]], onnx.ModelProto]


@dataclass
class Int8Comparison:
    """The compared INT8 models of a recipe, and their common calibration data."""

    runner: StageRunner
    context: Context = field(init=False)

    def __post_init__(self) -> None:
        """Create the context with a sample of the training rows, which all quantizers use."""
        rows = self.runner.inputs.data.split("train")
        order = np.random.default_rng(self.runner.recipe.seed).permutation(len(rows))
        pool = rows.take(np.sort(order[: _POOL * self.count]))
        data = replace(self.runner.inputs.data, tables={**self.runner.inputs.data.tables, "train": pool})
        self.context = replace(self.runner.context("benchmark"), data=data)

    @property
    def task(self) -> str:
        """The name of the recipe's task."""
        return self.runner.inputs.task.name

    @cached_property
    def stage(self) -> OnnxInt8 | Qat:
        """The recipe's stage that quantizes activations."""
        return next(stage for stage in self.runner.recipe.stages if isinstance(stage, OnnxInt8 | Qat))

    @property
    def count(self) -> int:
        """Number of calibration examples."""
        examples = self.stage.calibration_examples
        return min(examples, _RECORDINGS) if self.task == SPEECH else examples

    @cached_property
    def torch_model(self) -> TorchModel:
        """The torch model that is exported."""
        labels = self.runner.recipe.labels()
        stage_index = labels.index("onnx" if "onnx" in labels else "qat")
        model = self.runner.load(labels[stage_index - 1] if stage_index else "start")
        assert isinstance(model, TorchModel), "only torch models are exported"
        return model

    @cached_property
    def exported(self) -> OnnxModel:
        """The float graphs that this project exports; a recipe with quantization-aware training has no stage for it."""
        if isinstance(self.stage, Qat):
            return Onnx().run(self.torch_model, self.context)
        return self._load("onnx")

    @cached_property
    def plain(self) -> OnnxModel | None:
        """The exported graph without this project's rewrites, or None if that is the same."""
        if self.task == SPEECH:
            graph = plain_encoder(self.torch_model, self.feeds[0])
        else:
            examples = self.context.encode("train", self.torch_model)
            graph = export_onnx(self.torch_model, examples, None, fusions=False).graph
        plain_model = replace(self.exported, graph=graph)
        return None if _operators(plain_model) == _operators(self.exported) else plain_model

    @cached_property
    def feeds(self) -> Sequence[Feed]:
        """The calibration examples; for speech, those of the encoder."""
        return calibration_set(self.exported, self.context, self.count).feeds

    @cached_property
    def decoder_feeds(self) -> Sequence[Feed]:
        """Inputs of the decoder while some of the calibration recordings are transcribed."""
        return decoder_calls(self.exported, [self.feeds[index] for index in range(min(_DECODED, len(self.feeds)))])

    def makers(self) -> Makers:
        """Return the function that makes each model, by its name in the tables."""
        makers: dict[str, Maker] = {FLOAT: lambda: self.exported, OURS: lambda: self._load(-1), **self._variants()}
        makers |= self._peers(self.exported, "")
        if self.plain is not None:
            makers |= {f"fp32{PLAIN}": partial(_identity, self.plain), **self._peers(self.plain, PLAIN)}
        return makers

    def _peers(self, model: OnnxModel, suffix: str) -> dict[str, Maker]:
        nncf = partial(nncf_default, transformer="Softmax" in _operators(self.plain or model))
        quantizers: dict[str, Quantizer] = {
            "ONNX Runtime dynamic": lambda graph, _: onnxruntime_dynamic(graph),
            "ONNX Runtime static": onnxruntime_static,
            "NNCF": nncf,
        }
        return {
            f"{name}{suffix}": partial(self._quantize_graphs, model, quantize) for name, quantize in quantizers.items()
        }

    def _quantize_graphs(self, model: OnnxModel, quantize: Quantizer) -> OnnxModel:
        feeds = [self.feeds, self.decoder_feeds] if model.others else [self.feeds]
        graphs = zip(model.graphs.items(), feeds, strict=True)
        return model.with_graphs({quantized_name(name): quantize(graph, given) for (name, graph), given in graphs})

    def _variants(self) -> dict[str, Maker]:
        """Return variants of ours: the other method, NNCF's statistics, no quantization-aware training."""
        if isinstance(self.stage, Qat):
            return {"ours, untrained static": self._quantized(self._settings("static", embedding_bits=32))}
        if self.task == IMAGES:
            return {}
        other: Literal["dynamic", "static"] = "dynamic" if self.stage.method == "static" else "static"
        changed = self._settings(other)
        if self.task == SPEECH:
            last = self.runner.recipe.stages[-1]
            return {f"ours, {other} encoder": lambda: last.run(changed.run(self.exported, self.context), self.context)}
        nncf = self.stage.model_copy(update={"method": "static", "statistics": "nncf", "calibration_method": "minmax"})
        return {f"ours, {other}": self._quantized(changed), "ours, NNCF's statistics": self._quantized(nncf)}

    def _settings(self, method: Literal["dynamic", "static"], **others: object) -> OnnxInt8:
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
        assert isinstance(model, OnnxModel), f"{label} returns ONNX"
        return model


def _operators(model: OnnxModel) -> list[str]:
    return [node.op_type for node in model.graph.graph.node]


def _identity(model: OnnxModel) -> OnnxModel:
    return model
