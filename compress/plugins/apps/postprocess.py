"""Steps of an application after the model, as `manifest.json` records them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.plugins.apps.preprocess import AppStep
from compress.tasks.spans import OUTSIDE

_MANY_LABELS, _FEW_LABELS, _FEW_KINDS = 20, 5, 12
POOLED = {
    "mean": "the mean of its tokens' vectors",
    "cls": "the vector of its first token",
    "max": "the largest of each of its tokens' values",
    "lasttoken": "the vector of its last token",
}
"""Description of each pooling mode."""


class Generate(AppStep):
    """Prompt -> reply by greedy decoding, up to one of ``end_ids``.

    All ids of the prompt are read at once, then each token alone. ``attention_mask`` is 1 for each token so far;
    ``position_ids``, if the model takes them, count from 0. A cache that is empty at first has the shape of its input
    with a length of 0.
    """

    kind: Literal["generate"] = "generate"
    output: str = Field(
        description="logits [batch, length, vocabulary]; those of the last position predict the next token"
    )
    cache: dict[str, str] = Field(description="maps a cache input to the output that replaces it for the next token")
    decoding: Literal["greedy"] = "greedy"
    end_ids: tuple[int, ...]
    max_new_tokens: int = Field(ge=1, description="maximum number of tokens of a reply")
    max_length: int = Field(ge=2, description="maximum number of tokens including the prompt")

    words = (
        "gets a reply of at most {max_new_tokens} tokens, always the likeliest one, and stands alone: earlier ones are "
        "not remembered",
        "It makes things up, and says them as surely as what is true.",
    )


class Transcribe(AppStep):
    """Greedy decoding of an encoder's output into text, from ``prompt_ids`` to one of ``end_ids``.

    ``decoder`` is a graph of input_ids, encoder_hidden_states and use_cache_branch, false for the prompt. Its outputs
    present.N.decoder.key (and value) are the inputs past_key_values.N.decoder.key of the next token; the
    encoder's are made with the prompt and kept.
    """

    kind: Literal["transcribe"] = "transcribe"
    output: str
    decoder: str
    tokenizer: str = Field(description="path of tokenizer.json; special tokens are skipped when decoding")
    prompt_ids: tuple[int, ...] = Field(min_length=1)
    end_ids: tuple[int, ...] = Field(min_length=1)
    never_ids: tuple[int, ...] = Field(description="ids of tokens that are never generated")
    not_first_ids: tuple[int, ...] = Field(description="ids of tokens that are never generated first")
    max_length: int = Field(ge=2, description="maximum number of tokens including the prompt")

    words = ("gets what is said in it", "Where nothing is said, it makes words up.")


class Rewrite(AppStep):
    """Greedy decoding of an encoder's output into text, from ``prompt_ids`` to one of ``end_ids``.

    ``decoder`` is a graph like that of `Transcribe`, which also takes the encoder's mask as encoder_attention_mask.
    """

    kind: Literal["rewrite"] = "rewrite"
    output: str
    decoder: str
    tokenizer: str = Field(description="path of tokenizer.json; special tokens are skipped when decoding")
    prompt_ids: tuple[int, ...] = Field(min_length=1)
    end_ids: tuple[int, ...] = Field(min_length=1)
    never_ids: tuple[int, ...] = Field(description="ids of tokens that are never generated")
    last_ids: tuple[int, ...] = Field(description="ids of tokens, one of which ends a text of maximum length")
    max_length: int = Field(ge=2, description="maximum number of tokens including the prompt")

    words = (
        "gets a text of at most {max_length} tokens, always the likeliest one",
        "It makes things up, and says them as surely as what is true.",
    )


class Draw(AppStep):
    """Output of the text encoder -> image, in one call of ``denoiser`` for each of the ``timesteps``.

    z is noise [1, channels, height, width], and latents are ``initial`` times z at first. At step i the denoiser is
    given sample = ``scales[i]`` times the latents, timestep = ``timesteps[i]`` and encoder_hidden_states, and the
    ``condition``, where there is one, as timestep_cond. With ``guidance`` above 1 it is asked for ``empty_ids`` too,
    so that what counts is e + guidance (p - e), e for the empty prompt and p for this one. Then the latents are
    ``noise[i]`` times z, ``outputs[i][j]`` times what it gave at each step j up to i, and ``added[i][j]`` times noise
    of step j, all added up. At last ``decoder`` is given latents / ``scaling`` + ``shift``, and a value x that it
    gives is the level x / 2 + 1 / 2 of a channel, from 0 to 1.

    Noise of a seed s: the k-th number from 1 on of 32 bits is a = s + k 0x6D2B79F5; b = (a ^ a >> 15) (a | 1);
    c = b ^ b + (b ^ b >> 7) (b | 61); u = (c ^ c >> 14) / 2^32. Of two such, u and v, come sqrt(-2 ln(u + 2^-33)) times
    cos 2 pi v and sin 2 pi v. z is first, then that of each step (Box and Muller 1958).
    """

    kind: Literal["draw"] = "draw"
    output: str
    denoiser: str
    decoder: str
    channels: int = Field(ge=1)
    height: int = Field(ge=1, description="number of channels of the latents")
    width: int = Field(ge=1)
    factor: int = Field(ge=1, description="ratio of image size to latent size")
    scaling: float
    shift: float
    guidance: float
    empty_ids: tuple[int, ...]
    condition: tuple[float, ...]
    initial: float
    timesteps: tuple[float, ...] = Field(min_length=1)
    scales: tuple[float, ...]
    noise: tuple[float, ...]
    outputs: tuple[tuple[float, ...], ...]
    added: tuple[tuple[float, ...], ...]

    def in_words(self) -> tuple[str, str]:
        """See `Step`."""
        size, steps = f"{self.width * self.factor} x {self.height * self.factor}", len(self.timesteps)
        return (
            f"gets a picture of {size} pixels, drawn in {steps} step{'s' if steps > 1 else ''}",
            "It draws what it has learned from; what words that it does not know do to a picture means nothing.",
        )


class Softmax(AppStep):
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


class Tag(AppStep):
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


class RelevanceStep(AppStep):
    """Logits -> how relevant the second text is: the sigmoid of the only one, or of the second less the first."""

    kind: Literal["relevance"] = "relevance"
    output: str

    words = (
        "gets a score from 0 to 1: how relevant the second text is to the first",
        "A score ranks texts for one query; scores of different queries say little beside each other.",
    )


class FindSpan(AppStep):
    """Scores -> the words of the second text from one token to another, of the largest sum of both scores.

    Words are what stands between white space; each is tokenized as it is alone, but for the first one with the space
    before it. A text that is too long is read in windows, each of which has the last third of the one before.
    """

    kind: Literal["span"] = "span"
    output: str = Field(description="logits of the start position, [batch, length]")
    end_output: str = Field(description="logits of the end position, [batch, length]")
    max_tokens: int = Field(ge=1, description="maximum number of tokens of an answer")

    words = (
        "gets the words of the second text that answer the first",
        "An answer is always given; its score says which of several is likelier, not whether any is right.",
    )


class Unmask(AppStep):
    """Scores -> the likeliest tokens in the place of ``mask``, with probabilities that sum to 1 over the vocabulary."""

    kind: Literal["unmask"] = "unmask"
    output: str = Field(description="logits [batch, length, vocabulary]")
    mask: str
    mask_id: int
    tested_ids: tuple[int, ...] = Field(min_length=1, description="tokens whose logits the self-test compares")

    words = ("gets the likeliest tokens in the place of {mask}", "A probability is the model's own.")


class FindBoxes(AppStep):
    """Scores and boxes of all queries -> detected objects with their boxes.

    By ``chances``, scores become probabilities that sum to 1, in the order of ``labels``, the last one's that there is
    nothing, and of each query the likeliest label counts; or each becomes a probability of its own, a sigmoid's, there
    is none of nothing, and the likeliest pairs of query and label count, as many as there are queries, whose order says
    nothing. What is less than ``least_score`` doesn't count. A box is centre and size in shares of the picture.
    """

    kind: Literal["boxes"] = "boxes"
    chances: Literal["softmax", "sigmoid"] = "softmax"
    output: str = Field(description="logits [1, queries, labels + 1], or [1, queries, labels] with a sigmoid")
    boxes_output: str = Field(description="center x, center y, width and height, [1, queries, 4]")
    labels: tuple[str, ...] = Field(min_length=1)
    least_score: float = Field(0.5, ge=0, le=1)

    def in_words(self) -> tuple[str, str]:
        """See `Step`."""
        return (
            f"gets boxes around what is in it: {_named(self.labels)}",
            "What is found and what is missed stands in the report of the run, as average precision.",
        )


class Segment(AppStep):
    """Scores of each class on a grid -> the class of each pixel, in the order of ``labels``.

    The grid is enlarged to the picture's size by linear interpolation, pixels being squares, so that x of the picture
    is (x + 0.5) width / picture's width - 0.5 of the grid, and nothing lies beyond its edge. The largest score counts.
    """

    kind: Literal["segment"] = "segment"
    output: str = Field(description="logits [1, labels, height, width]")
    labels: tuple[str, ...] = Field(min_length=1)
    height: int = Field(ge=1)
    width: int = Field(ge=1)

    def in_words(self) -> tuple[str, str]:
        """See `Step`."""
        return (
            f"gets a class for each pixel: {_named(self.labels)}",
            "How much of each class is right stands in the report of the run, as its IoU.",
        )


class Embed(AppStep):
    """Output for one input -> its embedding. Similar inputs have embeddings with a large cosine."""

    kind: Literal["embed"] = "embed"
    output: str
    pooling: Literal["mean", "cls", "max", "lasttoken"] | None = Field(
        description="pooling of the token vectors; null if the graph returns the embedding"
    )
    normalize: bool = Field(description="whether the embedding is L2-normalized")
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


# Names and order of the fields of a step determine the bytes of a manifest, and bundles in use must stay valid.
Postprocessing = (
    Softmax
    | Tag
    | RelevanceStep
    | FindSpan
    | Unmask
    | FindBoxes
    | Segment
    | Embed
    | Draw
    | Transcribe
    | Rewrite
    | Generate
)
