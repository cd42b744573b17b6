"""Every stage: those of models, those of the formats, and others by the entry point `compress.stages`.

Recipes name stages by `kind`, so kinds are unique over all packages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from compress.formats.registry import FORMATS
from compress.formats.spec import load
from compress.plugins import UnusablePluginError, load_extensions
from compress.stages.base import AnyStage, Stage
from compress.stages.block_qat.stage import BlockQat
from compress.stages.cast import Cast
from compress.stages.compressed_tensors.stage import CompressedTensors
from compress.stages.distill.stage import Distill
from compress.stages.distill_language_model.stage import DistillLanguageModel
from compress.stages.equalize.stage import Equalize
from compress.stages.finetune import Finetune
from compress.stages.gptq.stage import Gptq
from compress.stages.imatrix.stage import Imatrix
from compress.stages.lora import AttachLora, MergeLora
from compress.stages.nncf_weights.stage import NncfWeights
from compress.stages.onnx_int8.stage import OnnxInt8
from compress.stages.onnx_weight_only import OnnxWeightOnly
from compress.stages.prune.stage import Prune
from compress.stages.prune_decoder.stage import PruneDecoder
from compress.stages.qat.stage import Qat
from compress.stages.recovery.stages import LoraRecovery, TuneScales
from compress.stages.reduce_dimensions import ReduceDimensions
from compress.stages.sparsify.stages import Sparsify, SparsifyDecoder, SparsifyGradually
from compress.stages.trim_vocabulary import TrimVocabulary

_BUILT_IN: tuple[type[AnyStage], ...] = (
    *(Finetune, Distill, DistillLanguageModel),
    *(Prune, PruneDecoder, Sparsify, SparsifyGradually, SparsifyDecoder),
    *(TrimVocabulary, ReduceDimensions),
    *(Qat, OnnxInt8, OnnxWeightOnly, Cast),
    *(Equalize, Imatrix, Gptq, BlockQat, NncfWeights, TuneScales, MergeLora, LoraRecovery, AttachLora),
    CompressedTensors,
)


def _kind(cls: type[AnyStage]) -> str:
    kind: str = cls.model_fields["kind"].default
    return kind


def _accepted(found: object) -> type[AnyStage]:
    """Return an extension's stage. Raises `UnusablePluginError`."""
    if not (isinstance(found, type) and issubclass(found, Stage)):
        raise UnusablePluginError(f"{found!r} is no stage; expected a subclass of compress.stages.base.Stage")
    if lacking := sorted(found.__abstractmethods__):
        raise UnusablePluginError(f"{found.__name__} lacks {', '.join(lacking)}")
    if not isinstance(found.model_fields["kind"].default, str):
        raise UnusablePluginError(f"{found.__name__} has no kind; expected `kind: Literal[...] = ...`")
    return found


_FORMAT_STAGES = (load(spec.stage) for spec in FORMATS.values() if spec.stage)
_INCLUDED: dict[str, type[AnyStage]] = {_kind(cls): cls for cls in (*_BUILT_IN, *_FORMAT_STAGES)}
STAGES: dict[str, type[AnyStage]] = _INCLUDED | load_extensions("stages", _INCLUDED, _accepted, _kind)
if TYPE_CHECKING:
    RecipeStage = AnyStage
else:
    RecipeStage = Annotated[Union[tuple(STAGES.values())], Field(discriminator="kind")]  # noqa: UP007
