"""`manifest.json`, schema 1: what lies in a bundle, how its model is fed, and where it came from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compress.errors import BundleError
from compress.models.model_file import Format

SCHEMA = 1
MANIFEST = "manifest.json"
SIGNATURE = "manifest.json.sig"
SELFTEST = "selftest.json"
CARD = "README.md"
MODEL_FOLDER = "model"
MAX_BYTES = 16_000_000
"""No manifest is as large; what claims to be one isn't read."""


class Entry(BaseModel):
    """Frozen, and nothing unknown is let in."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True)


class Runtime(Entry):
    """What runs the model. ``minimum_version`` is the one that the self-test passed with; older ones were not tried."""

    name: str
    package: str = Field(description="as the platform's package manager names it")
    minimum_version: str
    execution_provider: str


class TensorRecord(Entry):
    """An input or output of the model, in its order; an axis that is a name may have any size, or one of its `Axis`."""

    name: str
    dtype: str = Field(description="numpy's name of the element type")
    shape: tuple[int | str, ...]
    meaning: str


class Axis(Entry):
    """What a named axis may be; ``least`` is None where the file doesn't say it."""

    least: int | None = Field(ge=0)
    most: int = Field(ge=1)


class Signature(Entry):
    """One of several graphs in a file, each called by its name.

    It takes rows of ``length`` tokens: shorter ones are filled with zeros at their end. None: its inputs have one size.
    """

    name: str
    length: int | None


class Tokenize(Entry):
    """Text -> ids: ``prefix_ids``, as many of the text's own as there is room for, ``suffix_ids``; no padding."""

    kind: Literal["tokenize"] = "tokenize"
    tokenizer: str = Field(description="a tokenizer.json of Hugging Face tokenizers")
    max_length: int = Field(ge=1, description="tokens in all; what is beyond is cut off at the end")
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    pad_id: int = Field(description="fills shorter texts of a batch, where attention_mask is 0")

    @property
    def uses(self) -> tuple[str, ...]:
        """Files of the bundle that it needs."""
        return (self.tokenizer,)


Side = Annotated[int, Field(ge=1, le=8192)]
Channels = Literal["RGB", "BGR", "L"]


class Resize(Entry):
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


class Crop(Entry):
    """The middle, half a pixel to the upper left where that is none; zeros where the image is smaller."""

    height: Side
    width: Side


class PrepareImage(Entry):
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

    @property
    def uses(self) -> tuple[str, ...]:
        """Files of the bundle that it needs: none."""
        return ()


class LogMel(Entry):
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

    @property
    def uses(self) -> tuple[str, ...]:
        """Files of the bundle that it needs: none."""
        return ()


class Transcribe(Entry):
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

    @property
    def uses(self) -> tuple[str, ...]:
        """Files of the bundle that it needs."""
        return (self.decoder, self.tokenizer)


class Softmax(Entry):
    """Scores -> probabilities that sum to 1, in the order of ``labels``."""

    kind: Literal["softmax"] = "softmax"
    output: str
    labels: tuple[str, ...] = Field(min_length=1)

    @property
    def uses(self) -> tuple[str, ...]:
        """Files of the bundle that it needs: none."""
        return ()


class Embed(Entry):
    """Values of one text -> its embedding. Of two texts, the larger their embeddings' cosine, the nearer they are."""

    kind: Literal["embed"] = "embed"
    output: str
    pooling: Literal["mean", "cls", "max", "lasttoken"] | None = Field(
        description="how the vectors of a text's tokens become one; null where the graph gives the finished embedding"
    )
    normalize: bool = Field(description="whether it is divided by its Euclidean length then")
    dimensions: int = Field(ge=1)

    @property
    def uses(self) -> tuple[str, ...]:
        """Files of the bundle that it needs: none."""
        return ()


class Licence(Entry):
    """Under which terms a part of the bundle may be passed on."""

    of: str
    licence: str


