"""Remove weights, heads, neurons, channels or layers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from compress.checkpoints.torch_model import TorchModel
from compress.numerics.sparse_pattern import Pattern
from compress.stage.stage import Context, Needs, Stage
from compress.tasks.capability import HAS_CLASSES, TAKES_IMAGES, Capabilities
from compress.training.config import Training


class Prune(Training, Stage[TorchModel, TorchModel]):
    """Structured pruning by importance measured on data, or unstructured magnitude pruning.

    Structured: the first-order Taylor importance of each attention head and feed-forward neuron
    (Michel et al. 2019, section 4.1; Molchanov et al. 2019, section 3.1), accumulated over training examples;
    the least important are cut out and tensors get smaller. Of vision models, channels of convolutions are cut too,
    with everything that they are coupled to (Fang et al. 2023, DepGraph, section 3): a share in each layer, or those
    that lose least for a share of all FLOPs or parameters.

    Unstructured: the smallest magnitudes of the weights of convolutions and linear layers become zero, at once or along
    the cubic schedule of Zhu and Gupta (2017, section 3) while training. Zeros may keep to a pattern: N of every M
    (Mishra et al. 2021, section 3) or whole blocks. The first convolution, depthwise ones and the head stay dense.
    The training parameters serve the cubic schedule alone.
    """

    packages = ("torch", "transformers", "accelerate")
    requires = frozenset({HAS_CLASSES})
    kind: Literal["prune"] = "prune"
    sparsity: float | None = Field(None, gt=0, lt=1, description="unstructured: share of zeros in each layer's weights")
    pattern: str | None = Field(
        None,
        pattern=r"^[1-9]\d{0,3}[:x][1-9]\d{0,3}$",
        description="unstructured: `2:4` keeps 2 of every 4 inputs; `4x1` zeroes blocks of outputs x inputs",
    )
    schedule: Literal["one-shot", "cubic"] = Field("one-shot", description="unstructured: at once or while training")
    scope: Literal["layer", "global"] = Field("layer", description="unstructured: where magnitudes are ranked")
    heads: float = Field(0.0, ge=0, lt=1, description="structured: share of attention heads to remove in each layer")
    feed_forward: float = Field(0.0, ge=0, lt=1, description="structured: share of feed-forward neurons to remove")
    layers: int = Field(0, ge=0, description="structured: number of whole layers to remove")
    channels: float = Field(0.0, ge=0, lt=1, description="structured: share of channels to remove in each layer")
    flops: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="structured: share of all FLOPs to remove, by the channels that matter least for it",
    )
    parameters: float | None = Field(
        None, gt=0, lt=1, description="structured: share of all parameters to remove, by channels likewise"
    )
    channel_multiple: int = Field(
        8, ge=1, le=512, description="structured: a layer that loses channels keeps a multiple of this"
    )
    importance: Literal["taylor", "magnitude"] = Field("taylor", description="structured: what ranks the parts")
    importance_examples: int = Field(512, ge=1, description="structured: training examples that importance sees")

    @model_validator(mode="after")
    def _something_to_do(self) -> Prune:
        structured = bool(self.heads or self.feed_forward or self.layers or self.cuts_channels)
        if structured == (self.sparsity is not None or self.pattern is not None):
            raise ValueError(
                "either sparsity or a pattern, or some of heads, feed_forward, layers, and one of channels, flops, "
                "parameters"
            )
        if sum((bool(self.channels), self.flops is not None, self.parameters is not None)) > 1:
            raise ValueError("one of channels, flops and parameters")
        if self.augment is not None and (self.zeros is None or self.schedule != "cubic"):
            raise ValueError("schedule: cubic, since augment varies the images of training, and nothing else trains")
        self._check_pattern()
        return self

    def _check_pattern(self) -> None:
        if self.pattern is None:
            return
        pattern = Pattern.read(self.pattern)
        if pattern.blocks:
            if self.sparsity is None:
                raise ValueError("sparsity, the share of blocks that become zero")
            return
        if pattern.first >= pattern.second:
            raise ValueError(f"a pattern N:M that keeps N of M, N below M; {self.pattern} removes nothing")
        if self.sparsity is not None:
            raise ValueError(f"no sparsity: {self.pattern} says it, {pattern.sparsity:.0%}")
        if self.scope == "global":
            raise ValueError(f"scope: layer; {self.pattern} leaves no layer more than another")

    @property
    def cuts_channels(self) -> bool:
        """Whether channels go."""
        return bool(self.channels) or self.flops is not None or self.parameters is not None

    @property
    def zeros(self) -> float | None:
        """The share of weights that become zero; ``None`` where parts are cut."""
        if self.sparsity is None and self.pattern is not None:
            return Pattern.read(self.pattern).sparsity
        return self.sparsity

    def calls(self) -> tuple[str, ...]:
        """Torch-Pruning too where channels are cut."""
        return (*self.packages, "torch-pruning") if self.cuts_channels else self.packages

    def needs(self) -> Needs:
        """Training examples, unless magnitudes alone decide at once; only who trains on them needs their labels."""
        trains = self.zeros is not None and self.schedule == "cubic"
        measures = self.zeros is None and self.importance == "taylor"
        reads = trains or measures or self.layers or self.cuts_channels
        return Needs(splits=("train",) if reads else (), without_labels=not trains)

    def idle_fields(self, task: Capabilities) -> tuple[str, ...]:
        """Channels, where nothing has any."""
        idle = super().idle_fields(task)
        if TAKES_IMAGES in task:
            return idle
        return (*idle, *(name for name in ("channels", "flops", "parameters") if getattr(self, name)))

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """Prune ``model`` in place."""
        from compress.training import structured_pruning, unstructured_pruning

        if self.zeros is not None:
            unstructured_pruning.prune(model, self, context)
        else:
            structured_pruning.prune(model, self, context)
        return model
