"""What an app does before a model and behind it, as data: the steps of `manifest.json`, each with its words."""

from __future__ import annotations

import json
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.frozen import FrozenAliased
from compress.tasks.entities import OUTSIDE

_MANY_LABELS, _FEW_LABELS, _FEW_KINDS = 20, 5, 12
POOLED = {
    "mean": "the mean of its tokens' vectors",
    "cls": "the vector of its first token",
    "max": "the largest of each of its tokens' values",
    "lasttoken": "the vector of its last token",
}


class Step(FrozenAliased):
    """What all steps tell."""

    words: ClassVar[tuple[str, str]] = ("", "")
    """For the card, to be filled with the fields; see `in_words`."""

    @property
    def uses(self) -> tuple[str, ...]:
        """Files of the bundle that it needs."""
        return tuple(getattr(self, name) for name in ("decoder", "tokenizer") if name in type(self).model_fields)

    def in_words(self) -> tuple[str, str]:
        """For the card.

        Before a model: one input with its article, and what becomes of inputs that are too large. Behind it: what an
        input gets, from the verb on, and how far an answer may be trusted.
        """
        first, second = (text.format(**dict(self)) for text in self.words)
        return first, second


class Tokenize(Step):
    """Text -> ids: ``prefix_ids``, as many of the text's own as there is room for, ``suffix_ids``; no padding."""

    kind: Literal["tokenize"] = "tokenize"
    tokenizer: str = Field(description="a tokenizer.json of Hugging Face tokenizers")
    max_length: int = Field(ge=1, description="tokens in all; what is beyond is cut off at the end")
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    pad_id: int = Field(description="fills shorter texts of a batch, where attention_mask is 0")

    words = ("A text", "Texts of more than {max_length} tokens are cut off at the end.")


class TokenizePair(Step):
    """Two texts -> ids: ``prefix_ids``, the first's, ``middle_ids``, the second's, ``suffix_ids``; no padding.

    What is beyond ``max_length`` is cut off at the end of the second text, or of the longer one until both are alike.
    Token types are 1 from the second text's first token on.
    """

    kind: Literal["tokenize-pair"] = "tokenize-pair"
    tokenizer: str = Field(description="a tokenizer.json of Hugging Face tokenizers")
    max_length: int = Field(ge=1, description="tokens in all")
    prefix_ids: tuple[int, ...]
    middle_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    truncation: Literal["longest-first", "only-second"]
    pad_id: int = Field(description="fills shorter texts of a batch, where attention_mask is 0")

    def in_words(self) -> tuple[str, str]:
        """See `Step`."""
        which = "the second is" if self.truncation == "only-second" else "the longer one is"
        return "A pair of texts", f"Of pairs of more than {self.max_length} tokens {which} cut off at its end."


Side = Annotated[int, Field(ge=1, le=8192)]
Channels = Literal["RGB", "BGR", "L"]


