"""The parameters of stages that make generators of pictures smaller. Importing this imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from compress.utils.pydantic_models import Frozen


class DenoiserPruning(Frozen):
    """What goes from a UNet: blocks, then channels; what remains is a UNet that diffusers' own config describes."""

    blocks: Literal["bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny"] | None = Field(
        None,
        description="blocks that go by BK-SDM: all pairs of resnet and attention but a stage's first on the way down, "
        "and first and last on the way up; `small`: the middle too; `tiny`: and the innermost stage",
    )
    pairs: int = Field(
        0, ge=0, le=64, description="pairs of resnet and attention that go, those without which the loss rises least"
    )
    middle: bool = Field(False, description="with pairs: the block in the middle may go as one of them")
    channels: float = Field(0.0, ge=0, lt=1, description="share of the channels to remove in each stage")
    parameters: float | None = Field(
        None, gt=0, lt=1, description="share of all parameters to remove, by the channels that matter least for it"
    )
    flops: float | None = Field(
        None, gt=0, lt=1, description="share of all FLOPs to remove, by the channels that matter least for it"
    )
    block_out_channels: tuple[int, ...] | None = Field(
        None, min_length=1, description="channels of each stage that stay, in place of a share"
    )
    importance_examples: int = Field(64, ge=1, description="training pictures that importance sees")
    timesteps: int = Field(50, ge=3, le=1000, description="timesteps, evenly spaced, over which importance is gathered")
    threshold: float = Field(
        0.05, ge=0, lt=1, description="timesteps whose loss is a smaller share of the largest are left out"
    )
    batch_size: int = Field(16, ge=1, description="pictures whose importance is computed at once")

    @property
    def cuts_channels(self) -> bool:
        """Whether stages get narrower."""
        return self._ways() > 0

    def _ways(self) -> int:
        asked = (self.channels or None, self.parameters, self.flops, self.block_out_channels)
        return sum(value is not None for value in asked)

    @model_validator(mode="after")
    def _something_goes(self) -> Self:
        if self._ways() > 1:
            raise ValueError("one of channels, parameters, flops and block_out_channels")
        if self.blocks is not None and self.pairs:
            raise ValueError("blocks, which BK-SDM chose, or pairs, which the loss chooses")
        if self.middle and not self.pairs:
            raise ValueError("pairs, of which the middle would be one")
        if not self._ways() and self.blocks is None and not self.pairs:
            raise ValueError("blocks or pairs, channels, parameters, flops or block_out_channels")
        return self


class FeatureLosses(Frozen):
    """A UNet learns by the denoising loss, its teacher's outputs, and the teacher's features behind each block.

    Kim et al. 2023 (BK-SDM), section 3.2, weigh all three alike.
    """

    denoising_weight: float = Field(1.0, ge=0, description="weight of the loss against the noise that was added")
    output_weight: float = Field(1.0, ge=0, description="weight of the loss against what the teacher answers")
    feature_weight: float = Field(1.0, ge=0, description="weight of the losses against features behind each block")
    without_prompt: float = Field(
        0.1, ge=0, lt=1, description="share of the pictures that are learned without their prompt, for guidance"
    )
    judged_examples: int = Field(64, ge=1, description="validation pictures that judge an epoch")
    judged_timesteps: int = Field(10, ge=1, le=1000, description="timesteps at which they do")

    @model_validator(mode="after")
    def _learns_something(self) -> Self:
        if not (self.denoising_weight or self.output_weight or self.feature_weight):
            raise ValueError("a weight above 0 for one of the losses")
        return self


class SmallDecoder(Frozen):
    """A small autoencoder of convolutions in the VAE's place, after TAESD's idea, learns to decode as that does."""

    width: int = Field(64, ge=4, le=1024, description="channels of its convolutions")
    layers: int = Field(3, ge=1, le=8, description="residual blocks at each resolution")
    feature_weight: float = Field(
        0.5, ge=0, description="weight of the loss on features that the VAE's own encoder sees in the pictures"
    )
    encoder_weight: float = Field(
        0.1, ge=0, description="weight of the loss of the small encoder, which drawing doesn't use"
    )
