"""Write a model as a LiteRT file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from compress.formats.export_stage import ExportStage
from compress.formats.litert.model import LITERT_FILE, Blocks, LiteRtModel, Precision
from compress.models.config_checks import max_positions
from compress.models.model import TorchModel
from compress.stages.base import AppliesTo, Context
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


class LiteRt(ExportStage[TorchModel, LiteRtModel]):
    """LiteRT (`.tflite`), for Android and other phones, with a signature for each of several fixed text lengths.

    The signatures share the weights; an app pads a text to the shortest signature that fits. The file's outputs are
    compared with torch in LiteRT's own interpreter: in fp32 they must be equal within `tolerance`, with fewer bits the
    report states the difference.
    """

    packages = ("torch", "transformers", "litert-torch", "litert-converter", "ai-edge-litert", "ai-edge-quantizer")
    requires = frozenset({SINGLE_CALL})
    # Audio of variable length has not been tried with LiteRT.
    excludes = frozenset({ANSWERS_PER_TOKEN, DUAL_ENCODER, VARIABLE_LENGTH})
    kind: Literal["litert"] = "litert"
    precision: Precision = Field(
        "int8",
        description="data type of the weights; with int8, activations are quantized dynamically to 8 bits too",
    )
    lengths: Annotated[tuple[int, ...] | int, _TEXT_ONLY] = Field(
        4,
        description="sequence length of each signature, e.g. [16, 64, 128]; or a number of signatures, whose lengths "
        "are chosen to pad the training texts least and to fit the longest one",
    )
    embedding_bits: Annotated[Literal[4, 8] | None, _TEXT_ONLY] = Field(
        None, description="bits of the token embedding table; default: those of the weights"
    )
    embedding_block_size: Annotated[Blocks | None, _TEXT_ONLY] = Field(
        32, description="weights of an embedding row that share a scale at 4 bits; null: the whole row"
    )
    tolerance: float = Field(
        1e-3, gt=0, description="maximum absolute difference of an output element from torch in fp32"
    )

    @model_validator(mode="after")
    def _require_ascending_lengths(self) -> LiteRt:
        lengths = (self.lengths,) if isinstance(self.lengths, int) else self.lengths
        if not lengths or min(lengths) < 1 or list(lengths) != sorted(set(lengths)):
            raise ValueError("lengths must be ascending and at least 1")
        if self.embedding_bits is not None and self.precision in ("fp32", "fp16"):
            raise ValueError("embedding_bits are for integers: set precision: int8 or int8_weights")
        return self

    def run(self, model: TorchModel, context: Context) -> LiteRtModel:
        """Convert and quantize the model, then compare its answers with torch.

        Raises:
            StageError: LiteRT cannot express the model.
            IntegrityError: The answers differ too much.
        """
        from compress.formats.litert.conversion import quantize_litert, to_litert, word_embedding_name
        from compress.formats.parity import check_shipped_parity, torch_answers
        from compress.formats.runtime import open_model

        examples = context.encode("train", model)
        lengths = self._signature_lengths(model, examples.lengths(), context) if "input_ids" in examples.padding else ()
        content = to_litert(model, examples, lengths)
        plain = LiteRtModel({LITERT_FILE: content}, model.companions())
        word_embedding, block = word_embedding_name(model) if lengths else None, self.embedding_block_size
        if word_embedding is not None and self.embedding_bits == 4 and block is not None:
            width = model.tensors()[word_embedding].shape[1]
            if width % block:
                reason = f"because {block} does not divide its width {width}"
                context.note(f"litert: the word embedding table has a scale per row, {reason}")
                block = None
        content = quantize_litert(content, self.precision, word_embedding, self.embedding_bits, block)
        litert_model = LiteRtModel({LITERT_FILE: content}, plain.companions)
        # The float file is compared exactly; the shipped file may differ by rounding.
        shipped = open_model(litert_model)
        first = shipped if self.precision == "fp32" else open_model(plain)
        reference = torch_answers(model.module, examples)
        context.note(f"litert: {check_shipped_parity('LiteRT', first, shipped, reference, examples, self.tolerance)}")
        return litert_model

    def _signature_lengths(self, model: TorchModel, text_lengths: Any, context: Context) -> tuple[int, ...]:
        """Return the recipe's lengths, or those that pad the training texts least.

        Raises:
            StageError: A text or the model's positions do not fit the longest signature.
        """
        from compress.numerics.sampling import covering_lengths

        # A signature may not be longer than the model's position table, nor shorter than a training text.
        positions = max_positions(model.module.config.to_dict()) or context.max_length
        longest = max(min(context.max_length, positions, model.tokenizer.model_max_length), int(text_lengths.max()))
        chosen = (
            covering_lengths(text_lengths, self.lengths, longest) if isinstance(self.lengths, int) else self.lengths
        )
        if chosen[-1] > positions or chosen[-1] < text_lengths.max():
            raise StageError(
                f"The longest signature has {chosen[-1]} tokens.",
                where="lengths",
                expected=f"{text_lengths.max()} at least, for the training texts; {positions} at most, for the model",
            )
        padded = sum(min(length for length in chosen if length >= text) for text in text_lengths.tolist())
        waste = padded / int(text_lengths.sum()) - 1
        context.note(f"litert: signatures of {', '.join(map(str, chosen))} tokens; padding adds {waste:.0%} of tokens")
        return chosen
