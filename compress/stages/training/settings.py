"""The parameters of every kind of training, which the stages that train inherit. Importing this imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.formats.target_profile import find_processor
from compress.numerics.sparse_pattern import Pattern
from compress.stages.base import SEARCH, Needs
from compress.stages.diffusion.settings import DenoiserPruning
from compress.stages.training.synthetic_data_settings import TEACHER_WRITES, TeacherWrites, writing_packages
from compress.tasks.capability import BY_PLACE, TAKES_IMAGES, Capabilities
from compress.utils.pydantic_models import Frozen

Precision = Literal["auto", "fastest", "fp32", "bf16"]
PRECISION: Precision = Field(
    "auto",
    description="`auto` takes bf16 autocast where the processor has bf16 arithmetic, `fastest` where "
    "products in it are measured to be faster than in fp32",
)


class Augment(Frozen):
    """How training images are varied, by the names of torchvision's `RandomCrop` and `RandomHorizontalFlip`."""

    crop_padding: int = Field(
        0, ge=0, description="pixels of black put around each image, of which a window of its own size is cut at random"
    )
    horizontal_flip: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="probability that an image is mirrored; not where left and right tell classes apart, as of digits",
    )

    @model_validator(mode="after")
    def _something_varies(self) -> Augment:
        if not (self.crop_padding or self.horizontal_flip):
            raise ValueError("crop_padding, horizontal_flip, or both")
        return self


class Training(Frozen):
    """AdamW with linear warm-up, and linear decay or that of a cosine (Loshchilov and Hutter 2019, section 3)."""

    trains: ClassVar[bool] = True
    epochs: float = Field(3.0, gt=0, le=1000, description="passes over the training examples")
    learning_rate: float = Field(5e-5, gt=0, le=1, description="peak learning rate")
    batch_size: int = Field(32, ge=1, description="examples a step in each process")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the rate rises")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay")
    max_gradient_norm: float = Field(1.0, gt=0, description="gradients are clipped to this global norm")
    precision: Precision = PRECISION
    dropout: float | None = Field(
        None, ge=0, lt=1, description="dropout while training; default: the model's own. 0 is also faster"
    )
    freeze_embeddings: bool = Field(False, description="leave the embedding tables as they are")
    augment: Augment | None = Field(
        None, description="training images are varied anew in every epoch: {crop_padding: 2, horizontal_flip: 0.5}"
    )
    keep_best: bool = Field(True, description="keep the epoch that is best on the validation split, if there is one")
    decay: Literal["linear", "cosine"] = Field("linear", description="how the rate falls once it has risen")

    def shortened(self, share: float) -> Self:
        """The same with as large a share of its epochs."""
        return self.model_copy(update={"epochs": self.epochs * share})

    def trained_as_usual(self) -> Self:
        """The same with the defaults of all that says how it trains; dropout may stand in the model's config."""
        usual = {name: type(self).model_fields[name].default for name in Training.model_fields if name != "dropout"}
        return self.model_copy(update=usual)

    def idle_fields(self, task: Capabilities) -> tuple[str, ...]:
        """`augment`, where inputs are no images, or answers are places in them."""
        varied = TAKES_IMAGES in task and BY_PLACE not in task
        return ("augment",) if self.augment is not None and not varied else ()


FIRST_TOKEN_ONLY: bool = Field(
    False,
    description="compute of the last layer what a classifier reads, its first token: the same function, rounded "
    "otherwise, for less work",
)


