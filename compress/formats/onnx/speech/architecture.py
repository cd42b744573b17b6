"""What the graphs of Whisper need to know of its config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.errors import ModelError

if TYPE_CHECKING:
    from compress.checkpoints.checkpoint import Checkpoint

SUPPORTED = ("WhisperForConditionalGeneration",)
_STRIDE = 2
"""Of the second convolution: two frames of features make one position of the encoder."""


@dataclass(frozen=True)
class Side:
    """Encoder or decoder. ``name`` is the module's below `model`."""

    name: str
    layers: int
    heads: int


@dataclass(frozen=True)
class WhisperArchitecture:
    """Whisper's shape. ``frames`` of ``features`` each go into the encoder, ``positions`` of ``hidden`` come out."""

    encoder: Side
    decoder: Side
    hidden: int
    features: int
    positions: int
    vocabulary: int

    @property
    def frames(self) -> int:
        """Frames of features that the encoder takes, always: shorter audio is filled up with silence."""
        return _STRIDE * self.positions

    @property
    def head_size(self) -> int:
        """Of the decoder."""
        return self.hidden // self.decoder.heads


def read_architecture(checkpoint: Checkpoint) -> WhisperArchitecture:
    """The architecture of a checkpoint. Raises `ModelError` for one that this writer doesn't know."""
    from transformers import WhisperConfig

    name = next(iter(checkpoint.config.get("architectures") or ["no architecture"]))
    if name not in SUPPORTED:
        raise _refusal(checkpoint, f"{name} cannot be written as an ONNX speech model", ", ".join(SUPPORTED))
    config = WhisperConfig.from_pretrained(checkpoint.folder)
    if config.activation_function != "gelu":
        raise _refusal(checkpoint, f"The activation is {config.activation_function!r}", "activation_function: gelu")
    if not config.tie_word_embeddings:
        raise _refusal(checkpoint, "The decoder's head is not its embedding table", "tie_word_embeddings: true")
    return WhisperArchitecture(
        encoder=Side("encoder", config.encoder_layers, config.encoder_attention_heads),
        decoder=Side("decoder", config.decoder_layers, config.decoder_attention_heads),
        hidden=config.d_model,
        features=config.num_mel_bins,
        positions=config.max_source_positions,
        vocabulary=config.vocab_size,
    )


def _refusal(checkpoint: Checkpoint, what: str, expected: str) -> ModelError:
    return ModelError(f"{what}.", where=str(checkpoint.folder / "config.json"), expected=expected)
