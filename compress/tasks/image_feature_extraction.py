"""Image feature extraction: one embedding an image, judged by what it finds. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.data.columns import Column, value_text
from compress.data.slices import Slice
from compress.tasks.capability import EMBEDS, HAS_LABELS, READS_ROWS, SINGLE_CALL, TAKES_IMAGES
from compress.tasks.task import CollectedOutputs, Examples, Task
from compress.utils.errors import DataError, ModelError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch

    from compress.models.torch_model import TorchModel
    from compress.results.measurement import Measurement
    from compress.tasks.evaluation import Evaluation

POOLED = "pooler_output"
_TEMPERATURE = 0.1
"""Of the contrastive loss, as Khosla et al. (2020) have it."""
_IGNORED = -100

_STARTER: dict[str, Any] = {
    "name": "my-image-search",
    "description": "a smaller, faster model of images for search by example, from my own photographs, a folder a class",
    "model": "facebook/dinov2-small",
    "data": {"splits": {"train": "photos/train", "validation": "photos/validation", "test": "photos/test"}},
    "stages": [
        {"finetune": {"epochs": 2}},
        {"distill": {"student": {"layers": [0, 2, 4, 6, 8, 10]}, "epochs": 3}},
        {"onnx": {}},
        {"onnx_int8": {"method": "static"}},
    ],
    "baseline": "finetune",
    "targets": ["cpu"],
    "benchmark": {},
    "limits": [{"metric": "recall_at_1", "at_least": 0.98, "of": "baseline"}],
}


def class_name(value: Any) -> str | None:
    """A class as text: its name, or a number."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return value.strip() if isinstance(value, str) else value_text(value)


