"""Processors of a model's inputs: tokenizer, image processor, feature extractor. Importing it imports no torch."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from compress.models.config_checks import (
    TOKENIZER_FILES,
    allows_repository_code,
    explain_load_failure,
    load_error_types,
)
from compress.models.graph_inputs import GRAPH_INPUTS, read_graph_inputs
from compress.models.json_file import labels_of_config, read_json, read_optional_json
from compress.models.model import write_companions
from compress.models.pipeline_folder import image_generation_hook, is_pipeline
from compress.models.sentence_modules import MODULES, SentenceModules, has_modules, read_modules
from compress.utils.errors import MissingExtraError, ModelError, first_line, panics_as_errors

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

    from compress.models.model import Processor

PREPROCESSOR = "preprocessor_config.json"
_JOINED = "processor_config.json"
_SIGLIP_LENGTH = 64
_FILTER_SIZES = ("n_fft", "fft_window_size", "num_mel_bins", "feature_size", "win_length", "frame_length")
_MAX_FILTER_SIZE = 8192


def load_processor(folder: Path) -> Processor:
    """Load the processor of a folder in Hugging Face layout according to its files. Raises `ModelError`.

    - `graph_inputs.json`: description of the inputs of an ONNX graph without a task.
    - A diffusers folder: preparation of prompts and noise.
    - Without `preprocessor_config.json`: the tokenizer; with `modules.json`, with its pooling modules.
    - `preprocessor_config.json` alone: the image processor, or the feature extractor if it has a `sampling_rate`.
    - Both: a processor that holds both.

    Images are processed by Pillow even if torchvision is installed, so that every machine computes the same.
    """
    if (folder / GRAPH_INPUTS).is_file():
        return read_graph_inputs(folder)
    if is_pipeline(folder):
        return image_generation_hook("load_processor")(folder)
    # Without image or audio preprocessing, the model reads text.
    preparation = _preparation(folder)
    _refuse_large_filters(preparation or {}, folder / PREPROCESSOR)
    if preparation is None:
        tokenizer = load_tokenizer(folder)
        return sentence_processor(folder, tokenizer) if has_modules(folder) else tokenizer
    import transformers

    expected = f"a {PREPROCESSOR} that names its image_processor_type or feature_extractor_type"
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    if has_tokenizer and _reads_both(folder):
        return _load(transformers.AutoProcessor, folder, "processor", expected, backend="pil")
    # Only audio has a sampling rate.
    if "sampling_rate" in preparation:
        auto = transformers.AutoProcessor if has_tokenizer else transformers.AutoFeatureExtractor
        return _load(auto, folder, "processor", expected)
    try:
        import PIL  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError("pillow", "vision", "A model of images") from error
    images = _load(transformers.AutoImageProcessor, folder, "processor", expected, backend="pil")
    return ImageTextProcessor.of(folder, images) if has_tokenizer else images


def _preparation(folder: Path) -> Mapping[str, Any] | None:
    """Return the image or audio preprocessing config, also from transformers' joint file, or None."""
    if (folder / PREPROCESSOR).is_file():
        return read_json(folder / PREPROCESSOR)
    # transformers 5 may write all parts into one file.
    joined = read_optional_json(folder / _JOINED)
    config: Mapping[str, Any] | None = joined.get("image_processor") or joined.get("feature_extractor")
    return config


def _refuse_large_filters(preparation: Mapping[str, Any], path: Path) -> None:
    """Raise `ModelError` for sizes of a feature extractor whose filters would take gigabytes."""
    for name in _FILTER_SIZES:
        size = preparation.get(name)
        if isinstance(size, int | float) and not 0 <= size <= _MAX_FILTER_SIZE:
            raise ModelError(f"The {name} is {size!r:.40}.", where=str(path), expected=f"at most {_MAX_FILTER_SIZE:,}")


def _reads_both(folder: Path) -> bool:
    """Return True if the model reads images as tokens of a text, so that transformers' own processor joins both."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

    config = read_optional_json(folder / "config.json")
    name = KNOWN.get(config.get("model_type"))
    # The same model type may be saved with another head.
    return name is not None and (config.get("architectures") or [name])[0] == name


def has_preprocessor(folder: Path) -> bool:
    """Return True if a folder has a preprocessing config for images or audio."""
    return _preparation(folder) is not None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder in Hugging Face layout. Raises `ModelError` if it does not load."""
    import transformers

    return _load(transformers.AutoTokenizer, folder, "tokenizer", "the tokenizer's files in Hugging Face layout")


