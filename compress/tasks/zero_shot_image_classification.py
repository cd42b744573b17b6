"""Zero-shot image classification: images and texts in one space, as CLIP has them. Importing this imports no torch."""

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
from compress.tasks.image_feature_extraction import class_name
from compress.tasks.lazy_examples import Chained, Joined
from compress.tasks.task import CollectedOutputs, Examples, Task
from compress.utils.errors import DataError, ModelError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch

    from compress.models.torch_model import TorchModel
    from compress.results.measurement import Measurement
    from compress.tasks.evaluation import Evaluation

_IMAGES, _TEXTS = "image_embeds", "text_embeds"
_SIMILARITIES = ("logits_per_image", "logits_per_text")
"""What the pipelines of this task read of a graph."""
_IMAGE, _TEXT = "images", "texts"
_KIND, _CAPTION, _PICTURE = "kind", "caption", "picture"
_NONE = -1
"""The caption and the picture of a class's prompt, which is no row."""
_AT = (1, 5, 10)
_SCALE = 0.01
"""Cosines are divided by it, as CLIP's are that has learned for long."""

_STARTER: dict[str, Any] = {
    "name": "my-clip",
    "description": "a smaller, faster model of images and texts for search and zero-shot classification",
    "model": "openai/clip-vit-base-patch32",
    "data": {
        "splits": {"train": "train.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"},
        "columns": {"image": "image", "text": "caption"},
    },
    "stages": [
        {"distill": {"student": {"model": "wkcn/TinyCLIP-ViT-8M-16-Text-3M-YFCC15M"}, "epochs": 3}},
        {"onnx": {}},
        {"onnx_int8": {}},
    ],
    "targets": ["cpu"],
    "benchmark": {},
    "limits": [{"metric": "recall_at_10_image_to_text", "at_least": 0.98, "of": "baseline"}],
}


