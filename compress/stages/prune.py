"""Remove weights, heads, neurons or layers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from compress.models.torch_model import TorchModel
from compress.stages.stage import Context, Needs, Stage
from compress.training.config import Training


class Prune(Training, Stage[TorchModel, TorchModel]):
    """Structured pruning by importance measured on data, or unstructured magnitude pruning.

    Structured: the first-order Taylor importance of each attention head and feed-forward neuron
    (Michel et al. 2019, section 4.1; Molchanov et al. 2019, section 3.1), accumulated over training examples;
    the least important are cut out and tensors get smaller. Unstructured: the smallest magnitudes of the linear
    weights become zero, at once or along the cubic schedule of Zhu and Gupta (2017, section 3) while training.
    The training parameters serve the cubic schedule alone.
    """

    packages = ("torch", "transformers", "accelerate")
    tasks = ("text-classification",)
    kind: Literal["prune"] = "prune"
    sparsity: float | None = Field(None, gt=0, lt=1, description="unstructured: share of zeros in linear weights")
    schedule: Literal["one-shot", "cubic"] = Field("one-shot", description="unstructured: at once or while training")
    scope: Literal["layer", "global"] = Field("layer", description="unstructured: where magnitudes are ranked")
    heads: float = Field(0.0, ge=0, lt=1, description="structured: share of attention heads to remove in each layer")
    feed_forward: float = Field(0.0, ge=0, lt=1, description="structured: share of feed-forward neurons to remove")
    layers: int = Field(0, ge=0, description="structured: number of whole layers to remove")
    importance: Literal["taylor", "magnitude"] = Field("taylor", description="structured: what ranks the parts")
    importance_examples: int = Field(512, ge=1, description="structured: training examples that importance sees")

    @model_validator(mode="after")
    def _something_to_do(self) -> Prune:
        structured = bool(self.heads or self.feed_forward or self.layers)
        if structured == (self.sparsity is not None):
            raise ValueError("either sparsity, or some of heads, feed_forward and layers")
        return self

    def needs(self) -> Needs:
        """Training examples, unless magnitudes alone decide at once."""
        trains = self.sparsity is not None and self.schedule == "cubic"
        measures = self.sparsity is None and self.importance == "taylor"
        return Needs(splits=("train",) if trains or measures or self.layers else ())

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """Prune ``model`` in place."""
        from compress.training import structured_pruning, unstructured_pruning

        if self.sparsity is not None:
            unstructured_pruning.prune(model, self, context)
        else:
            structured_pruning.prune(model, self, context)
        return model
