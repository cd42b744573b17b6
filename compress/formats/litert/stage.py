"""Write a model as a LiteRT file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from compress.formats.litert.model import LITERT_FILE, Blocks, LiteRtModel, Precision
from compress.models.config_checks import max_positions
from compress.models.torch_model import TorchModel
from compress.stages.base import AppliesTo, Context, OutputSpec, Requirements, Stage
from compress.stages.cost_model import PlanContext, Prediction, Shape, in_precision
from compress.tasks.capability import (
    ANSWERS_PER_TOKEN,
    DUAL_ENCODER,
    SINGLE_CALL,
    TAKES_AUDIO,
    TAKES_IMAGES,
    VARIABLE_LENGTH,
)
from compress.utils.errors import StageError

_TEXT_ONLY = AppliesTo(excludes=frozenset({TAKES_IMAGES, TAKES_AUDIO}))


class LiteRt(Stage[TorchModel, LiteRtModel]):
    """LiteRT (`.tflite`), for Android's and other phones' own runtime: a signature for each fixed length of a text.

    The signatures share the weights; an app pads a text to the shortest that holds it. LiteRT's own interpreter proves
    the file: in fp32 the answers are torch's, and what fewer bits change is told.
    """

    packages = ("torch", "transformers", "litert-torch", "litert-converter", "ai-edge-litert", "ai-edge-quantizer")
    requires = frozenset({SINGLE_CALL})
    # Sound of any length has not been tried there.
    excludes = frozenset({ANSWERS_PER_TOKEN, DUAL_ENCODER, VARIABLE_LENGTH})
    kind: Literal["litert"] = "litert"
    precision: Precision = Field(
        "int8",
        description="of the weights; in int8 products are of 8 bits too, by the ranges of each call",
    )
    lengths: Annotated[tuple[int, ...] | int, _TEXT_ONLY] = Field(
        4,
        description="tokens of each signature, e.g. [16, 64, 128]; or how many to choose for the least padding of the "
        "training texts, the last as long as a text may be",
    )
    embedding_bits: Annotated[Literal[4, 8] | None, _TEXT_ONLY] = Field(
        None, description="bits of the table of words; default: those of the weights"
    )
    embedding_block_size: Annotated[Blocks | None, _TEXT_ONLY] = Field(
        32, description="weights of a row of that table that share a scale at 4 bits; none: the whole row"
    )
    tolerance: float = Field(
        1e-3, gt=0, description="largest accepted difference of an answer's entry from torch, in fp32"
    )

    @field_validator("lengths", mode="before")
    @classmethod
    def _fixed(cls, lengths: Any) -> Any:
        if isinstance(lengths, str):
            raise ValueError(
                f"{lengths!r}: litert-torch converts transformers at fixed lengths only, e.g. [16, 64, 128]"
            )
        return lengths

    @model_validator(mode="after")
    def _possible(self) -> LiteRt:
        some = (self.lengths,) if isinstance(self.lengths, int) else self.lengths
        if not some or min(some) < 1 or list(some) != sorted(set(some)):
            raise ValueError("lengths must be ascending and at least 1")
        if self.embedding_bits is not None and self.precision in ("fp32", "fp16"):
            raise ValueError("embedding_bits are for integers: set precision: int8 or int8_weights")
        return self

    def needs(self) -> Requirements:
        """Return the request for real examples, for their lengths, for tracing and for the proof."""
        return Requirements(splits=("train",))

    def output_spec(self) -> OutputSpec:
        """Weights of fewer bits, if any; graphs of several lengths can outweigh those of a very small model."""
        return OutputSpec(changes_weights=self.precision != "fp32")

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """The same weights in the precision that is asked for; the graph beside them is small."""
        return in_precision(before, self.precision, self.embedding_bits)

    def run(self, model: TorchModel, context: Context) -> LiteRtModel:
        """Convert, quantize and compare. Raises `StageError` where LiteRT can't, `IntegrityError` for other answers."""
        from compress.formats.litert.conversion import quantize_litert, to_litert, words_of
        from compress.formats.parity import check_shipped_parity, torch_answers
        from compress.formats.runtime import open_model

        examples = context.encode("train", model)
        lengths = self._lengths(model, examples.lengths(), context) if "input_ids" in examples.padding else ()
        content = to_litert(model, examples, lengths)
        plain = LiteRtModel({LITERT_FILE: content}, model.companions())
        words = words_of(model) if lengths else None
        block = self._block(model.tensors()[words].shape[1], context) if words is not None else None
        content = quantize_litert(content, self.precision, words, self.embedding_bits, block)
        litert_model = LiteRtModel({LITERT_FILE: content}, plain.companions)
        shipped = open_model(litert_model)
        first = shipped if self.precision == "fp32" else open_model(plain)
        reference = torch_answers(model.module, examples)
        context.note(f"litert: {check_shipped_parity('LiteRT', first, shipped, reference, examples, self.tolerance)}")
        return litert_model

    def _block(self, width: int, context: Context) -> Blocks | None:
        """Weights of the table's rows that share a scale: a block that divides them, or None for whole rows."""
        block = self.embedding_block_size
        if self.embedding_bits != 4 or block is None or width % block == 0:
            return block
        context.note(f"litert: the table of words has a scale a row, since {block} does not divide its {width}")
        return None

    def _lengths(self, model: TorchModel, texts: Any, context: Context) -> tuple[int, ...]:
        """Those of the recipe, or those that pad the training texts least. Raises `StageError` for a text too long."""
        from compress.numerics.sampling import covering_lengths

        positions = max_positions(model.module.config.to_dict()) or context.max_length
        longest = max(min(context.max_length, positions, model.tokenizer.model_max_length), int(texts.max()))
        chosen = covering_lengths(texts, self.lengths, longest) if isinstance(self.lengths, int) else self.lengths
        if chosen[-1] > positions or chosen[-1] < texts.max():
            raise StageError(
                f"The longest signature has {chosen[-1]} tokens.",
                where="lengths",
                expected=f"{texts.max()} at least, for the training texts; {positions} at most, for the model",
            )
        padded = sum(min(one for one in chosen if one >= text) for text in texts.tolist())
        waste = padded / int(texts.sum()) - 1
        context.note(f"litert: signatures of {', '.join(map(str, chosen))} tokens; padding adds {waste:.0%} of tokens")
        return chosen
