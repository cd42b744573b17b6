"""What prepares a model's inputs: tokenizer, image processor or feature extractor. Importing this imports no torch."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from compress.models.config_checks import loading_failures, to_blame
from compress.models.diffusion_checks import is_pipeline
from compress.models.file_names import TOKENIZER_FILES
from compress.models.graph_inputs import GRAPH_INPUTS, read_graph_inputs
from compress.models.json_file import read_json
from compress.models.model import write_companions
from compress.models.remote_code import is_allowed
from compress.models.sentence_modules import MODULES, SentenceModules, has_modules, read_modules
from compress.utils.errors import MissingExtraError, ModelError, first_line

PREPROCESSOR = "preprocessor_config.json"
_JOINED = "processor_config.json"
_SIGLIP_LENGTH = 64


def load_processor(folder: Path) -> Any:
    """The processor of a folder in Hugging Face layout, by the files that it has. Raises `ModelError`.

    Without a `preprocessor_config.json` it is the tokenizer, with a `modules.json` the tokenizer and what pools behind
    the model. With one alone it is the image processor, or the feature extractor where it has a `sampling_rate`. With
    a tokenizer beside it, it is a processor that has both. Of a graph of no task it is what its inputs are like. Images
    go through Pillow whether torchvision is there or not, so that every machine computes the same. In diffusers' layout
    it prepares prompts and noise.
    """
    if (folder / GRAPH_INPUTS).is_file():
        return read_graph_inputs(folder)
    if is_pipeline(folder):
        from compress.models.diffusion_sampling import load_prompt_processor

        return load_prompt_processor(folder)
    preparation = _preparation(folder)
    if preparation is None:
        tokenizer = load_tokenizer(folder)
        return sentence_processor(folder, tokenizer) if has_modules(folder) else tokenizer
    import transformers

    expected = f"a {PREPROCESSOR} that names its image_processor_type or feature_extractor_type"
    texts = any((folder / name).is_file() for name in TOKENIZER_FILES)
    if texts and _reads_both(folder):
        return _load(transformers.AutoProcessor, folder, "processor", expected, backend="pil")
    if "sampling_rate" in preparation:
        auto = transformers.AutoProcessor if texts else transformers.AutoFeatureExtractor
        return _load(auto, folder, "processor", expected)
    try:
        import PIL  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError("pillow", "vision", "A model of images") from error
    images = _load(transformers.AutoImageProcessor, folder, "processor", expected, backend="pil")
    return ImageTextProcessor.of(folder, images) if texts else images


def _preparation(folder: Path) -> Mapping[str, Any] | None:
    """How images or sound are prepared, also where transformers has written it with the tokenizer's part; or None."""
    if (folder / PREPROCESSOR).is_file():
        return read_json(folder / PREPROCESSOR)
    joined = read_json(folder / _JOINED) if (folder / _JOINED).is_file() else {}
    found: Mapping[str, Any] | None = joined.get("image_processor") or joined.get("feature_extractor")
    return found


def _reads_both(folder: Path) -> bool:
    """Whether the model reads an image as tokens of a text, so that transformers' own processor joins the two."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    name = KNOWN.get(config.get("model_type"))
    return name is not None and (config.get("architectures") or [name])[0] == name


def has_preprocessor(folder: Path) -> bool:
    """Whether a folder says how images or sound are prepared."""
    return _preparation(folder) is not None


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder in Hugging Face layout. Raises `ModelError` where it does not load."""
    import transformers

    return _load(transformers.AutoTokenizer, folder, "tokenizer", "the tokenizer's files in Hugging Face layout")


def _load(auto: Any, folder: Path, what: str, expected: str, **options: str) -> Any:
    allowed = is_allowed(str(folder.resolve()))
    try:
        return auto.from_pretrained(folder, trust_remote_code=allowed, **options)
    except loading_failures() as error:
        said = f"The {what} cannot be loaded: {first_line(error)}"
        raise to_blame(folder, allowed) or ModelError(said, where=str(folder), expected=expected) from error


class HasCompanions(Protocol):
    """A model with small files beside it, by their paths below its folder."""

    @property
    def companions(self) -> Mapping[str, bytes]:
        """Path below the folder -> content."""


def processor_of(model: HasCompanions) -> Any:
    """The processor among a model's companion files."""
    with tempfile.TemporaryDirectory() as folder:
        write_companions(Path(folder), model.companions)
        return load_processor(Path(folder))


def labels_of(model: HasCompanions) -> tuple[str, ...] | None:
    """Class names in the order of their ids, as the config among the companion files has them."""
    names = json.loads(model.companions.get("config.json", b"{}")).get("id2label")
    return None if names is None else tuple(names[key] for key in sorted(names, key=int))


class SentenceProcessor:
    """A tokenizer together with the modules that make one embedding of its tokens'.

    It is called as the tokenizer is, and has what the tokenizer has; saving it writes the files of both, so that the
    folder opens in sentence-transformers.
    """

    def __init__(self, tokenizer: Any, modules: SentenceModules) -> None:
        self.tokenizer = tokenizer
        self.modules = modules

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """The tokenizer's encoding."""
        return self.tokenizer(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        if name in ("tokenizer", "modules"):  # while it is being made or copied
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer's files and those of the modules, some of them in folders of their own."""
        self.tokenizer.save_pretrained(folder)
        write_companions(Path(folder), self.modules.files(self.tokenizer.model_max_length))


@dataclass
class ImageTextProcessor:
    """An image processor and a tokenizer, for a model that reads both; called as the image processor is.

    ``positions`` is how many tokens of a text the model reads at most, None where its config doesn't say; ``length`` to
    how many every text is padded, None where to no length of its own. Saved, it is the files that transformers.js
    reads: transformers would write both into one.
    """

    image_processor: Any
    tokenizer: Any
    positions: int | None
    length: int | None

    @classmethod
    def of(cls, folder: Path, images: Any) -> ImageTextProcessor:
        """``images`` with the tokenizer of ``folder``, by the model's config there. Raises `ModelError`."""
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        positions = (config.get("text_config") or {}).get("max_position_embeddings")
        # As transformers' own pipeline pads: what was trained without a mask reads padding too.
        padded = _SIGLIP_LENGTH if "siglip" in str(config.get("model_type")) else None
        return cls(images, load_tokenizer(folder), positions, padded and min(padded, positions or padded))

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """The image processor's encoding."""
        return self.image_processor(*arguments, **options)

    def tokens(self, texts: Sequence[str], max_length: int) -> Any:
        """The tokenizer's encoding of ``texts``, cut and, where they must be, padded."""
        if self.length is not None:
            return self.tokenizer(texts, padding="max_length", truncation=True, max_length=self.length)
        return self.tokenizer(texts, truncation=True, max_length=min(max_length, self.positions or max_length))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files of both."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)


def sentence_processor(folder: Path, tokenizer: Any, width: int | None = None) -> SentenceProcessor:
    """``tokenizer`` with the modules of ``folder``; of a plain encoder of that ``width``, with mean pooling.

    That is what sentence-transformers does with such a folder. Raises `ModelError` for modules that don't fit.
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
