"""Steps of an application before the model, as `manifest.json` records them."""

from __future__ import annotations

import json
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.utils.pydantic_models import FrozenAliased


class AppStep(FrozenAliased):
    """Step before or after a model, as an object of `manifest.json`."""

    words: ClassVar[tuple[str, str]] = ("", "")
    """For the card, to be filled with the fields; see `in_words`."""

    @property
    def uses(self) -> tuple[str, ...]:
        """Files of the bundle that the step needs."""
        return tuple(
            getattr(self, name) for name in ("denoiser", "decoder", "tokenizer") if name in type(self).model_fields
        )

    def in_words(self) -> tuple[str, str]:
        """Return two phrases for the model card.

        For a step before the model: an input with its article, and the treatment of inputs that are too large. For a
        step
        after the model: the answer, and how far a user may trust it.
        """
        first, second = (text.format(**dict(self)) for text in self.words)
        return first, second


class Tokenize(AppStep):
    """Text -> ids: ``prefix_ids``, as many of the text's own as there is room for, ``suffix_ids``; no padding."""

    kind: Literal["tokenize"] = "tokenize"
    tokenizer: str = Field(description="path of a Hugging Face tokenizer.json")
    max_length: int = Field(ge=1, description="maximum number of tokens; longer texts are truncated at the end")
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    pad_id: int = Field(description="id of the padding token, where attention_mask is 0")

    words = ("A text", "Texts of more than {max_length} tokens are cut off at the end.")


class TokenizePrompt(AppStep):
    """Prompt -> ids: ``prefix_ids``, as many of its own as there is room for, ``suffix_ids``, ``pad_id`` to the end.

    Padding is read like any other token, as the model learned with it.
    """

    kind: Literal["tokenize-prompt"] = "tokenize-prompt"
    tokenizer: str = Field(description="path of a Hugging Face tokenizer.json")
    max_length: int = Field(ge=1, description="number of tokens of every prompt; longer ones are truncated")
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    pad_id: int

    words = ("A prompt", "Prompts of more than {max_length} tokens are cut off at the end.")


class TokenizePair(AppStep):
    """Two texts -> ids: ``prefix_ids``, the first's, ``middle_ids``, the second's, ``suffix_ids``; no padding.

    What is beyond ``max_length`` is cut off at the end of the second text, or of the longer one until both are alike.
    Token types are 1 from the second text's first token on.
    """

    kind: Literal["tokenize-pair"] = "tokenize-pair"
    tokenizer: str = Field(description="path of a Hugging Face tokenizer.json")
    max_length: int = Field(ge=1, description="maximum number of tokens")
    prefix_ids: tuple[int, ...]
    middle_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    truncation: Literal["longest-first", "only-second"]
    pad_id: int = Field(description="id of the padding token, where attention_mask is 0")

    def in_words(self) -> tuple[str, str]:
        """See `Step`."""
        which = "the second is" if self.truncation == "only-second" else "the longer one is"
        return "A pair of texts", f"Of pairs of more than {self.max_length} tokens {which} cut off at its end."


Side = Annotated[int, Field(ge=1, le=8192)]
Channels = Literal["RGB", "BGR", "L"]


class Resize(FrozenAliased):
    """Resize to ``height`` by ``width``, or until the shorter side has ``shortest_edge`` pixels.

    The longer side is rounded down. The filter is antialiased, and each axis is rounded to 8 bits, the horizontal one
    first, as in `PIL.Image.resize`.
    """

    filter: Literal["bilinear", "bicubic", "lanczos"]
    height: Side | None = None
    width: Side | None = None
    shortest_edge: Side | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.height is None) != (self.width is None) or (self.height is None) == (self.shortest_edge is None):
            raise ValueError("either height and width, or shortest_edge")
        return self


class Crop(FrozenAliased):
    """Crop of the centre, rounded to the upper left. Smaller images are padded with zeros."""

    height: Side
    width: Side