class FileRecord(Entry):
    """A file's size and the SHA-256 of its contents."""

    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Provenance(Entry):
    """Where the model came from, as the run's own files say; what is left empty needs a run."""

    compress: str = Field(description="version that made the bundle")
    recipe: str
    recipe_sha256: str
    samples: dict[str, dict[str, str]] = Field({}, description="sample -> its packages -> their SHA-256")
    seed: int | None = None
    start: str | None = Field(None, description="digest of the starting model")
    data: dict[str, str] = Field({}, description="split -> digest of its rows")
    stages: dict[str, str] = Field({}, description="stage -> digest of its output")
    packages: dict[str, str] = Field({}, description="package -> version that the run used")
    report_sha256: str | None = None
    measured: dict[str, float] = Field({}, description="`metric on target` -> value of the final model in that report")


Preprocessing = Tokenize | PrepareImage | LogMel
Postprocessing = Softmax | Embed | Transcribe
_STEPS = {
    "text-classification": ("tokenize", "softmax"),
    "image-classification": ("prepare-image", "softmax"),
    "feature-extraction": ("tokenize", "embed"),
    "automatic-speech-recognition": ("log-mel", "transcribe"),
}


class Manifest(Entry):
    """Everything that an app must know. ``digest`` is the SHA-256 of the manifest itself with an empty digest."""

    schema_version: int = Field(SCHEMA, alias="schema")
    name: str
    task: Literal["text-classification", "image-classification", "feature-extraction", "automatic-speech-recognition"]
    target: str
    runtime: Runtime
    format: Format
    model: str = Field(description="path of the file that the runtime opens")
    opsets: dict[str, int] = Field(description="operator domain -> version; none for a .ort file, which fixes them")
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    axes: dict[str, Axis] = Field(description="named axis -> its sizes, where not any will do")
    signatures: tuple[Signature, ...] = Field(description="shortest first: the first that holds a row answers it")
    preprocessing: Annotated[Preprocessing, Field(discriminator="kind")]
    postprocessing: Annotated[Postprocessing, Field(discriminator="kind")]
    licences: tuple[Licence, ...]
    provenance: Provenance
    files: dict[str, FileRecord] = Field(description="every other file of the bundle, but a signature of this one")
    digest: str = ""

    @model_validator(mode="after")
    def _fits_task(self) -> Self:
        before, after = _STEPS[self.task]
        if self.preprocessing.kind != before:
            raise ValueError(f"{self.preprocessing.kind} is no preprocessing for {self.task}")
        if self.postprocessing.kind != after:
            raise ValueError(f"{self.postprocessing.kind} is no postprocessing for {self.task}")
        return self

    def sealed(self) -> bytes:
        """The bytes of `manifest.json`: one way to write them, so that any other byte is a change."""
        empty = self.model_copy(update={"digest": ""})
        digest = hashlib.sha256(_written(empty)).hexdigest()
        return _written(self.model_copy(update={"digest": digest}))


def _written(manifest: Manifest) -> bytes:
    content = manifest.model_dump(mode="json")
    content["files"] = dict(sorted(content["files"].items()))
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def read_manifest(path: Path) -> Manifest:
    """The manifest at ``path``, its seal checked. Raises `BundleError`."""
    if not path.is_file():
        raise BundleError(
            f"There is no {MANIFEST}.", where=str(path.parent), expected="a folder or zip that `compress bundle` wrote"
        )
    if path.stat().st_size > MAX_BYTES:
        raise BundleError(f"The {MANIFEST} has {path.stat().st_size} bytes.", where=str(path), expected="far fewer")
    found = path.read_bytes()
    manifest = _parsed(found, str(path))
    if manifest.sealed() != found:
        raise BundleError(
            f"The {MANIFEST} was changed after it was written.",
            where=str(path),
            expected=f"the digest {json.loads(manifest.sealed())['digest']}, and the layout that `compress` writes",
            mend="take the bundle again from where it came",
        )
    return manifest


def _parsed(content: bytes, where: str) -> Manifest:
    try:
        fields: Any = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"The {MANIFEST} is not JSON: {error}", where=where) from None
    schema = fields.get("schema") if isinstance(fields, dict) else None
    if schema != SCHEMA:
        raise BundleError(
            f"The {MANIFEST} has schema {schema!r}.",
            where=where,
            expected=f"schema {SCHEMA}",
            mend="a newer bundle is verified with a newer compress",
        )
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:10]]
        raise BundleError(f"The {MANIFEST} is not valid:\n  " + "\n  ".join(lines), where=where) from None
