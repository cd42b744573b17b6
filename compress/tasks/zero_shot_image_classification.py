"""Zero-shot image classification by dual encoders such as CLIP. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.data.columns import Column
from compress.data.slices import Slice
from compress.tasks.capability import (
    DUAL_ENCODER,
    HAS_LABELS,
    READS_ROWS,
    SINGLE_CALL,
    TAKES_IMAGES,
    TAKES_TEXT,
)
from compress.tasks.classes import agreement_row, finite, mean_row, outcome_row
from compress.tasks.embeddings import distinct, numbers, together
from compress.tasks.image_feature_extraction import class_name
from compress.tasks.image_inputs import PIXELS, encode_images
from compress.tasks.lazy_modules import losses, np, pa, retrieval, torch
from compress.tasks.loading import Origin, load_by
from compress.tasks.task import (
    Chained,
    Examples,
    Head,
    Joined,
    NamedArrays,
    Task,
    relative_limit,
    split_files,
    starter_recipe,
)
from compress.tasks.tokens import text_inputs
from compress.utils.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

    from compress.models.model import Processor, TorchModel
    from compress.results.report import Measurement
    from compress.tasks.evaluation import Evaluation

_IMAGES, _TEXTS = "image_embeds", "text_embeds"
_SIMILARITIES = ("logits_per_image", "logits_per_text")
"""Graph outputs that pipelines of this task read."""
_IMAGE, _TEXT = "images", "texts"
_KIND, _CAPTION, _PICTURE = "kind", "caption", "picture"
_NONE = -1
"""Id of the caption and image of a class prompt, which is no row."""
_AT = (1, 5, 10)
_SCALE = 0.01
"""Divisor of cosines, like the temperature of a fully trained CLIP."""


@dataclass(frozen=True)
class Towers(Head):
    """Concatenated embeddings of an image and its text."""

    outputs: ClassVar[tuple[str, ...]] = (_IMAGES, _TEXTS)
    answer: ClassVar[str] = "embeddings"
    answer_label: ClassVar[str] = "embeddings"

    def read(self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return [B, 2 x dimensions], image embeddings first, each half normalized."""
        from torch.nn.functional import normalize

        return torch.cat([normalize(outputs[name], dim=-1) for name in self.outputs], dim=-1)