class PrepareImage(AppStep):
    """Image -> floats of shape [1, channels, height, width], step by step in the order of the fields.

    The image is turned upright as its EXIF tag says, laid on white where it is transparent, and taken as ``channels``
    of 8 bits, whatever its colour profile.
    """

    kind: Literal["prepare-image"] = "prepare-image"
    input: str
    channels: Channels = Field(description="color mode; L is 0.299 R + 0.587 G + 0.114 B")
    layout: Literal["NCHW"] = "NCHW"
    resize: Resize | None = None
    center_crop: Crop | None = None
    rescale_factor: float = Field(1.0, gt=0, description="factor for each pixel value")
    mean: tuple[float, ...] = Field(description="mean per channel, subtracted after scaling")
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field(description="divisor per channel, applied last")

    @model_validator(mode="after")
    def _each_channel(self) -> Self:
        if not len(self.mean) == len(self.std) == len(self.channels):
            raise ValueError(f"mean and std have one value for each of {self.channels}")
        return self

    def in_words(self) -> tuple[str, str]:
        """See `Step`."""
        steps = json.dumps(self.resize.model_dump(exclude_none=True)) if self.resize else "none"
        return "A picture", f"Pictures of any size are taken; resizing: {steps}."


class LogMel(AppStep):
    """Recording -> floats of shape [1, mel_bins, chunk_seconds * sampling_rate / hop_length], as Whisper has them.

    Of samples between -1 and 1, one channel at ``sampling_rate``, the first ``chunk_seconds`` are taken, zeros after
    their end, and mirrored for n_fft / 2 samples at both ends. Each ``hop_length`` samples ``n_fft`` of them, times a
    periodic Hann window, give a power spectrum; the last one is left out. Triangles of area 1 on Slaney's scale, from 0
    to 8000 Hz, sum it up. Then x = log10(max(sum, 1e-10)), and of the recording's x: (max(x, largest x - 8) + 4) / 4.
    """

    kind: Literal["log-mel"] = "log-mel"
    input: str
    sampling_rate: int = Field(ge=1, le=192_000, description="sampling rate in Hz")
    n_fft: int = Field(ge=2, le=8192)
    hop_length: int = Field(ge=1, le=8192)
    mel_bins: int = Field(ge=1, le=1024)
    chunk_seconds: int = Field(ge=1, le=60, description="seconds of a window; longer recordings are split")

    words = ("A recording", "Recordings of more than {chunk_seconds} seconds are heard in several pieces.")


class Spectrogram(FrozenAliased):
    """Samples -> log-mel features, as Kaldi has them: [frames, mel_bins].

    Each 10 ms 25 ms of samples, as long as they are whole, less their mean, less 0.97 times the sample before (the
    first: times 0.03), times a symmetric Hann window, give a power spectrum of the next power of two. Triangles of
    height 1 on the scale 1127 ln(1 + hertz / 700), from 20 Hz to half the rate, sum it up. Then x is
    ln(max(sum, 2^-23)), with zeros after the last whole frame, and at last (x - mean) / (2 std).
    """

    mel_bins: int = Field(ge=1, le=1024)
    frames: int = Field(ge=1, le=100_000, description="maximum number of frames; further frames are dropped")
    mean: float
    std: float = Field(gt=0)


class PrepareAudio(AppStep):
    """Recording -> floats: a ``spectrogram`` [1, frames, mel_bins], or without one its samples [1, length].

    Samples lie between -1 and 1, of one channel at ``sampling_rate``. ``normalize``: less their mean, divided by the
    square root of their variance + 1e-7. ``mask`` is an input of as many ones.
    """

    kind: Literal["hear"] = "hear"
    input: str
    sampling_rate: int = Field(ge=1, le=192_000, description="sampling rate in Hz")
    normalize: bool = False
    mask: str | None = None
    spectrogram: Spectrogram | None = None

    def in_words(self) -> tuple[str, str]:
        """See `Step`."""
        if self.spectrogram is None:
            return "A recording", "Recordings are heard to their end."
        return "A recording", f"Of recordings the first {self.spectrogram.frames / 100:g} seconds are heard."


class Prompt(AppStep):
    """Message -> ids: of ``before``, message and ``after`` as one text. A longer prompt is refused, not cut."""

    kind: Literal["prompt"] = "prompt"
    tokenizer: str = Field(description="path of a Hugging Face tokenizer.json")
    before: str = Field(description="chat template's text before a message; empty without a template")
    after: str = Field(description="chat template's text between a message and the reply")
    add_special_tokens: bool = Field(
        description="whether the tokenizer adds special tokens, as without a chat template"
    )
    max_length: int = Field(ge=1, description="maximum number of tokens of a prompt")

    words = ("A message", "Prompts of more than {max_length} tokens, the chat template's among them, are refused.")


Preprocessing = Tokenize | TokenizePrompt | TokenizePair | PrepareImage | LogMel | PrepareAudio | Prompt
