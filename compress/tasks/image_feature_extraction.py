"""Image feature extraction: one embedding per image, evaluated by retrieval. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.data.columns import Column, value_text
from compress.data.slices import Slice
from compress.tasks.capability import EMBEDS, HAS_LABELS, READS_ROWS, SINGLE_CALL, TAKES_IMAGES
from compress.tasks.classes import finite, mean_row
from compress.tasks.embeddings import EMBEDDING, EmbeddingTask, numbers
from compress.tasks.image_inputs import encode_images
from compress.tasks.lazy_modules import losses, np, pa, torch
from compress.tasks.loading import Origin, load_by
from compress.tasks.task import Examples, Head, NamedArrays, relative_limit, split_folders, starter_recipe
from compress.utils.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from transformers.utils import ModelOutput

    from compress.models.model import Processor, TorchModel
    from compress.results.report import Measurement
    from compress.tasks.evaluation import Evaluation

POOLED = "pooler_output"
_TEMPERATURE = 0.1
"""Temperature of the contrastive loss (Khosla et al. 2020)."""
_IGNORED = -100


def class_name(value: object) -> str | None:
    """Return a class, given by name or number, as text."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return value.strip() if isinstance(value, str) else value_text(value)


@dataclass(frozen=True)
class PoolerOutput(Head):
    """Pooled image embedding, flattened."""

    outputs: ClassVar[tuple[str, ...]] = (POOLED,)
    answer: ClassVar[str] = "image_embedding"
    answer_label: ClassVar[str] = "embeddings"

    def read(self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return embeddings [B, dimensions]. Raises `ModelError` for a model without pooling."""
        return self.flat(outputs[POOLED])

    @staticmethod
    def flat(pooled: torch.Tensor | None) -> torch.Tensor:
        """Return pooled features [B, dimensions, ...] as [B, dimensions]. Raises `ModelError` for None."""
        if pooled is None:
            raise ModelError(
                f"The model returns no {POOLED}, so there is no image embedding.",
                expected="a model with a pooling layer, such as ViT, DINOv2, Swin, ConvNeXt or ResNet",
            )
        return pooled.flatten(1)


class ImageFeatureExtraction(EmbeddingTask):
    """Hugging Face `image-feature-extraction`. Each `image` is to retrieve others with the same `label`.

    The embedding is the model's `pooler_output`: the mean over positions of a convolutional network, or the pooled
    first
    token of a ViT. A ViT without pooling weights uses the first token itself.
    """

    name = "image-feature-extraction"
    columns = (
        Column("image", kind="image"),
        Column("label", given=False, read=class_name, expected="a name or a number"),
    )
    capabilities = frozenset({READS_ROWS, TAKES_IMAGES, HAS_LABELS, EMBEDS, SINGLE_CALL})
    architectures = ("Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel", "IJepaModel")
    app_steps = ("prepare-image", "embed")
    searches_itself = True
    metrics = (*EmbeddingTask.metrics, "precision_at_{number}")
    starter = starter_recipe(
        "my-image-search",
        "a smaller, faster model of images for search by example, from my own photographs, a folder a class",
        "facebook/dinov2-small",
        split_folders("photos"),
        {
            "finetune": {"epochs": 2},
            "distill": {"student": {"layers": [0, 2, 4, 6, 8, 10]}, "epochs": 3},
            "onnx": {},
            "onnx_int8": {"method": "static"},
        },
        relative_limit("recall_at_1", 0.98),
        baseline="finetune",
    )
    slices = (Slice(column="label"),)

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights and image processor without a head. Raises `ModelError` for files that do not load."""

        from compress.models.config_checks import MODULE_KEY
        from compress.models.processor import load_processor
        from compress.models.transformer_pruning import pool_first_token

        expected = "an image model with a preprocessor_config.json, in Hugging Face layout"
        origin = Origin(self.name, directory, load_processor, expected, _plain_answers)
        model = load_by("AutoModel", origin, trust_remote_code, dtype=torch.float32)
        if hasattr(model.module.config, MODULE_KEY):
            _without_head(model.module)
        else:
            pool_first_token(model.module, directory)
        return model

    def encode(self, rows: pa.Table, processor: Processor, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Preprocess the images with the model's processor; labels are class ids [n].

        Args:
            rows: Rows with the task's columns; label columns are optional.
            processor: Processor of the model.
            labels: Class names of the model, or None to ignore labels.
            max_length: Number of tokens after which texts are truncated.
        """
        examples = replace(encode_images(rows["image"].to_pylist(), processor), head=PoolerOutput())
        if "label" not in rows.column_names:
            return examples
        return replace(examples, labels=numbers(rows["label"].to_pylist()))

    def eval_examples(
        self,
        rows: pa.Table,
        processor: Processor,
        labels: Sequence[str] | None,
        max_length: int,
        evaluation: Evaluation,
    ) -> Examples:
        """Return all rows. Raises `DataError` if no image shares its class with another, or all have one class.

        Args:
            rows: Rows of the test split.
            processor: Processor of the model.
            labels: Class names of the model.
            max_length: Number of tokens after which texts are truncated.
            evaluation: The recipe's `evaluation` section.
        """
        examples = self.encode(rows, processor, labels, max_length)
        counts = np.zeros(0, int) if examples.labels is None else np.unique(examples.labels, return_counts=True)[1]
        if len(counts) < 2 or counts.max() < 2:
            raise DataError(
                "Retrieval needs two images of one class and a second class; the split lacks them.",
                where="data.splits",
                expected="rows with an `image` and its `label`, several of each",
            )
        return examples

    def loss(self, outputs: ModelOutput, labels: torch.Tensor) -> torch.Tensor:
        """Return the supervised contrastive loss of the labeled rows. A batch needs several images of a class."""
        known = labels != _IGNORED
        embeddings = PoolerOutput.flat(outputs.pooler_output).float()[known]
        return losses.supervised_contrastive(embeddings, labels[known], _TEMPERATURE)

    def predicted_labels(self, outputs: ModelOutput, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return labels that put each image and its nearest neighbor in the batch into one class."""
        from torch.nn.functional import normalize

        unit = normalize(PoolerOutput.flat(outputs.pooler_output.detach()), dim=-1)
        near = (unit @ unit.T).fill_diagonal_(-2.0).argmax(dim=-1)
        return torch.minimum(near, torch.arange(len(near), device=near.device))

    def collect(self, outputs: NamedArrays, examples: Examples, indices: Sequence[int]) -> NamedArrays:
        """Return the embeddings, [batch, dimensions]. Raises `ModelError` if they are not finite."""
        return {EMBEDDING: finite(examples.answers(outputs, {}), "embeddings")}

    def measure(self, collected: NamedArrays, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """Return recall@1, precision@10 and mean reciprocal rank by class.

        An image that is the only one of its class counts as not found.

        Args:
            collected: Collected outputs of all examples.
            labels: Labels of all examples.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        assert labels is not None, "`eval_examples` requires labels"
        first, second, *others = super().measure(collected, labels, model, target)
        same = (labels[self.nearest(collected)] == labels[:, None]).mean(axis=1)
        return [second, mean_row("precision_at_10", same, model, target), first, *others]


def _without_head(module: Any) -> None:
    """Remove the classifier of a timm network. Other networks return whatever their code returns."""
    from compress.models.config_checks import MODULE_KEY, TIMM_NETWORK
    from compress.models.timm_models import change_head

    module_entry = getattr(module.config, MODULE_KEY)
    if module_entry["module"] == TIMM_NETWORK and module_entry["arguments"]["num_classes"]:
        change_head(module, 0)


def _plain_answers(outputs: ModelOutput, targets: Any, config: PretrainedConfig) -> ModelOutput:
    """Return a plain network's embeddings [B, dimensions]; a feature map is averaged over its positions.

    Raises `ModelError` for anything else.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    if getattr(outputs, "ndim", 0) not in (2, 4):
        raise ModelError(
            f"The module gives a {type(outputs).__name__} that is no embedding.",
            where="module",
            expected="embeddings [batch, dimensions], or a map [batch, dimensions, height, width]",
        )
    return BaseModelOutputWithPooling(pooler_output=outputs if outputs.ndim == 2 else outputs.mean(dim=(2, 3)))


TASK = ImageFeatureExtraction()