class WindowTraining(Frozen):
    """AdamW with linear warm-up and decay on windows of the ``train`` split, each step on other windows."""

    trains: ClassVar[bool] = True
    reads: ClassVar[Needs] = Needs(splits=("train",))
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers", "accelerate")
    teacher_writes: TeacherWrites | None = TEACHER_WRITES
    steps: int = Field(100, ge=1, le=1_000_000, description="steps of training; more is better and takes longer")
    batch_size: int = Field(2, ge=1, description="windows a step")
    sequence_length: int = Field(512, ge=16, description="tokens of a window")
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the rate rises")
    validation_windows: int = Field(
        8, ge=1, description="held-out windows (of the validation split, where there is one) that judge the result"
    )
    precision: Precision = PRECISION

    def shortened(self, share: float) -> Self:
        """The same with as large a share of its steps."""
        return self.model_copy(update={"steps": max(1, round(self.steps * share))})

    def calls(self) -> tuple[str, ...]:
        """Also what the teacher writes by."""
        return (*self.packages, *writing_packages(self.teacher_writes))

    def training(self, learning_rate: float, windows: int, bf16: bool, dropout: float = 0.0) -> Training:
        """The same for the loop, on so many windows."""
        return Training(
            epochs=self.steps / -(-windows // self.batch_size),
            learning_rate=learning_rate,
            batch_size=self.batch_size,
            warmup_ratio=self.warmup_ratio,
            weight_decay=0.0,
            dropout=dropout,
            precision="bf16" if bf16 else "fp32",
        )


class Recovery(WindowTraining):
    """A training in which a model learns to predict as it did before."""

    teacher: str = Field("start", description="label of the stage whose output is imitated, or `start`")
    logits_weight: float = Field(1.0, ge=0, description="weight of the KL to the teacher's predictions")
    labels_weight: float = Field(
        0.0, ge=0, description="weight of the cross-entropy of the text itself, whose content is learned then"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout while training, in the model's layers and adapters")

    @model_validator(mode="after")
    def _learns(self) -> Self:
        if not self.logits_weight and not self.labels_weight:
            raise ValueError("logits_weight or labels_weight above 0, or there is nothing to learn from")
        return self

    def refers_to(self) -> tuple[str, ...]:
        """The teacher's label."""
        return (self.teacher,)


class ScaleTuning(Recovery):
    """A recovery that changes scales and norms, and no integer."""

    learning_rate: float = Field(2e-3, gt=0, le=0.5, description="peak change of a scale or norm in a step, relative")
    scales: bool = Field(True, description="tune the scales of linear layers")
    norms: bool = Field(True, description="tune the weights of norms, and biases")
    embeddings: bool = Field(True, description="tune the scales of quantized embedding tables and tied heads")


class AdapterTraining(Recovery):
    """A recovery that trains a low-rank adapter and leaves the base as it is."""

    learning_rate: float = Field(1e-3, gt=0, le=1, description="peak learning rate")
    rank: int = Field(16, ge=1, le=4096, description="columns of each factor")
    alpha: float | None = Field(None, gt=0, description="the product counts alpha / rank; default: twice the rank")
    target_modules: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="last parts of the names of adapted layers, e.g. q_proj; default: all linear ones",
    )


_FOUR_BITS_FROM = 21


class QuantizationAwareTraining(Training):
    """A training through integers, with the float model as the teacher, and the graph that they are written into."""

    bits: Literal[4, 8] = Field(8, description="bits of the weights; activations have 8")
    reduce_range: bool | Literal["auto"] = Field(
        "auto",
        description="7-bit weights in place of 8-bit ones, whose products may saturate on x86 processors without VNNI; "
        "auto: unless the processors of all targets add them in 32 bits",
    )
    learning_rate: float = Field(1e-4, gt=0, le=1, description="peak learning rate")
    calibration_examples: int = Field(256, ge=1, description="training examples from which the first steps are taken")
    temperature: float = Field(2.0, gt=0, description="softens both sides of the loss on logits")
    labels_weight: float = Field(0.5, ge=0, le=1, description="share of the task's own loss in the whole")
    format: Literal["qoperator", "qdq"] = Field(
        "qoperator",
        description="products as ONNX Runtime's integer operators, or all as QuantizeLinear and DequantizeLinear "
        "around standard operators, for other runtimes",
    )
    opset: int | None = Field(
        None, ge=17, description="ONNX operator set; 4-bit weights need 21. Default: the exporter's newest"
    )
    tolerance: float = Field(
        0.05,
        gt=0,
        description="largest accepted difference of a probability between training and the exported graph: a rounding "
        "that falls to the other side moves some",
    )

    @model_validator(mode="after")
    def _four_bits_are_known(self) -> Self:
        if self.bits == 4 and self.opset is not None and self.opset < _FOUR_BITS_FROM:
            raise ValueError(f"opset {_FOUR_BITS_FROM} or newer, since bits: 4 needs integers of 4 bits")
        return self

    @property
    def narrow(self) -> bool:
        """`reduce_range`; what is left to the processors is decided by this one, where no recipe did."""
        return not find_processor("cpu").sums_in_32_bits if self.reduce_range == "auto" else self.reduce_range


class Pruning(Training):
    """Parts that are cut out, or weights that become zero; the training parameters serve the cubic schedule alone."""

    of_decoders: ClassVar[tuple[str, ...]] = (
        *(
            "method",
            "experts",
            "layer_importance",
            "bridge",
            "width_importance",
            "multiple",
            "samples",
            "sequence_length",
            "damp_percent",
        ),
    )
    """Fields that mean something for language models alone."""
    sparsity: float | None = Field(None, gt=0, lt=1, description="unstructured: share of zeros in each layer's weights")
    pattern: str | None = Field(
        None,
        pattern=r"^[1-9]\d{0,3}[:x][1-9]\d{0,3}$",
        description="unstructured: `2:4` keeps 2 of every 4 inputs; `4x1` zeroes blocks of outputs x inputs",
    )
    schedule: Literal["one-shot", "cubic"] = Field("one-shot", description="unstructured: at once or while training")
    scope: Literal["layer", "global"] = Field("layer", description="unstructured: where magnitudes are ranked")
    heads: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="structured: share of attention heads to remove in each layer",
        json_schema_extra={SEARCH: [0.0, 0.25, 0.5, 0.75]},
    )
    feed_forward: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="structured: share of feed-forward neurons to remove",
        json_schema_extra={SEARCH: [0.0, 0.25, 0.5, 0.75, 0.875]},
    )
    layers: int = Field(0, ge=0, description="structured: number of whole layers to remove")
    channels: float = Field(0.0, ge=0, lt=1, description="structured: share of channels to remove in each layer")
    flops: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="structured: share of all FLOPs to remove, by the channels that matter least for it",
        json_schema_extra={SEARCH: [0.3, 0.5, 0.7]},
    )
    parameters: float | None = Field(
        None, gt=0, lt=1, description="structured: share of all parameters to remove, by channels likewise"
    )
    channel_multiple: int = Field(
        8, ge=1, le=512, description="structured: a layer that loses channels keeps a multiple of this"
    )
    importance: Literal["taylor", "magnitude"] = Field("taylor", description="structured: what ranks the parts")
    importance_examples: int = Field(512, ge=1, description="structured: training examples that importance sees")
    method: Literal["magnitude", "wanda", "sparsegpt"] = Field(
        "magnitude",
        description="unstructured, of language models: which weights go by their size alone, by size times that of "
        "their inputs (Wanda), or such that the others can make up for them (SparseGPT)",
    )
    experts: float = Field(
        0.0, ge=0, lt=1, description="language models: share of each mixture's experts to remove, those least chosen"
    )
    layer_importance: Literal["neighbours", "block_influence", "greedy"] = Field(
        "neighbours",
        description="language models: layers in a row go that together change hidden states least, or those that each "
        "by itself does, or one after the other, each the one without which the loss on text is least; that takes "
        "many times as long",
    )
    bridge: bool = Field(
        True,
        description="language models: the layer before layers that go is solved so that it gives what they gave "
        "(ReplaceMe)",
    )
    width_importance: Literal["obs", "activation"] = Field(
        "obs",
        description="language models: heads and neurons go one after the other, each the one that the others can best "
        "make up for, and they are made to (optimal brain surgeon); or those through which least passes (Minitron)",
    )
    multiple: int = Field(
        64,
        ge=1,
        le=1024,
        description="language models: what is left of a feed-forward layer, or of an attention's outputs, is a "
        "multiple of this, as groups of few-bit weights want it",
    )
    samples: int = Field(
        16, ge=1, le=100_000, description="language models: windows of text from the train split that importance sees"
    )
    sequence_length: int = Field(512, ge=8, le=131_072, description="language models: tokens of a window")
    damp_percent: float = Field(
        0.01, gt=0, lt=1, description="sparsegpt, obs, bridge: added to the Hessian's diagonal, relative to its mean"
    )

    denoiser: DenoiserPruning | None = Field(
        None, description="models that draw: the blocks and channels that go from their UNet"
    )

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        if self.denoiser is not None:
            asked = (
                "sparsity",
                "pattern",
                "heads",
                "feed_forward",
                "layers",
                "experts",
                "channels",
                "flops",
                "parameters",
            )
            others = [name for name in asked if getattr(self, name)]
            if others:
                raise ValueError(f"denoiser alone, which says what goes from a UNet, without {', '.join(others)}")
            return self
        structured = bool(self.heads or self.feed_forward or self.layers or self.experts or self.cuts_channels)
        if structured == (self.sparsity is not None or self.pattern is not None):
            raise ValueError(
                "either sparsity or a pattern, or some of heads, feed_forward, layers, experts, and one of channels, "
                "flops, parameters"
            )
        if sum((bool(self.channels), self.flops is not None, self.parameters is not None)) > 1:
            raise ValueError("one of channels, flops and parameters")
        if self.augment is not None and (self.zeros is None or self.schedule != "cubic"):
            raise ValueError("schedule: cubic, since augment varies the images of training, and nothing else trains")
        self._check_pattern()
        self._check_method()
        return self

    def _check_method(self) -> None:
        if self.method == "magnitude":
            return
        if self.zeros is None:
            raise ValueError(f"sparsity or a pattern, since method: {self.method} says which weights become zero")
        if self.schedule != "one-shot" or self.scope != "layer":
            raise ValueError(f"schedule: one-shot and scope: layer; {self.method} solves one layer after the other")
        if self.pattern is not None and Pattern.read(self.pattern).blocks:
            raise ValueError(f"a pattern N:M, or none; {self.method} chooses single weights, not blocks")

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

    @property
    def retrains(self) -> bool:
        """Whether the other weights are trained while some become zero."""
        return self.zeros is not None and self.schedule == "cubic"

    def shortened(self, share: float) -> Self:
        """The same, unless weights are trained while some become zero: then with as large a share of the epochs."""
        return super().shortened(share) if self.retrains else self

    @property
    def reads_examples(self) -> bool:
        """Whether training examples have a say, rather than magnitudes alone."""
        measures = self.zeros is None and self.importance == "taylor"
        solved = self.method != "magnitude" or self.experts
        if self.denoiser is not None:
            return True
        return bool(self.retrains or measures or self.layers or self.cuts_channels or solved)