class Resize(FrozenAliased):
    """To ``height`` by ``width``; or until the shorter side has ``shortest_edge``, the longer one rounded down.

    The filter is as wide as it takes to see every pixel (antialias), and each axis is rounded to 8 bits, the horizontal
    one first: `PIL.Image.resize`.
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
    """The middle, half a pixel to the upper left where that is none; zeros where the image is smaller."""

    height: Side
    width: Side


class PrepareImage(Step):
    """Image -> floats of shape [1, channels, height, width], step by step in the order of the fields.

    The image is turned upright as its EXIF tag says, laid on white where it is transparent, and taken as ``channels``
    of 8 bits, whatever its colour profile.
    """

    kind: Literal["prepare-image"] = "prepare-image"
    input: str
    channels: Channels = Field(description="L is 0.299 R + 0.587 G + 0.114 B")
    layout: Literal["NCHW"] = "NCHW"
    resize: Resize | None = None
    center_crop: Crop | None = None
    rescale_factor: float = Field(1.0, gt=0, description="each value is multiplied by it")
    mean: tuple[float, ...] = Field(description="subtracted then, one a channel")
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field(description="each value is divided by it at last")

    @model_validator(mode="after")
    def _each_channel(self) -> Self:
        if not len(self.mean) == len(self.std) == len(self.channels):
            raise ValueError(f"mean and std have one value for each of {self.channels}")
        return self

    def in_words(self) -> tuple[str, str]:
        """See `Step`."""
        steps = json.dumps(self.resize.model_dump(exclude_none=True)) if self.resize else "none"
        return "A picture", f"Pictures of any size are taken; resizing: {steps}."


class LogMel(Step):
    """Recording -> floats of shape [1, mel_bins, chunk_seconds * sampling_rate / hop_length], as Whisper has them.

    Of samples between -1 and 1, one channel at ``sampling_rate``, the first ``chunk_seconds`` are taken, zeros after
    their end, and mirrored for n_fft / 2 samples at both ends. Each ``hop_length`` samples ``n_fft`` of them, times a
    periodic Hann window, give a power spectrum; the last one is left out. Triangles of area 1 on Slaney's scale, from 0
    to 8000 Hz, sum it up. Then x = log10(max(sum, 1e-10)), and of the recording's x: (max(x, largest x - 8) + 4) / 4.
    """

    kind: Literal["log-mel"] = "log-mel"
    input: str
    sampling_rate: int = Field(ge=1, le=192_000, description="samples a second")
    n_fft: int = Field(ge=2, le=8192)
    hop_length: int = Field(ge=1, le=8192)
    mel_bins: int = Field(ge=1, le=1024)
    chunk_seconds: int = Field(ge=1, le=60, description="what is longer is heard in several pieces")

    words = ("A recording", "Recordings of more than {chunk_seconds} seconds are heard in several pieces.")


class Spectrogram(FrozenAliased):
    """Samples -> log-mel features, as Kaldi has them: [frames, mel_bins].

    Each 10 ms 25 ms of samples, as long as they are whole, less their mean, less 0.97 times the sample before (the
    first: times 0.03), times a symmetric Hann window, give a power spectrum of the next power of two. Triangles of
    height 1 on the scale 1127 ln(1 + hertz / 700), from 20 Hz to half the rate, sum it up. Then x is
    ln(max(sum, 2^-23)), with zeros after the last whole frame, and at last (x - mean) / (2 std).
    """

    mel_bins: int = Field(ge=1, le=1024)
    frames: int = Field(ge=1, le=100_000, description="what is beyond is not heard")
    mean: float
    std: float = Field(gt=0)


class Hear(Step):
    """Recording -> floats: a ``spectrogram`` [1, frames, mel_bins], or without one its samples [1, length].

    Samples lie between -1 and 1, of one channel at ``sampling_rate``. ``normalize``: less their mean, divided by the
    square root of their variance + 1e-7. ``mask`` is an input of as many ones.
    """

    kind: Literal["hear"] = "hear"
    input: str
    sampling_rate: int = Field(ge=1, le=192_000, description="samples a second")
    normalize: bool = False
    mask: str | None = None
    spectrogram: Spectrogram | None = None

    def in_words(self) -> tuple[str, str]:
        """See `Step`."""
        if self.spectrogram is None:
            return "A recording", "Recordings are heard to their end."
        return "A recording", f"Of recordings the first {self.spectrogram.frames / 100:g} seconds are heard."


class Prompt(Step):
    """Message -> ids: of ``before``, message and ``after`` as one text. A longer prompt is refused, not cut."""

    kind: Literal["prompt"] = "prompt"
    tokenizer: str = Field(description="a tokenizer.json of Hugging Face tokenizers")
    before: str = Field(description="what the model's chat template puts before a message, if it has one")
    after: str = Field(description="what it puts behind it, up to where the reply begins")
    add_special_tokens: bool = Field(description="whether the tokenizer adds its own; without a chat template it does")
    max_length: int = Field(ge=1, description="tokens of a prompt at most")

    words = ("A message", "Prompts of more than {max_length} tokens, the chat template's among them, are refused.")


class Generate(Step):
    """Prompt -> reply: token by token, always the likeliest one, up to one of ``end_ids``.

    All ids of the prompt are read at once, then each token alone. ``attention_mask`` is 1 for each token so far;
    ``position_ids``, if the model takes them, count from 0. A cache that is empty at first has the shape of its input
    with a length of 0.
    """

    kind: Literal["generate"] = "generate"
    output: str = Field(description="logits [batch, length, vocabulary]; the last position's say what follows")
    cache: dict[str, str] = Field(description="input -> the output that takes its place at the next token")
    decoding: Literal["greedy"] = "greedy"
    end_ids: tuple[int, ...]
    max_new_tokens: int = Field(ge=1, description="of a reply")
    max_length: int = Field(ge=2, description="tokens in all, the prompt's among them")

    words = (
        "gets a reply of at most {max_new_tokens} tokens, always the likeliest one, and stands alone: earlier ones are "
        "not remembered",
        "It makes things up, and says them as surely as what is true.",
    )


class Transcribe(Step):
    """What the encoder gives -> text: always the likeliest token, from ``prompt_ids`` to one of ``end_ids``.

    ``decoder`` is a graph of input_ids, encoder_hidden_states and use_cache_branch, false for the prompt. Its outputs
    present.N.decoder.key (and value) are the inputs past_key_values.N.decoder.key of the next token; the
    encoder's are made with the prompt and kept.
    """

    kind: Literal["transcribe"] = "transcribe"
    output: str
    decoder: str
    tokenizer: str = Field(description="a tokenizer.json; special tokens are no text")
    prompt_ids: tuple[int, ...] = Field(min_length=1)
    end_ids: tuple[int, ...] = Field(min_length=1)
    never_ids: tuple[int, ...] = Field(description="are not said")
    not_first_ids: tuple[int, ...] = Field(description="are not said at once")
    max_length: int = Field(ge=2, description="tokens in all, the prompt's among them")

    words = ("gets what is said in it", "Where nothing is said, it makes words up.")


class Rewrite(Step):
    """What the encoder gives -> text: always the likeliest token, from ``prompt_ids`` to one of ``end_ids``.

    ``decoder`` is a graph as that of `Transcribe`, which takes the encoder's mask as encoder_attention_mask too.
    """

    kind: Literal["rewrite"] = "rewrite"
    output: str
    decoder: str
    tokenizer: str = Field(description="a tokenizer.json; special tokens are no text")
    prompt_ids: tuple[int, ...] = Field(min_length=1)
    end_ids: tuple[int, ...] = Field(min_length=1)
    never_ids: tuple[int, ...] = Field(description="are not written")
    last_ids: tuple[int, ...] = Field(description="one of them stands last in the longest text, if there are any")
    max_length: int = Field(ge=2, description="tokens in all, the prompt's among them")

    words = (
        "gets a text of at most {max_length} tokens, always the likeliest one",
        "It makes things up, and says them as surely as what is true.",
    )


class Softmax(Step):
    """Scores -> probabilities that sum to 1, in the order of ``labels``."""

    kind: Literal["softmax"] = "softmax"
    output: str
    labels: tuple[str, ...] = Field(min_length=1)

    def in_words(self) -> tuple[str, str]:
        """See `Step`."""
        return (
            f"gets one of: {_named(self.labels)}",
            "A probability is the model's own; how well it is calibrated stands in the report of the run, where there "
            "is one.",
        )


class Tag(Step):
    """Scores -> a label for each word of a text: the likeliest of its first token, in the order of ``labels``.

    Words are what stands between white space, and are joined by single spaces before the text is tokenized; each is
    tokenized as it is alone, but for the first one with the space before it. Of labels with the prefixes B and I (and
    L or E at the end, U or S alone) those that follow each other are one entity; O is none.
    """

    kind: Literal["tag"] = "tag"
    output: str
    labels: tuple[str, ...] = Field(min_length=1)

    def in_words(self) -> tuple[str, str]:
        """See `Step`."""
        kinds = sorted({label.partition("-")[2] or label for label in self.labels if label != OUTSIDE})
        more = f" and {len(kinds) - _FEW_KINDS} others" if len(kinds) > _FEW_KINDS else ""
        return (
            f"gets a label for each of its words: {', '.join(kinds[:_FEW_KINDS])}{more}, or none",
            "How many are found and right, precision and recall, stands in the report of the run.",
        )


class Relevance(Step):
    """Logits -> how relevant the second text is: the sigmoid of the only one, or of the second less the first."""

    kind: Literal["relevance"] = "relevance"
    output: str

    words = (
        "gets a score from 0 to 1: how relevant the second text is to the first",
        "A score ranks texts for one query; scores of different queries say little beside each other.",
    )


class FindSpan(Step):
    """Scores -> the words of the second text from one token to another, of the largest sum of both scores.

    Words are what stands between white space; each is tokenized as it is alone, but for the first one with the space
    before it. A text that is too long is read in windows, each of which has the last third of the one before.
    """

    kind: Literal["span"] = "span"
    output: str = Field(description="scores of being the first token, [batch, length]")
    end_output: str = Field(description="scores of being the last")
    max_tokens: int = Field(ge=1, description="of an answer")

    words = (
        "gets the words of the second text that answer the first",
        "An answer is always given; its score says which of several is likelier, not whether any is right.",
    )


class Unmask(Step):
    """Scores -> the likeliest tokens in the place of ``mask``, with probabilities that sum to 1 over the vocabulary."""

    kind: Literal["unmask"] = "unmask"
    output: str = Field(description="logits [batch, length, vocabulary]")
    mask: str
    mask_id: int
    tested_ids: tuple[int, ...] = Field(min_length=1, description="tokens whose scores the self-test has")

    words = ("gets the likeliest tokens in the place of {mask}", "A probability is the model's own.")


class FindBoxes(Step):
    """Of each query scores and a box -> what is in a picture, and where.

    Scores become probabilities that sum to 1, in the order of ``labels``, the last one's that there is nothing. The
    likeliest label counts, where it is at least ``least_score``. A box is centre and size in shares of the picture.
    """

    kind: Literal["boxes"] = "boxes"
    output: str = Field(description="scores [1, queries, labels + 1]")
    boxes_output: str = Field(description="x and y of the centre, width and height, [1, queries, 4]")
    labels: tuple[str, ...] = Field(min_length=1)
    least_score: float = Field(0.5, ge=0, le=1)

    def in_words(self) -> tuple[str, str]:
        """See `Step`."""
        return (
            f"gets boxes around what is in it: {_named(self.labels)}",
            "What is found and what is missed stands in the report of the run, as average precision.",
        )


class Segment(Step):
    """Scores of each class on a grid -> the class of each pixel, in the order of ``labels``.

    The grid is enlarged to the picture's size by linear interpolation, pixels being squares, so that x of the picture
    is (x + 0.5) width / picture's width - 0.5 of the grid, and nothing lies beyond its edge. The largest score counts.
    """

    kind: Literal["segment"] = "segment"
    output: str = Field(description="scores [1, labels, height, width]")
    labels: tuple[str, ...] = Field(min_length=1)
    height: int = Field(ge=1)
    width: int = Field(ge=1)

    def in_words(self) -> tuple[str, str]:
        """See `Step`."""
        return (
            f"gets a class for each pixel: {_named(self.labels)}",
            "How much of each class is right stands in the report of the run, as its IoU.",
        )


class Embed(Step):
    """Values of one input -> its embedding. Of two, the larger their embeddings' cosine, the nearer they are."""

    kind: Literal["embed"] = "embed"
    output: str
    pooling: Literal["mean", "cls", "max", "lasttoken"] | None = Field(
        description="how the vectors of a text's tokens become one; null where the graph gives the finished embedding"
    )
    normalize: bool = Field(description="whether it is divided by its Euclidean length then")
    dimensions: int = Field(ge=1)

    def in_words(self) -> tuple[str, str]:
        """See `Step`."""
        how = "as the graph gives it" if self.pooling is None else POOLED[self.pooling]
        length = ", brought to length 1" if self.normalize else ""
        return (
            f"gets an embedding of {self.dimensions} values: {how}{length}. Two are near where their cosine is large",
            "A cosine ranks; it says which is nearest, and not whether any is near.",
        )


def _named(labels: tuple[str, ...]) -> str:
    named = labels if len(labels) <= _MANY_LABELS else labels[:_FEW_LABELS]
    some = "" if named == labels else f"{len(labels)} labels, e.g. "
    return f"{some}{', '.join(named)}"


Preprocessing = Tokenize | TokenizePair | PrepareImage | LogMel | Hear | Prompt
Postprocessing = (
    Softmax | Tag | Relevance | FindSpan | Unmask | FindBoxes | Segment | Embed | Transcribe | Rewrite | Generate
)
