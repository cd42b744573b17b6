"""Remove weights, heads, neurons, channels, experts or layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from compress.models.checkpoint import Checkpoint
from compress.models.torch_model import TorchModel
from compress.stages.base import Context, Needs, Stage
from compress.stages.blockwise.cost import pruning_prediction
from compress.stages.cost_model import Estimate, PlanContext, Prediction, Shape, handling, predicted
from compress.stages.diffusion.settings import DenoiserPruning
from compress.stages.training.cost import FLOPS_TRAINING, training_prediction
from compress.stages.training.settings import Pruning
from compress.tasks.capability import DRAWS, GENERATES, HAS_LABELS, IS_WRITTEN, TAKES_IMAGES, Capabilities
from compress.utils.errors import InputError, ModelError
from compress.utils.pydantic_models import changed_fields

_OF_DECODERS = frozenset(
    {"layers", "heads", "feed_forward", "sparsity", "pattern", "precision", *Pruning.of_decoders, "kind"}
)
"""Fields that mean something for a language model."""


class Prune(Pruning, Stage[TorchModel, TorchModel]):
    """Structured pruning by importance measured on data, or unstructured pruning by magnitude.

    Structured: the first-order Taylor importance of each attention head and feed-forward neuron
    (Michel et al. 2019, section 4.1; Molchanov et al. 2019, section 3.1), accumulated over training examples;
    the least important are cut out and tensors get smaller. Of vision models, channels of convolutions are cut too,
    with everything that they are coupled to (Fang et al. 2023, DepGraph, section 3): a share in each layer, or those
    that lose least for a share of all FLOPs or parameters.

    Unstructured: the smallest magnitudes of the weights of convolutions and linear layers become zero, at once or along
    the cubic schedule of Zhu and Gupta (2017, section 3) while training. Zeros may keep to a pattern: N of every M
    (Mishra et al. 2021, section 3) or whole blocks. The first convolution, depthwise ones and the head stay dense.
    The training parameters serve the cubic schedule alone.

    Of models that draw, ``denoiser`` says what goes from the UNet: blocks by BK-SDM (Kim et al. 2023, section 3.1) or
    those without which the denoising loss rises least, and channels by importance gathered over timesteps (Fang et al.
    2023, Diff-Pruning). What is left is a UNet that diffusers' own config describes.

    Language models are read tensor by tensor, one block in memory at a time. Whole layers go that in a row (Gromov et
    al. 2024, figure 1) or by themselves (Men et al. 2024, ShortGPT, section 3) change hidden states least, or without
    which the loss on text is least, and the layer before them makes up for them (Shopkhoev et al. 2025, ReplaceMe);
    groups of heads with their keys and values, and neurons, so that the others can make up for them (Kurtic et al.
    2023, ZipLM, section 3.1), or by what passes through them (Muralidharan et al. 2024, Minitron, section 2.2); experts
    by how seldom they are chosen. Single weights go by size, by Wanda (Sun et al. 2023, section 3) or by SparseGPT
    (Frantar and Alistarh 2023, section 3).
    """

    version = 3
    packages = ("torch", "transformers", "accelerate")
    requires = frozenset({HAS_LABELS})
    excludes = frozenset({IS_WRITTEN})
    kind: Literal["prune"] = "prune"

    @classmethod
    def is_for(cls, task: Capabilities) -> bool:
        """Tasks with labels whose models are traced, language models, and models that draw."""
        return GENERATES in task or DRAWS in task or super().is_for(task)

    def wants(self, task: Capabilities) -> type[Any]:
        """A language model tensor by tensor; what is given back is read either way."""
        return Checkpoint if GENERATES in task else TorchModel

    def calls(self) -> tuple[str, ...]:
        """Torch-Pruning too where channels are cut, and diffusers where they are a UNet's."""
        if self.denoiser is not None:
            return (*self.packages, "diffusers")
        return (*self.packages, "torch-pruning") if self.cuts_channels else self.packages

    def needs(self) -> Needs:
        """Training examples, unless magnitudes alone decide at once; only who trains on them needs their labels."""
        return Needs(splits=("train",) if self.reads_examples else (), labels=self.retrains)

    def idle_fields(self, task: Capabilities) -> tuple[str, ...]:
        """Channels, where nothing has any; fields of language models for others, and those of others for them."""
        given = changed_fields(self, type(self).model_fields)
        if DRAWS in task:
            return tuple(name for name in given if name != "denoiser")
        if GENERATES in task:
            return tuple(name for name in given if name not in _OF_DECODERS)
        idle = (*super().idle_fields(task), *(name for name in given if name in (*self.of_decoders, "denoiser")))
        if TAKES_IMAGES in task:
            return idle
        return (*idle, *(name for name in ("channels", "flops", "parameters") if getattr(self, name)))

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Training on the cubic schedule, or one pass over the examples that importance sees.

        Of a language model passes over its calibration text. Raises `ModelError` where no layer or head would be left.
        """

        if self.denoiser is not None:
            unknown = "not predicted: it depends on the size of latents, and on how many blocks are tried"
            return predicted(before, None, Estimate.unknown(unknown))

        def flops(before: Shape, after: Shape, tokens: float) -> float:
            if self.zeros is None:
                share = min(self.importance_examples / plan.splits["train"].rows, 1.0)
                return FLOPS_TRAINING * before.working * tokens * share
            return FLOPS_TRAINING * after.working * tokens * self.epochs

        after = None if before is None else self._shape_left(before)
        if plan.generates:
            return pruning_prediction(self, before, after, self.reads_examples, plan)
        found = training_prediction(self, before, after, plan, flops, trained=before)
        return found if self.reads_examples else replace(found, seconds=handling(before))

    def worth_searching(self, before: Shape | None, timed: bool = False) -> dict[str, tuple[Any, ...]]:
        """Heads and neurons where there is attention, else channels by their share of FLOPs.

        Whole layers, half as many and half as many again, where some are to go.
        """
        found = super().worth_searching(before, timed)
        channels = self.cuts_channels if before is None else not before.attention
        found = {name: tried for name, tried in found.items() if (name == "flops") == channels}
        if self.layers and before is not None:
            counts = (count for count in (self.layers // 2, self.layers, 3 * self.layers // 2) if count < before.layers)
            found["layers"] = tuple(dict.fromkeys(counts))
        return found

    def passes(self, examples: float) -> tuple[float, float]:
        """Importance sees some of the examples; who trains learns from all of them."""
        if self.retrains:
            return super().passes(examples)
        return (min(examples, self.importance_examples) if self.reads_examples else 0.0), 0.0

    def _shape_left(self, shape: Shape) -> Shape | None:
        if self.cuts_channels or self.denoiser is not None:
            return None
        if self.layers and self.layers >= shape.layers > 0:
            raise ModelError(f"prune removes {self.layers} layers of a model that has {shape.layers}.")
        if shape.heads and round(shape.heads * (1 - self.heads)) < 1:
            raise ModelError(f"prune removes {self.heads:.0%} of {shape.heads} heads, which leaves none.")
        kept = shape.with_layers(shape.layers - self.layers)
        return replace(
            kept,
            attention=kept.attention * (1 - self.heads),
            feed_forward=kept.feed_forward * (1 - self.feed_forward) * (1 - self.experts),
            intermediate=round(kept.intermediate * (1 - self.feed_forward)),
        )

    def zeros_weights(self) -> bool:
        """Where it is unstructured."""
        return self.zeros is not None

    def cut_widths(self, model: Any) -> bool:
        """As many heads, neurons and experts of a decoder as will be left."""
        from compress.stages.prune_decoder.width_sizes import Sizes

        Sizes.of(model, self).cut(model)
        return True

    def check_model(self, start: Path) -> None:
        """Raises `StageError` for an architecture whose parts aren't known."""
        if self.denoiser is not None:
            self._check_denoiser(start, self.denoiser)
            return
        if self.experts:
            self._check_decoder(start)
        if self.layers or self.heads or self.feed_forward:
            from compress.models.prune_dry_run import check_cuts

            check_cuts(start, layers=self.layers > 0, heads=self.heads, neurons=self.feed_forward)

    def _check_denoiser(self, start: Path, settings: DenoiserPruning) -> None:
        from compress.models.diffusion_checks import UNET, part_config
        from compress.models.diffusion_costs import hollow_part
        from compress.stages.diffusion.denoiser_pruning import check_cut

        if (start / UNET).is_dir():
            check_cut(hollow_part(part_config(start, UNET)), settings)

    def check_data(self, start: Path, context: Context) -> None:
        """Raises `StageError` for parts of a language model that cannot be cut, or of which none would be left.

        Of models that draw it is known what goes: `InputError` where ``denoiser`` does not say it.
        """
        if DRAWS in context.task.capabilities and self.denoiser is None:
            raise InputError(
                f"The recipe does not say what goes from a model for {context.task.name}.",
                where="prune",
                expected="denoiser: {blocks: bk-sdm-base}, or pairs or channels of its UNet",
            )
        if GENERATES in context.task.capabilities:
            self._check_decoder(start)

    def _check_decoder(self, start: Path) -> None:
        from compress.stages.prune_decoder.pruning import check_cuts

        check_cuts(Checkpoint(start), self)

    def rehearse(self, model: Any, context: Context) -> Any:
        """As many heads, neurons, experts and layers cut, whichever; of channels the data decide how many."""
        if self.cuts_channels or self.denoiser is not None:
            return None
        if isinstance(model, Checkpoint):
            return self._pruned(model, context, blind=True) if self.zeros is None else model
        from compress.models.prune_dry_run import cut_any

        if self.zeros is None:
            cut_any(model.module, self.layers, self.heads, self.feed_forward)
        return model

    def run(self, model: Any, context: Context) -> Any:
        """Prune ``model``: in place, or a language model's files into others, which one process does for all."""
        if isinstance(model, Checkpoint):
            from compress.stages.training.processes import is_first

            return self._pruned(model, context) if is_first() else model
        if self.denoiser is not None:
            from compress.stages.diffusion.denoiser_pruning import prune_denoiser

            prune_denoiser(model, self.denoiser, context)
            return model
        from compress.stages.prune import structured
        from compress.stages.sparsify import magnitude

        if self.zeros is not None:
            magnitude.prune(model, self, context)
        else:
            structured.prune(model, self, context)
        return model

    def _pruned(self, model: Checkpoint, context: Context, blind: bool = False) -> Checkpoint:
        from compress.stages.prune_decoder.pruning import prune

        return prune(model, self, context, blind)