@contextmanager
def tokenizer_errors(path: Path) -> Iterator[None]:
    """Turn what the tokenizers library raises into a `ModelError` about its file."""
    try:
        with panics_as_errors():
            yield
    # The library raises no narrower type.
    except Exception as error:
        raise ModelError(
            f"The tokenizer cannot be used: {first_line(error)}",
            where=str(path),
            expected="a file that the tokenizers library reads",
            hint="copy the tokenizer's files again from the model that it belongs to",
        ) from error


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json without transformers, whose import takes seconds. Raises `ModelError`."""
    from tokenizers import Tokenizer

    with tokenizer_errors(path):
        return Tokenizer.from_file(str(path))


def _load(auto: Any, folder: Path, what: str, expected: str, **options: str) -> Any:
    allowed = allows_repository_code(folder)
    try:
        with panics_as_errors():
            return auto.from_pretrained(folder, trust_remote_code=allowed, **options)
    except Exception as error:
        # The tokenizers library raises the base class for a file that it cannot read. A size in a config may be any.
        if type(error) is not Exception and not isinstance(error, (*load_error_types(), MemoryError)):
            raise
        message = f"The {what} cannot be loaded: {first_line(error)}"
        unexplained = ModelError(message, where=str(folder), expected=expected)
        raise explain_load_failure(folder, allowed) or unexplained from error


class HasCompanions(Protocol):
    """Model with small companion files, by their relative paths."""

    @property
    def companions(self) -> Mapping[str, bytes]:
        """Return the content of each companion file by relative path."""


def processor_of(model: HasCompanions) -> Processor:
    """Load the processor from a model's companion files."""
    with tempfile.TemporaryDirectory() as folder:
        write_companions(Path(folder), model.companions)
        return load_processor(Path(folder))


def labels_of(model: HasCompanions) -> tuple[str, ...] | None:
    """Return class names in the order of their ids from the config among the companion files."""
    return labels_of_config(json.loads(model.companions.get("config.json", b"{}")), Path("config.json"))


class SentenceProcessor:
    """Tokenizer together with the pooling modules that produce one embedding per text.

    It is called like the tokenizer and forwards its attributes. Saving writes the files of both, so that
    sentence-transformers can open the folder.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, modules: SentenceModules) -> None:
        self.tokenizer = tokenizer
        self.modules = modules

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Return the tokenizer's encoding."""
        return self.tokenizer(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        # During construction and copying the attributes do not exist yet; forwarding would recurse.
        if name in ("tokenizer", "modules"):  # while it is being made or copied
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer's files and those of the modules, some of them in subfolders."""
        self.tokenizer.save_pretrained(folder)
        write_companions(Path(folder), self.modules.files(self.tokenizer.model_max_length))


@dataclass
class ImageTextProcessor:
    """Image processor and tokenizer of a model that reads both; called like the image processor.

    ``positions`` is the maximum number of tokens (None: unknown); ``length`` is the padded length of every text (None:
    no fixed length). Saving writes the separate files that transformers.js reads; transformers would join them.
    """

    image_processor: Any
    tokenizer: PreTrainedTokenizerBase
    positions: int | None
    length: int | None

    @classmethod
    def of(cls, folder: Path, images: object) -> ImageTextProcessor:
        """Combine the image processor ``images`` with the tokenizer of ``folder``. Raises `ModelError`."""
        config = read_optional_json(folder / "config.json")
        positions = (config.get("text_config") or {}).get("max_position_embeddings")
        # As transformers' own pipeline pads: what was trained without a mask reads padding too.
        padded = _SIGLIP_LENGTH if "siglip" in str(config.get("model_type")) else None
        return cls(images, load_tokenizer(folder), positions, padded and min(padded, positions or padded))

    def __call__(self, *arguments: object, **options: object) -> Any:
        """Return the image processor's encoding."""
        return self.image_processor(*arguments, **options)

    def tokens(self, texts: Sequence[str], max_length: int) -> Any:
        """Return the tokenizer's encoding of ``texts``, truncated, and padded if the model needs a fixed length."""
        if self.length is not None:
            return self.tokenizer(texts, padding="max_length", truncation=True, max_length=self.length)
        return self.tokenizer(texts, truncation=True, max_length=min(max_length, self.positions or max_length))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files of both."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)


def sentence_processor(folder: Path, tokenizer: PreTrainedTokenizerBase, width: int | None = None) -> SentenceProcessor:
    """Combine ``tokenizer`` with the pooling modules of ``folder``.

    A plain encoder of hidden size ``width`` gets mean pooling, as in sentence-transformers. Raises `ModelError` if the
    modules do not fit that width.
    """
    if width is not None and not has_modules(folder):
        return SentenceProcessor(tokenizer, SentenceModules(width))
    modules = read_modules(folder)
    if width is not None and modules.width != width:
        raise ModelError(
            f"The pooling is for {modules.width} dimensions, and the model's tokens have {width}.",
            where=str(folder / MODULES),
            expected=f"a word_embedding_dimension of {width}",
        )
    return SentenceProcessor(tokenizer, modules)