class ZeroShotImageClassification(Task):
    """Hugging Face `zero-shot-image-classification`. `text` is a caption of `image`.

    Captions and images that occur in several rows match all of them. With a column `label`, all rows of a class match,
    and a prompt for each class and template follows the rows.
    """

    name = "zero-shot-image-classification"
    columns = (
        Column("image", kind="image"),
        Column("text"),
        Column("label", given=False, read=class_name, expected="a name or a number", optional=True),
    )
    capabilities = frozenset({READS_ROWS, TAKES_IMAGES, TAKES_TEXT, HAS_LABELS, DUAL_ENCODER, SINGLE_CALL})
    architectures = ("CLIPModel", "SiglipModel", "Siglip2Model", "AltCLIPModel", "AlignModel", "MetaClip2Model")
    starter = starter_recipe(
        "my-clip",
        "a smaller, faster model of images and texts for search and zero-shot classification",
        "openai/clip-vit-base-patch32",
        split_files("jsonl", {"image": "image", "text": "caption"}),
        {
            "distill": {"student": {"model": "wkcn/TinyCLIP-ViT-8M-16-Text-3M-YFCC15M"}, "epochs": 3},
            "onnx": {},
            "onnx_int8": {},
        },
        relative_limit("recall_at_10_image_to_text", 0.98),
    )
    slices = (Slice(length="quartiles"),)
    metrics = (
        "recall_at_{number}_image_to_text",
        "recall_at_{number}_text_to_image",
        "zero_shot_accuracy",
        "embedding_cosine",
        "agreement",
    )

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights, tokenizer and image processor. Raises `ModelError` for files that do not load."""

        from compress.models.processor import ImageTextProcessor, load_processor

        expected = "a model of two towers such as CLIP or SigLIP, with its tokenizer and a preprocessor_config.json"
        origin = Origin(self.name, directory, load_processor, expected)
        model = load_by("AutoModelForZeroShotImageClassification", origin, trust_remote_code, dtype=torch.float32)
        if not isinstance(model.processor, ImageTextProcessor):
            raise ModelError(
                f"The model cannot be loaded for {self.name}: it has no tokenizer and image processor both",
                where=str(directory),
                expected=expected,
            )
        return model

    def encode(self, rows: pa.Table, processor: Processor, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Return pairs; labels [n, 3] are the ids of a row's group, caption and image.

        Args:
            rows: Rows with the task's columns; label columns are optional.
            processor: Processor of the model.
            labels: Class names of the model, or None to ignore labels.
            max_length: Number of tokens after which texts are truncated.
        """

        from compress.data.media import identities

        texts = rows["text"].to_pylist()
        captions, pictures = numbers(texts), numbers(list(identities(rows["image"])))
        kinds = numbers(rows["label"].to_pylist()) if "label" in rows.column_names else together(captions, pictures)
        examples = _pairs(rows["image"].to_pylist(), texts, processor, max_length)
        return replace(examples, labels=np.stack([kinds, captions, pictures], axis=1))

    def eval_examples(
        self,
        rows: pa.Table,
        processor: Processor,
        labels: Sequence[str] | None,
        max_length: int,
        evaluation: Evaluation,
    ) -> Examples:
        """Return all rows, then the prompts of each class. Raises `DataError` if there is only one candidate.

        Args:
            rows: Rows of the test split.
            processor: Processor of the model.
            labels: Class names of the model.
            max_length: Number of tokens after which texts are truncated.
            evaluation: The recipe's `evaluation` section.
        """
        examples = self.encode(rows, processor, labels, max_length)
        assert examples.labels is not None, "captions are labels"
        if len(np.unique(examples.labels[:, 0])) < 2:
            raise DataError(
                "Retrieval needs candidates: all images of the split have one caption or one class.",
                where="data.splits",
                expected="rows with an `image` and a `text` that tells it from others",
            )
        if "label" not in rows.column_names:
            return examples
        names: list[str] = list(dict.fromkeys(rows["label"].to_pylist()))
        known = dict(zip(rows["label"].to_pylist(), examples.labels[:, 0].tolist(), strict=True))
        prompts = [template.replace("{}", name) for name in names for template in evaluation.templates]
        kinds = [known[name] for name in names for _ in evaluation.templates]
        image = rows["image"].slice(0, 1).to_pylist() * len(prompts)
        asked = _pairs(image, prompts, processor, max_length)
        beside = np.full(len(prompts), _NONE)
        more = np.stack([np.array(kinds), beside, beside], axis=1)
        assert examples.sizes is not None and asked.sizes is not None, "by `_pairs`"
        return replace(
            examples,
            inputs=Chained(examples.inputs, asked.inputs),
            labels=np.concatenate([examples.labels, more]),
            sizes=np.concatenate([examples.sizes, asked.sizes]),
        )

    def loss(self, outputs: ModelOutput, labels: torch.Tensor) -> torch.Tensor:
        """Return the model's contrastive loss: sigmoid for SigLIP, else softmax in both directions."""
        kinds = labels[:, 0]
        alone = torch.eye(len(kinds), dtype=torch.bool, device=kinds.device)
        belongs = alone | ((kinds[:, None] == kinds[None, :]) & (kinds >= 0)[:, None])
        is_siglip = type(outputs).__name__.startswith("Siglip")
        loss = losses.sigmoid_contrastive if is_siglip else losses.paired_contrastive
        return loss(outputs.logits_per_image.float(), belongs)

    def predicted_labels(self, outputs: ModelOutput, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return labels that put each row into its own group."""
        count = len(outputs.image_embeds)
        return torch.arange(count)[:, None].expand(count, 3)

    def distance(self, mine: torch.Tensor, taught: torch.Tensor, temperature: float) -> torch.Tensor:
        """Return the distance of the batch's image-text affinities from the teacher's (Wu et al. 2023, section 3.1)."""
        student, teacher = (embeddings.chunk(2, dim=-1) for embeddings in (mine, taught))
        return losses.affinity_kl((student[0], student[1]), (teacher[0], teacher[1]), _SCALE * temperature)

    def collect(self, outputs: NamedArrays, examples: Examples, indices: Sequence[int]) -> NamedArrays:
        """Return both embeddings [batch, dimensions] and the labels. Raises `ModelError` if they are not finite."""
        images, texts = np.split(finite(examples.answers(outputs, {}), "embeddings"), 2, axis=-1)
        assert examples.labels is not None, "captions are labels"
        kinds, captions, pictures = examples.labels[np.asarray(indices)].T
        return {_IMAGE: images, _TEXT: texts, _KIND: kinds, _CAPTION: captions, _PICTURE: pictures}

    def measure(self, collected: NamedArrays, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """Return recall from image to caption and from caption to image, and zero-shot accuracy.

        Candidates are the distinct captions or images. A class embedding is the mean of its prompts' embeddings
        (Radford et
        al. 2021, section 3.1.4).

        Args:
            collected: Collected outputs of all examples.
            labels: Labels of all examples.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        rows = collected[_CAPTION] != _NONE
        images, texts, kinds = collected[_IMAGE][rows], collected[_TEXT][rows], collected[_KIND][rows]
        captions, pictures = distinct(collected[_CAPTION][rows]), distinct(collected[_PICTURE][rows])
        recall_pairs = {
            "image_to_text": retrieval.ranks(images, texts[captions], kinds, kinds[captions]),
            "text_to_image": retrieval.ranks(texts, images[pictures], kinds, kinds[pictures]),
        }
        recalls = [
            outcome_row(f"recall_at_{count}_{way}", places <= count, model, target)
            for way, places in recall_pairs.items()
            for count in _AT
        ]
        chosen = _chosen(collected)
        return recalls if chosen is None else [*recalls, outcome_row(_ACCURACY, chosen == kinds, model, target)]

    def interpret(
        self,
        answers: Sequence[Any],
        examples: Examples,
        rows: pa.Table,
        processor: Processor,
        labels: Sequence[str] | None,
    ) -> list[Any]:
        """Return the cosine of the embeddings of each image and its text as `score`.

        Args:
            answers: Answer to each example, as `Examples.answers` returns them, or a generated text.
            examples: The examples that `raw_examples` made of the rows.
            rows: Rows of raw inputs.
            processor: Processor of the model.
            labels: Class names of the model, if it has any.
        """
        images, texts = np.split(finite(np.stack(answers), "embeddings"), 2, axis=-1)
        return [{"score": float(cosine)} for cosine in (images * texts).sum(axis=-1)]

    def compare(self, collected: NamedArrays, reference: NamedArrays, model: str, target: str) -> list[Measurement]:
        """Return the share of images with the same class or nearest caption, and the cosine of embeddings.

        Args:
            collected: Collected outputs of the model.
            reference: Collected outputs of the baseline.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        choices, theirs = (_chosen(outputs) for outputs in (collected, reference))
        if choices is None or theirs is None:
            choices, theirs = _first_captions(collected), _first_captions(reference)
        rows = [agreement_row(choices == theirs, model, target)]
        if collected[_IMAGE].shape == reference[_IMAGE].shape:
            rows.append(
                mean_row("embedding_cosine", (collected[_IMAGE] * reference[_IMAGE]).sum(axis=1), model, target)
            )
        return rows


_ACCURACY = "zero_shot_accuracy"


def _chosen(collected: NamedArrays) -> np.ndarray | None:
    """Return the class whose prompts are nearest to each row's image, [n], or None without prompts."""
    asked = collected[_CAPTION] == _NONE
    if not asked.any():
        return None
    classes = np.unique(collected[_KIND][asked])
    means = [collected[_TEXT][asked & (collected[_KIND] == class_id)].mean(axis=0) for class_id in classes]
    chosen_classes: np.ndarray = classes[
        (collected[_IMAGE][~asked] @ retrieval.normalized(np.stack(means)).T).argmax(axis=1)
    ]
    return chosen_classes


def _first_captions(collected: NamedArrays) -> np.ndarray:
    """Return the id of the caption nearest to each row's image, [n]."""
    places = distinct(collected[_CAPTION])
    caption_ids: np.ndarray = retrieval.nearest(collected[_IMAGE], collected[_TEXT][places], 1)[:, 0]
    return caption_ids


def _pairs(
    images: Sequence[Mapping[str, Any]], texts: Sequence[str], processor: Processor, max_length: int
) -> Examples:
    """Return images and texts without labels. The numbers of both in a call may differ.

    Args:
        images: Values of the image column.
        texts: Captions.
        processor: Processor of the model.
        max_length: Number of tokens after which texts are truncated.
    """
    pixels = encode_images(images, processor.image_processor)
    encoded = processor.tokens(texts, max_length)
    inputs, padding = text_inputs(encoded, processor.tokenizer)
    if processor.length is not None:
        # Padded already, and with a mask only where the tokenizer gives one: SigLIP's do not.
        padding = {name: None for name in padding if name in encoded}
        inputs = [{name: np.array(encoded[name][row], np.int64) for name in padding} for row in range(len(texts))]
    axes = {**dict.fromkeys(padding, "text_batch_size"), PIXELS: "image_batch_size"}
    # Sizes are the images': batches of captions of like length would hold nothing to tell apart.
    examples = replace(pixels, inputs=Joined(inputs, pixels.inputs), padding={**padding, PIXELS: None})
    return replace(examples, batches=axes, head=Towers(), extra_outputs=_SIMILARITIES)


TASK = ZeroShotImageClassification()
