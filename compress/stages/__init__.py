"""Every stage: those of models, those of the formats, and others by the entry point `compress.stages`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field

from compress.formats.registry import FORMATS
from compress.formats.spec import load
from compress.plugins import STAGES as GROUP
from compress.plugins import UnusablePluginError, load_plugins
from compress.stage.stage import Stage
from compress.stages.attach_lora import AttachLora
from compress.stages.cast import Cast
from compress.stages.compressed_tensors import CompressedTensors
from compress.stages.distill import Distill
from compress.stages.eagle3 import Eagle3
from compress.stages.equalize import Equalize
from compress.stages.finetune import Finetune
from compress.stages.gptq import Gptq
from compress.stages.imatrix import Imatrix
from compress.stages.lora import Lora
from compress.stages.merge_lora import MergeLora
from compress.stages.nncf_weights import NncfWeights
from compress.stages.prune import Prune
from compress.stages.qat import Qat
from compress.stages.quantize import Quantize
from compress.stages.quantize_weights import QuantizeWeights
from compress.stages.reduce_dimensions import ReduceDimensions
from compress.stages.rotate import Rotate
from compress.stages.schedule import Schedule
from compress.stages.train_blocks import TrainBlocks
from compress.stages.trim_vocabulary import TrimVocabulary
from compress.stages.tune_scales import TuneScales

_OWN: tuple[type[Stage[Any, Any]], ...] = (
    *(Finetune, Distill, Prune, TrimVocabulary, Qat, Quantize, QuantizeWeights, Cast),
    *(ReduceDimensions, Equalize, Rotate, Imatrix, Gptq, TrainBlocks, NncfWeights, TuneScales, MergeLora, Lora),
    *(AttachLora, Eagle3, CompressedTensors, Schedule),
)


def _kind(cls: type[Stage[Any, Any]]) -> str:
    kind: str = cls.model_fields["kind"].default
    return kind


def _accepted(found: Any) -> type[Stage[Any, Any]]:
    """A plugin's stage. Raises `UnusablePluginError`."""
    if not (isinstance(found, type) and issubclass(found, Stage)):
        raise UnusablePluginError(f"{found!r} is no stage; expected a subclass of compress.stage.stage.Stage")
    if lacking := sorted(found.__abstractmethods__):
        raise UnusablePluginError(f"{found.__name__} lacks {', '.join(lacking)}")
    if not isinstance(found.model_fields["kind"].default, str):
        raise UnusablePluginError(f"{found.__name__} has no kind; expected `kind: Literal[...] = ...`")
    return found


def _registered() -> dict[str, type[Stage[Any, Any]]]:
    classes = [*_OWN, *(load(spec.stage) for spec in FORMATS.values() if spec.stage)]
    found = {_kind(cls): cls for cls in classes}
    return found | load_plugins(GROUP, found, _accepted, _kind)


STAGES: dict[str, type[Stage[Any, Any]]] = _registered()
if TYPE_CHECKING:
    AnyStage = Stage[Any, Any]
else:
    AnyStage = Annotated[Union[tuple(STAGES.values())], Field(discriminator="kind")]  # noqa: UP007