@dataclass(frozen=True)
class PoolerOutput:
    """An image's embedding as the model pools it, flat: a `Head`."""

    outputs: ClassVar[tuple[str, ...]] = (POOLED,)
    answer: ClassVar[str] = "image_embedding"
    answer_label: ClassVar[str] = "embeddings"

    def read(self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Embeddings [B, dimensions]. Raises `ModelError` for a model that pools nothing."""
        return self.flat(outputs[POOLED])

    @staticmethod
    def flat(pooled: torch.Tensor | None) -> torch.Tensor:
        """What a model pools [B, dimensions, ...] as [B, dimensions]. Raises `ModelError` where it is nothing."""
        if pooled is None:
            raise ModelError(
                f"The model gives no {POOLED}, so that there is no embedding of an image.",
                expected="a model that pools what it sees, such as ViT, DINOv2, Swin, ConvNeXt or ResNet",
            )
        return pooled.flatten(1)


class ImageFeatureExtraction(Task):
    """Hugging Face `image-feature-extraction`: of each row, `image` is to find others of its `label` among all.

    The embedding is the model's `pooler_output`: the mean of what a convolutional net sees, or what ViTs make of their
    first token. Of a ViT whose checkpoint has no weights for that, it is the first token as it is.
    """

    name = "image-feature-extraction"
    columns = (
        Column("image", kind="image"),
        Column("label", given=False, read=class_name, expected="a name or a number"),
    )
    capabilities = frozenset({READS_ROWS, TAKES_IMAGES, HAS_LABELS, EMBEDS, SINGLE_CALL})
    architectures = ("Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel", "IJepaModel")
    app_steps = ("prepare-image", "embed")
    starter = _STARTER
    slices = (Slice(column="label"),)

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights and image processor, without any head. Raises `ModelError` for what does not load."""
        import torch

        from compress.models.processor import load_processor
        from compress.models.remote_code import MODULE_KEY
        from compress.models.transformer_pruning import pool_first_token
        from compress.tasks.loading import Origin, load_by

        expected = "an image model with a preprocessor_config.json, in Hugging Face layout"
        origin = Origin(self.name, directory, load_processor, expected, _plain_answers)
        model = load_by("AutoModel", origin, trust_remote_code, dtype=torch.float32)
        if hasattr(model.module.config, MODULE_KEY):
            _without_head(model.module)
        else:
            pool_first_token(model.module, directory)
        return model

    def encode(self, rows: pa.Table, processor: Any, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Prepare as the model's own processor does; labels are a number for each class [n]."""
        from compress.tasks.embeddings import numbers
        from compress.tasks.image_inputs import encode_images

        examples = replace(encode_images(rows["image"].to_pylist(), processor), head=PoolerOutput())
        if "label" not in rows.column_names:
            return examples
        return replace(examples, labels=numbers(rows["label"].to_pylist()))

    def eval_examples(
        self, rows: pa.Table, processor: Any, labels: Sequence[str] | None, max_length: int, evaluation: Evaluation
    ) -> Examples:
        """Every row. Raises `DataError` where no image has another of its class, or all are of one."""
        import numpy as np

        examples = self.encode(rows, processor, labels, max_length)
        counts = np.zeros(0, int) if examples.labels is None else np.unique(examples.labels, return_counts=True)[1]
        if len(counts) < 2 or counts.max() < 2:
            raise DataError(
                "There is nothing to find: the split has no two images of one class, or no second class.",
                where="data.splits",
                expected="rows with an `image` and its `label`, several of each",
            )
        return examples

    def loss(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        """Supervised contrastive loss of the rows that have a label: a batch needs several of a class."""
        from compress.numerics.contrastive import supervised_contrastive

        known = labels != _IGNORED
        embeddings = PoolerOutput.flat(outputs.pooler_output).float()[known]
        return supervised_contrastive(embeddings, labels[known], _TEMPERATURE)

    def predicted_labels(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Each image and the one that is nearest to it, of the batch, are of one class."""
        import torch
        from torch.nn.functional import normalize

        unit = normalize(PoolerOutput.flat(outputs.pooler_output.detach()), dim=-1)
        near = (unit @ unit.T).fill_diagonal_(-2.0).argmax(dim=-1)
        return torch.minimum(near, torch.arange(len(near), device=near.device))

    def distance(self, mine: torch.Tensor, taught: torch.Tensor, temperature: float) -> torch.Tensor:
        """Squared distance of embeddings (Reimers and Gurevych 2020)."""
        from compress.numerics.distillation import embedding_distance

        return embedding_distance(mine, taught)

    def collect(
        self, outputs: Mapping[str, np.ndarray], examples: Examples, indices: Sequence[int]
    ) -> CollectedOutputs:
        """The embeddings, [batch, dimensions]. Raises `ModelError` where they are not finite."""
        from compress.tasks.embeddings import EMBEDDING, finite

        return {EMBEDDING: finite(examples.answers(outputs, {}))}

    def measure(self, kept: CollectedOutputs, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """How often the nearest image is of the same class, how many of the ten nearest are, and how soon one is.

        A class with a single image counts as not found.
        """
        from compress.tasks.classes import mean_row
        from compress.tasks.embeddings import Retrieval

        assert labels is not None, "held_out asks for labels"
        search = Retrieval.of(kept, itself=True)
        first, second, *others = search.rows(labels, labels, model, target)
        same = (labels[search.near()] == labels[:, None]).mean(axis=1)
        return [second, mean_row("precision_at_10", same, model, target), first, *others]

    def compare(
        self, kept: CollectedOutputs, reference: CollectedOutputs, model: str, target: str
    ) -> list[Measurement]:
        """The share of the ten nearest images that both models find, and the cosine of their embeddings."""
        from compress.tasks.embeddings import likeness_rows

        return likeness_rows(kept, reference, True, model, target)

    def probabilities(self, kept: CollectedOutputs) -> np.ndarray | None:
        """None: an embedding is no class."""
        return None


def _without_head(module: Any) -> None:
    """A network of timm gives what it sees, not classes; any other gives what its code says."""
    from compress.models.remote_code import MODULE_KEY, TIMM_NETWORK
    from compress.models.timm_models import change_head

    made = getattr(module.config, MODULE_KEY)
    if made["module"] == TIMM_NETWORK and made["arguments"]["num_classes"]:
        change_head(module, 0)


def _plain_answers(found: Any, targets: Any, config: Any) -> Any:
    """A plain network's embeddings [B, dimensions], the mean of its places where it gives a map [B, dimensions, h, w].

    Raises `ModelError` for anything else.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    if getattr(found, "ndim", 0) not in (2, 4):
        raise ModelError(
            f"The module gives a {type(found).__name__} that is no embedding.",
            where="module",
            expected="embeddings [batch, dimensions], or a map [batch, dimensions, height, width]",
        )
    return BaseModelOutputWithPooling(pooler_output=found if found.ndim == 2 else found.mean(dim=(2, 3)))


TASK = ImageFeatureExtraction()
