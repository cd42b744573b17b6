"""The built-in stages; the union below is their registry. Others come in by the entry point `compress.stages`."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field

from compress.formats.coreml.stage import CoreMl
from compress.formats.executorch.stage import ExecuTorch
from compress.formats.gguf.stage import Gguf
from compress.formats.litert.stage import LiteRt
from compress.formats.onnx.stage import Export
from compress.formats.openvino.stage import OpenVino
from compress.formats.ort.stage import Ort
from compress.stage.stage import Stage
from compress.stages.attach_lora import AttachLora
from compress.stages.cast import Cast
from compress.stages.distill import Distill
from compress.stages.equalize import Equalize
from compress.stages.finetune import Finetune
from compress.stages.gptq import Gptq
from compress.stages.lora import Lora
from compress.stages.merge_lora import MergeLora
from compress.stages.nncf_weights import NncfWeights
from compress.stages.prune import Prune
from compress.stages.qat import Qat
from compress.stages.quantize import Quantize
from compress.stages.quantize_weights import QuantizeWeights
from compress.stages.reduce_dimensions import ReduceDimensions
from compress.stages.trim_vocabulary import TrimVocabulary
from compress.stages.tune_scales import TuneScales

BUILT_IN: tuple[type[Stage[Any, Any]], ...] = (
    *(Finetune, Distill, Prune, TrimVocabulary, Qat, Export, Quantize, QuantizeWeights, Cast),
    *(ReduceDimensions, Equalize, Gptq, NncfWeights, TuneScales, MergeLora, Lora, AttachLora),
    *(Gguf, Ort, OpenVino, ExecuTorch, LiteRt, CoreMl),
)


def _registered() -> dict[str, type[Stage[Any, Any]]]:
    classes = [*BUILT_IN, *(entry.load() for entry in entry_points(group="compress.stages"))]
    return {cls.model_fields["kind"].default: cls for cls in classes}


STAGES: dict[str, type[Stage[Any, Any]]] = _registered()
if TYPE_CHECKING:
    AnyStage = Stage[Any, Any]
else:
    AnyStage = Annotated[Union[tuple(STAGES.values())], Field(discriminator="kind")]  # noqa: UP007