@dataclass(frozen=True)
class Towers:
    """The embeddings of an image and of its text, one behind the other: a `Head`."""

    outputs: ClassVar[tuple[str, ...]] = (_IMAGES, _TEXTS)
    answer: ClassVar[str] = "embeddings"
    answer_label: ClassVar[str] = "embeddings"

    def read(self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[B, 2 x dimensions], those of images first, each half of length 1."""
        import torch
        from torch.nn.functional import normalize

        return torch.cat([normalize(outputs[name], dim=-1) for name in self.outputs], dim=-1)


class ZeroShotImageClassification(Task):
    """Hugging Face `zero-shot-image-classification`: of each row, `text` is a caption of `image`.

    Captions and images that stand in several rows belong to all of them; with a column `label`, whatever is of one
    class belongs together. Then there is a prompt for each class and template too, behind the rows.
    """

    name = "zero-shot-image-classification"
    columns = (
        Column("image", kind="image"),
        Column("text"),
        Column("label", given=False, read=class_name, expected="a name or a number", optional=True),
    )
    capabilities = frozenset({READS_ROWS, TAKES_IMAGES, TAKES_TEXT, HAS_LABELS, DUAL_ENCODER, SINGLE_CALL})
    architectures = ("CLIPModel", "SiglipModel", "Siglip2Model", "AltCLIPModel", "AlignModel", "MetaClip2Model")
    starter = _STARTER
    slices = (Slice(length="quartiles"),)

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights, tokenizer and image processor. Raises `ModelError` for what does not load."""
        import torch

        from compress.models.processor import ImageTextProcessor, load_processor
        from compress.tasks.loading import Origin, load_by

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

    def encode(self, rows: pa.Table, processor: Any, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Pairs; labels [n, 3] are the numbers of what a row belongs to, of its caption and of its image."""
        import numpy as np

        from compress.data.media import identities
        from compress.tasks.embeddings import numbers, together

        texts = rows["text"].to_pylist()
        captions, pictures = numbers(texts), numbers(identities(rows["image"]))
        kinds = numbers(rows["label"].to_pylist()) if "label" in rows.column_names else together(captions, pictures)
        examples = _pairs(rows["image"].to_pylist(), texts, processor, max_length)
        return replace(examples, labels=np.stack([kinds, captions, pictures], axis=1))

    def eval_examples(
        self, rows: pa.Table, processor: Any, labels: Sequence[str] | None, max_length: int, evaluation: Evaluation
    ) -> Examples:
        """Every row, then the prompts of each class. Raises `DataError` for rows that have but one thing to find."""
        import numpy as np

        examples = self.encode(rows, processor, labels, max_length)
        assert examples.labels is not None, "captions are labels"
        if len(np.unique(examples.labels[:, 0])) < 2:
            raise DataError(
                "There is nothing to find among: all images of the split have one caption, or are of one class.",
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

    def loss(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        """The contrastive loss of the model's kind: sigmoids for SigLIP, which has a bias, else softmaxes both ways."""
        import torch

        from compress.numerics.contrastive import paired_contrastive, sigmoid_contrastive

        kinds = labels[:, 0]
        alone = torch.eye(len(kinds), dtype=torch.bool, device=kinds.device)
        belongs = alone | ((kinds[:, None] == kinds[None, :]) & (kinds >= 0)[:, None])
        sigmoids = type(outputs).__name__.startswith("Siglip")
        return (sigmoid_contrastive if sigmoids else paired_contrastive)(outputs.logits_per_image.float(), belongs)

    def predicted_labels(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Each row is by itself."""
        import torch

        count = len(outputs.image_embeds)
        return torch.arange(count)[:, None].expand(count, 3)

    def distance(self, mine: torch.Tensor, taught: torch.Tensor, temperature: float) -> torch.Tensor:
        """How far the affinities of a batch's images and texts are from the teacher's (Wu et al. 2023, section 3.1)."""
        from compress.numerics.distillation import affinity_kl

        student, teacher = (one.chunk(2, dim=-1) for one in (mine, taught))
        return affinity_kl((student[0], student[1]), (teacher[0], teacher[1]), _SCALE * temperature)

    def collect(
        self, outputs: Mapping[str, np.ndarray], examples: Examples, indices: Sequence[int]
    ) -> CollectedOutputs:
        """Both embeddings [batch, dimensions], and the labels. Raises `ModelError` where they are not finite."""
        import numpy as np

        from compress.tasks.embeddings import finite

        images, texts = np.split(finite(examples.answers(outputs, {})), 2, axis=-1)
        assert examples.labels is not None, "captions are labels"
        kinds, captions, pictures = examples.labels[np.asarray(indices)].T
        return {_IMAGE: images, _TEXT: texts, _KIND: kinds, _CAPTION: captions, _PICTURE: pictures}

    def measure(self, kept: CollectedOutputs, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """How often an image's caption, and a caption's image, are among the first; and zero-shot accuracy.

        An image looks among the different captions, a caption among the different images. A class is the mean of its
        prompts' embeddings (Radford et al. 2021, section 3.1.4).
        """
        from compress.numerics.embeddings import ranks
        from compress.tasks.classes import outcome_row
        from compress.tasks.embeddings import distinct

        rows = kept[_CAPTION] != _NONE
        images, texts, kinds = kept[_IMAGE][rows], kept[_TEXT][rows], kept[_KIND][rows]
        captions, pictures = distinct(kept[_CAPTION][rows]), distinct(kept[_PICTURE][rows])
        found = {
            "image_to_text": ranks(images, texts[captions], kinds, kinds[captions]),
            "text_to_image": ranks(texts, images[pictures], kinds, kinds[pictures]),
        }
        recalls = [
            outcome_row(f"recall_at_{count}_{way}", places <= count, model, target)
            for way, places in found.items()
            for count in _AT
        ]
        chosen = _chosen(kept)
        return recalls if chosen is None else [*recalls, outcome_row(_ACCURACY, chosen == kinds, model, target)]

    def compare(
        self, kept: CollectedOutputs, reference: CollectedOutputs, model: str, target: str
    ) -> list[Measurement]:
        """For how many images both choose the same class, or find the same caption, and the cosine of embeddings."""
        from compress.tasks.classes import agreement_row, mean_row

        own, theirs = (_chosen(one) for one in (kept, reference))
        if own is None or theirs is None:
            own, theirs = _first_captions(kept), _first_captions(reference)
        rows = [agreement_row(own == theirs, model, target)]
        if kept[_IMAGE].shape == reference[_IMAGE].shape:
            rows.append(mean_row("embedding_cosine", (kept[_IMAGE] * reference[_IMAGE]).sum(axis=1), model, target))
        return rows

    def probabilities(self, kept: CollectedOutputs) -> np.ndarray | None:
        """None: which classes there are is asked with each image."""
        return None


_ACCURACY = "zero_shot_accuracy"


def _chosen(kept: CollectedOutputs) -> np.ndarray | None:
    """The class whose prompts are nearest to each row's image, [n], or None where there are no prompts."""
    import numpy as np

    from compress.numerics.embeddings import normalized

    asked = kept[_CAPTION] == _NONE
    if not asked.any():
        return None
    classes = np.unique(kept[_KIND][asked])
    means = [kept[_TEXT][asked & (kept[_KIND] == one)].mean(axis=0) for one in classes]
    found: np.ndarray = classes[(kept[_IMAGE][~asked] @ normalized(np.stack(means)).T).argmax(axis=1)]
    return found


def _first_captions(kept: CollectedOutputs) -> np.ndarray:
    """The number of the caption that is nearest to each row's image, [n]."""
    from compress.numerics.embeddings import nearest
    from compress.tasks.embeddings import distinct

    places = distinct(kept[_CAPTION])
    found: np.ndarray = nearest(kept[_IMAGE], kept[_TEXT][places], 1)[:, 0]
    return found


def _pairs(images: Sequence[Mapping[str, Any]], texts: Sequence[str], processor: Any, max_length: int) -> Examples:
    """An image and a text each, without labels; how many of both a model is given need not be the same."""
    import numpy as np

    from compress.tasks.image_inputs import PIXELS, encode_images
    from compress.tasks.tokens import text_inputs

    pixels = encode_images(images, processor.image_processor)
    encoded = processor.tokens(texts, max_length)
    inputs, padding = text_inputs(encoded, processor.tokenizer)
    if processor.length is not None:
        # Padded already, and with a mask only where the tokenizer gives one: SigLIP's do not.
        padding = {name: None for name in padding if name in encoded}
        inputs = [{name: np.array(encoded[name][row], np.int64) for name in padding} for row in range(len(texts))]
    axes = {**dict.fromkeys(padding, "text_batch_size"), PIXELS: "image_batch_size"}
    # Sizes are the images': batches of captions of like length would hold nothing to tell apart.
    found = replace(pixels, inputs=Joined(inputs, pixels.inputs), padding={**padding, PIXELS: None})
    return replace(found, batches=axes, head=Towers(), beside=_SIMILARITIES)


TASK = ZeroShotImageClassification()
